// The schema of every op of `torch.ops.dsa_kernels`, on one screen.
//
// Each schema is defined in up to three namespaces: `dsa_kernels` (the public op; its kernel, in
// Python, checks the arguments and picks an implementation), `dsa_kernels_cpu` and
// `dsa_kernels_cuda` (the compiled implementations, for the ops that have one in that library). The
// contract of an op is the docstring of dsa_kernels/<room>/__init__.py.
//
// T queries, L keys, H query heads, G KV heads, D head dim, K selected, E experts, F expert width,
// S sequences, B batch.
#pragma once

namespace dsa {

// clang-format off
inline constexpr const char* kSchemas[] = {
    "norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps) -> (Tensor, Tensor)",
    "norm_rope_bwd(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, float eps, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)",

    "indexer_prepare(Tensor q, Tensor k, Tensor gate, Tensor q_weight, Tensor k_weight, Tensor k_bias, Tensor cos, Tensor sin, float eps) -> (Tensor q_fp8, Tensor weights, Tensor k_fp8, Tensor k_scale)",
    "indexer_prepare_cached(Tensor q, Tensor k, Tensor gate, Tensor q_weight, Tensor k_weight, Tensor k_bias, Tensor cos, Tensor sin, float eps, Tensor(a!) index_cache, Tensor slots) -> (Tensor q_fp8, Tensor weights, Tensor k_fp8, Tensor k_scale)",

    "indexer_logits(Tensor q, Tensor weights, Tensor k, Tensor k_scale, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_k) -> Tensor",
    "indexer_logits_paged(Tensor q, Tensor weights, Tensor index_cache, Tensor page_table, Tensor lengths, Tensor cu_seqlens_q) -> Tensor",
    "topk_select(Tensor scores, int topk, Tensor? starts, Tensor? lengths) -> Tensor",
    "indexer_topk(Tensor q, Tensor weights, Tensor k, Tensor k_scale, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int topk, SymInt max_seqlen_k) -> Tensor",
    "indexer_topk_paged(Tensor q, Tensor weights, Tensor index_cache, Tensor page_table, Tensor lengths, Tensor cu_seqlens_q, int topk) -> Tensor",

    "sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, bool deterministic) -> (Tensor out, Tensor lse)",
    "sparse_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor indices, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",
    "build_union(Tensor indices, Tensor tiles, Tensor(a!) keys, Tensor(b!) masks, Tensor(c!) counts, SymInt num_keys, int list_block) -> ()",
    "sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor indices, Tensor page_table, Tensor lengths, Tensor cu_seqlens_q, float softmax_scale) -> (Tensor out, Tensor lse)",
    "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, float softmax_scale, bool deterministic) -> (Tensor out, Tensor lse)",
    "varlen_attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, bool causal, float softmax_scale, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)",

    "indexer_loss(Tensor index_q, Tensor index_k, Tensor index_weights, Tensor q, Tensor k, Tensor lse, Tensor? indices, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, bool deterministic) -> (Tensor loss, Tensor index_lse, Tensor mass)",
    "indexer_loss_bwd(Tensor dloss, Tensor index_q, Tensor index_k, Tensor index_weights, Tensor q, Tensor k, Tensor lse, Tensor index_lse, Tensor mass, Tensor? indices, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, bool deterministic) -> (Tensor, Tensor, Tensor)",

    "write_kv_cache(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots) -> ()",
    "write_index_cache(Tensor k, Tensor k_scale, Tensor(a!) index_cache, Tensor slots) -> ()",
    "read_kv_cache(Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor cu_seqlens, SymInt total) -> (Tensor k, Tensor v)",
    "read_index_cache(Tensor index_cache, Tensor page_table, Tensor cu_seqlens, SymInt total) -> (Tensor k, Tensor k_scale)",

    "moe_router(Tensor logits, int topk, bool normalize) -> (Tensor weights, Tensor ids, Tensor counts, Tensor prob_sum)",
    "moe_router_bwd(Tensor dweights, Tensor? dprob_sum, Tensor logits, Tensor ids, bool normalize) -> Tensor",
    "routing_map(Tensor ids, int num_experts) -> (Tensor offsets, Tensor row_token, Tensor slot_row)",
    "grouped_gemm(Tensor a, Tensor b, Tensor offsets) -> Tensor",
    "grouped_gemm_wgrad(Tensor dc, Tensor a, Tensor offsets) -> Tensor",
    "grouped_gemm_fp8(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor offsets) -> Tensor",
    "moe_mlp(Tensor x, Tensor w13, Tensor w2, Tensor weights, Tensor offsets, Tensor row_token, Tensor slot_row, bool save_h) -> (Tensor out, Tensor h)",
    "moe_mlp_bwd(Tensor dout, Tensor x, Tensor h, Tensor w13, Tensor w2, Tensor weights, Tensor offsets, Tensor row_token, Tensor slot_row) -> (Tensor dx, Tensor dw13, Tensor dw2, Tensor dweights)",
};
// clang-format on

}  // namespace dsa
