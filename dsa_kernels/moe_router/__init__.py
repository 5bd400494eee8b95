"""moe_router: top-k routing of tokens to experts, the map from its ids to expert-major rows, the balancing loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checks import FLOATS, INT32, Arguments
from ..dispatch import CPU, REFERENCE, TRITON, Implementation, register
from .autograd import backward, setup_context

MAX_EXPERTS = 1024


def moe_router(
    logits: torch.Tensor, topk: int, *, normalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routes every token to its `topk` best experts.

    p = softmax(logits[t]) over all experts; ids[t] = the topk experts by (logit descending, expert ascending), NaN
    below everything; weights[t, j] = p[ids[t, j]], divided by their sum over j if `normalize`.

    Args:
        logits: [T, E] float32 or bfloat16, last dimension contiguous; E <= 1024.
        topk: K, 1 to E; neither K nor E need be a power of two.
        normalize: whether the weights of a token sum to 1 (`norm_topk_prob`).

    Returns:
        weights: [T, K] float32, in the order of ids (Hugging Face rounds them to the model's dtype; this does not).
        ids: [T, K] int32, best first.
        counts: [E] int32, how many tokens chose each expert.
        prob_sum: [E] float32, sum over t of p[t, e]; with counts, what `load_balancing_loss` needs.

        weights and prob_sum are differentiable with respect to logits.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, E > 1024, or topk outside [1, E].

    The ids are exact; softmax and sums in float32. A row that holds NaN or +inf, or only -inf, has NaN weights and
    probabilities, as torch.softmax has, and still its exact ids. Forward and backward are bitwise deterministic (sums
    over tokens in a fixed order, no float atomics); no host sync; CUDA-graph safe; T = 0 gives empty results and zero
    counts and sums; allocates the results and, in Triton, at most 1024 x 2E values of partial sums.
    """
    return _op(logits, topk, normalize)


@dataclass(frozen=True)
class RoutingMap:
    """Where each (token, slot) goes among rows sorted by expert.

    Attributes:
        offsets: [E+1] int32; the rows of expert e are [offsets[e], offsets[e+1]), offsets[0] = 0.
        row_token: [T*K] int32; the token of each row, -1 for the rows from offsets[E] on.
        slot_row: [T, K] int32; the row of each slot, -1 for dropped slots.
    """

    offsets: torch.Tensor
    row_token: torch.Tensor
    slot_row: torch.Tensor


def routing_map(ids: torch.Tensor, num_experts: int) -> RoutingMap:
    """Sorts the slots of a routing by expert.

    Rows are the slots t * K + j in order of (ids[t, j], t * K + j): expert-major, and within an expert in the order of
    the tokens. A slot whose id is -1, or anything else outside [0, num_experts), has no row.

    Args:
        ids: [T, K] int32 expert of each slot, last dimension contiguous. A token may name an expert twice.
        num_experts: E, 1 to 1024.

    Returns:
        RoutingMap(offsets [E+1], row_token [T*K], slot_row [T, K]), all int32, contiguous, on the device of `ids`.

    Raises:
        ValueError: an argument of the wrong dtype, shape, stride or device, num_experts out of range, or T*K > 2^30.

    Exact; bitwise deterministic; no host sync; CUDA-graph safe; T = 0 gives offsets of zeros and empty maps; allocates
    the result, and on large inputs a histogram of at most 128 x E int32.
    """
    return RoutingMap(*_map_op(ids, num_experts))


def load_balancing_loss(
    counts: torch.Tensor,
    prob_sum: torch.Tensor,
    *,
    num_tokens: int,
    topk: int,
    coefficient: float = 1.0,
    scaling: str = "switch",
) -> torch.Tensor:
    """The auxiliary loss that evens out the load of the experts, in plain torch.

    loss = coefficient * E * sum_e f_e P_e with P_e = prob_sum[e] / num_tokens and, by `scaling`,

    - "switch": f_e = counts[e] / (num_tokens * topk): 1 x coefficient at perfect balance (Switch Transformer, Megatron);
    - "hf": f_e = counts[e] / num_tokens: topk x coefficient at perfect balance (`load_balancing_loss_func` of Hugging
      Face, which the `router_aux_loss_coef` of published configurations assumes). Hugging Face pools the tokens of all
      layers before the product: for its value, sum counts and prob_sum over the layers and pass layers * tokens.

    Args:
        counts, prob_sum: [E], of `moe_router`. For a global-batch loss the caller all-reduces counts first.
        num_tokens: T, the tokens behind counts and prob_sum; 0 gives a loss of 0.
        topk: K.
        coefficient: factor of the whole.
        scaling: "switch" or "hf".

    Returns:
        the loss, a scalar of prob_sum's dtype, differentiable with respect to prob_sum (counts are constants).

    Raises:
        ValueError: a wrong shape, a negative num_tokens, topk < 1, or an unknown scaling.

    Source: Fedus et al., Switch Transformers, equation 4. Deterministic on the CPU (on CUDA as torch.dot is); no host
    sync; CUDA-graph safe; allocates a few vectors of E.
    """
    a = Arguments("load_balancing_loss")
    a.tensor("counts", counts, "E", (torch.int32, torch.int64, torch.float32))
    a.tensor("prob_sum", prob_sum, "E", (torch.float32, torch.float64))
    a.integer("num_tokens", num_tokens, 0)
    a.integer("topk", topk, 1)
    a.number("coefficient", coefficient, positive=False)
    a.one_of("scaling", scaling, ("switch", "hf"))
    tokens = max(num_tokens, 1)
    slots = tokens * topk if scaling == "switch" else tokens
    fraction = counts.detach().to(prob_sum.dtype) / slots
    return coefficient * counts.numel() * (fraction * (prob_sum / tokens)).sum()


def _check(logits: torch.Tensor, topk: int, normalize: bool) -> None:
    a = Arguments("moe_router")
    a.tensor("logits", logits, "T E", FLOATS)
    a.require(1 <= a["E"] <= MAX_EXPERTS, "logits", f"1 to {MAX_EXPERTS} experts", a["E"])
    a.integer("topk", topk, 1, a["E"])
    a.one_of("normalize", normalize, (True, False))


def _fake(
    logits: torch.Tensor, topk: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, num_experts = logits.shape
    return (
        logits.new_empty((tokens, topk), dtype=torch.float32),
        logits.new_empty((tokens, topk), dtype=torch.int32),
        logits.new_empty(num_experts, dtype=torch.int32),
        logits.new_empty(num_experts, dtype=torch.float32),
    )


def _check_map(ids: torch.Tensor, num_experts: int) -> None:
    a = Arguments("routing_map")
    a.tensor("ids", ids, "T K", INT32)
    a.integer("num_experts", num_experts, 1, MAX_EXPERTS)
    a.require(a["T"] * a["K"] <= 2**30, "ids", "at most 2^30 slots", list(ids.shape))


def _fake_map(
    ids: torch.Tensor, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    slots = ids.shape[0] * ids.shape[1]
    return ids.new_empty(num_experts + 1), ids.new_empty(slots), ids.new_empty(ids.shape)


_op = register(
    "moe_router",
    room=__name__,
    check=_check,
    fake=_fake,
    table=[TRITON, CPU, REFERENCE],
    setup_context=setup_context,
    backward=backward,
)

_map_op = register(
    "routing_map",
    room=__name__,
    check=_check_map,
    fake=_fake_map,
    table=[Implementation("triton", "triton_map"), CPU, REFERENCE],
)
