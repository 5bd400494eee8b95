"""moe_router in Triton: forward in two launches (one for a single tile), backward in one.

Forward. A program takes `tiles` consecutive tiles of [BLOCK_T, E] logits, one warp a token for 128 experts. Scores
become 64-bit keys (order of the score << 32 | lowest expert first), so that each of the K rounds is one maximum over
the row, which also carries the score back: no second look-up of the probability. Probabilities and choices add up in
registers over the program's tiles and leave as one row of partial sums a program; the second launch adds the rows in
order. The cut into programs depends on T and E alone, so prob_sum has the same bits on every GPU.

Backward recomputes the probabilities from the logits; one tile a program, everything in registers.

Bound by latency up to a few thousand tokens, then by the shuffles of the K maxima: the bytes are 4 E + 8 K a token.
"""

import torch
import triton
import triton.language as tl

TILE = 1024  # elements of a tile of logits, 8 a thread
NUM_WARPS = 4
MAX_PROGRAMS = 1024
REDUCE_PROGRAMS = 128  # rows of partial sums added at once
REDUCE_EXPERTS = 16  # experts a program of the second launch


@triton.jit
def load_softmax(logits, token, experts, num_tokens, row_stride, num_experts):
    """The scores of a tile, -inf where there is none, its probabilities, and the row maxima and sums."""
    inside = (token[:, None] < num_tokens) & (experts[None, :] < num_experts)
    address = logits + token[:, None].to(tl.int64) * row_stride + experts[None, :]
    score = tl.load(address, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(score, 1)
    exponential = tl.exp(score - top[:, None])
    total = tl.sum(exponential, 1)
    prob = tl.where(inside, exponential / total[:, None], 0.0)
    return score, prob, top, total, inside


@triton.jit
def moe_router_fwd_kernel(logits, weights, ids, counts, prob_sum, num_tokens, row_stride, num_experts, tiles,
                          NORMALIZE: tl.constexpr, TOPK: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr,
                          E: tl.constexpr):  # fmt: skip
    program = tl.program_id(0)
    experts = tl.arange(0, E)
    columns = tl.arange(0, K)
    probs = tl.zeros([BLOCK_T, E], tl.float32)
    chosen = tl.zeros([BLOCK_T, E], tl.int32)
    LOWEST: tl.constexpr = -(2**63)
    for tile in range(tiles):
        token = (program * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        score, prob, top, total, inside = load_softmax(
            logits, token, experts, num_tokens, row_stride, num_experts
        )
        probs += prob

        # int32 that sorts as the score does: -0.0 = +0.0, NaN below -inf.
        bits = score.to(tl.int32, bitcast=True)
        bits = tl.where(score == 0.0, 0, bits)
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        order = tl.where(score == score, order, -(2**31) + 1)
        key = (order.to(tl.int64) << 32) | (E - 1 - experts[None, :]).to(tl.int64)
        key = tl.where(inside, key, LOWEST)
        tile_ids = tl.zeros([BLOCK_T, K], tl.int32)
        tile_weights = tl.zeros([BLOCK_T, K], tl.float32)
        for j in range(TOPK):
            best = tl.max(key, 1)
            key = tl.where(key == best[:, None], LOWEST, key)
            expert = E - 1 - (best & 0xFFFFFFFF).to(tl.int32)
            high = (best >> 32).to(tl.int32)
            best_score = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
            weight = tl.exp(best_score - top) / total
            tile_ids = tl.where(columns[None, :] == j, expert[:, None], tile_ids)
            tile_weights = tl.where(columns[None, :] == j, weight[:, None], tile_weights)
        chosen += (inside & (key == LOWEST)).to(tl.int32)

        if NORMALIZE:
            tile_weights = tile_weights / tl.sum(tile_weights, 1)[:, None]
        slot = token[:, None].to(tl.int64) * TOPK + columns[None, :]
        mask = (token[:, None] < num_tokens) & (columns[None, :] < TOPK)
        tl.store(ids + slot, tile_ids, mask=mask)
        tl.store(weights + slot, tile_weights, mask=mask)

    out = program * num_experts + experts
    tl.store(prob_sum + out, tl.sum(probs, 0), mask=experts < num_experts)
    tl.store(counts + out, tl.sum(chosen, 0), mask=experts < num_experts)


@triton.jit
def moe_router_reduce_kernel(partial_counts, partial_probs, counts, prob_sum, programs, num_experts,
                             BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    probs = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    chosen = tl.zeros([BLOCK_P, BLOCK_E], tl.int32)
    for base in range(0, programs, BLOCK_P):
        program = base + tl.arange(0, BLOCK_P)
        mask = (program[:, None] < programs) & (expert[None, :] < num_experts)
        address = program[:, None] * num_experts + expert[None, :]
        probs += tl.load(partial_probs + address, mask=mask, other=0.0)
        chosen += tl.load(partial_counts + address, mask=mask, other=0)
    tl.store(prob_sum + expert, tl.sum(probs, 0), mask=expert < num_experts)
    tl.store(counts + expert, tl.sum(chosen, 0), mask=expert < num_experts)


@triton.jit
def moe_router_bwd_kernel(dweights, dprob_sum, logits, ids, dlogits, num_tokens, row_stride, num_experts,
                          HAS_DPROB: tl.constexpr, NORMALIZE: tl.constexpr, TOPK: tl.constexpr,
                          BLOCK_T: tl.constexpr, E: tl.constexpr):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts = tl.arange(0, E)
    _, prob, _, _, inside = load_softmax(
        logits, token, experts, num_tokens, row_stride, num_experts
    )
    dprob = tl.zeros([BLOCK_T, E], tl.float32)
    chosen = tl.zeros([BLOCK_T, E], tl.float32)
    for j in range(TOPK):
        slot = token.to(tl.int64) * TOPK + j
        expert = tl.load(ids + slot, mask=token < num_tokens, other=-1)
        dweight = tl.load(dweights + slot, mask=token < num_tokens, other=0.0)
        hit = expert[:, None] == experts[None, :]
        dprob += tl.where(hit, dweight[:, None], 0.0)
        chosen = tl.where(hit, prob, chosen)
    if NORMALIZE:
        total = tl.where(token < num_tokens, tl.sum(chosen, 1), 1.0)
        mean = tl.sum(chosen * dprob, 1) / total
        dprob = tl.where(chosen != 0.0, (dprob - mean[:, None]) / total[:, None], 0.0)
    if HAS_DPROB:
        dprob += tl.load(dprob_sum + experts, mask=experts < num_experts, other=0.0)[None, :]
    dlogit = prob * (dprob - tl.sum(prob * dprob, 1)[:, None])
    address = token[:, None].to(tl.int64) * num_experts + experts[None, :]
    tl.store(dlogits + address, dlogit.to(dlogits.dtype.element_ty), mask=inside)


def block_sizes(num_experts: int) -> dict[str, int]:
    experts = triton.next_power_of_2(num_experts)
    return dict(BLOCK_T=max(TILE // max(experts, 64), 1), E=experts)


def moe_router(logits, topk, normalize):
    num_tokens, num_experts = logits.shape
    device = logits.device
    weights = torch.empty((num_tokens, topk), dtype=torch.float32, device=device)
    ids = torch.empty((num_tokens, topk), dtype=torch.int32, device=device)
    sizes = block_sizes(num_experts)
    tiles = triton.cdiv(num_tokens, sizes["BLOCK_T"])
    tiles_a_program = max(triton.cdiv(tiles, MAX_PROGRAMS), 1)
    programs = max(triton.cdiv(tiles, tiles_a_program), 1)
    counts = torch.empty((programs, num_experts), dtype=torch.int32, device=device)
    prob_sum = torch.empty((programs, num_experts), dtype=torch.float32, device=device)
    moe_router_fwd_kernel[(programs,)](
        logits, weights, ids, counts, prob_sum, num_tokens, logits.stride(0), num_experts, tiles_a_program,
        NORMALIZE=normalize, TOPK=topk, K=triton.next_power_of_2(topk), **sizes, num_warps=NUM_WARPS,
    )  # fmt: skip
    if programs == 1:
        return weights, ids, counts[0], prob_sum[0]
    partial_counts, counts = counts, torch.empty(num_experts, dtype=torch.int32, device=device)
    partial_probs, prob_sum = prob_sum, torch.empty(num_experts, device=device)
    moe_router_reduce_kernel[(triton.cdiv(num_experts, REDUCE_EXPERTS),)](
        partial_counts, partial_probs, counts, prob_sum, programs, num_experts, BLOCK_P=REDUCE_PROGRAMS,
        BLOCK_E=REDUCE_EXPERTS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return weights, ids, counts, prob_sum


def moe_router_bwd(dweights, dprob_sum, logits, ids, normalize):
    num_tokens, num_experts = logits.shape
    dlogits = torch.empty((num_tokens, num_experts), dtype=logits.dtype, device=logits.device)
    if num_tokens == 0:
        return dlogits
    sizes = block_sizes(num_experts)
    moe_router_bwd_kernel[(triton.cdiv(num_tokens, sizes["BLOCK_T"]),)](
        dweights, dprob_sum, logits, ids, dlogits, num_tokens, logits.stride(0), num_experts,
        HAS_DPROB=dprob_sum is not None, NORMALIZE=normalize, TOPK=ids.shape[1], **sizes, num_warps=NUM_WARPS,
    )  # fmt: skip
    return dlogits
