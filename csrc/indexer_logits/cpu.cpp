// indexer_logits on the CPU: blocks of rows in parallel, scored by common/indexer_score.h and
// written out chunk by chunk; -inf behind the last visible key.
//
// Bound by FMAs: T * L * H * D of them.
#include "common/cpu.h"

#include "common/indexer_score.h"

namespace dsa::DSA_ISA {

template <typename Sequences>
Tensor write_logits(const Tensor& q, const Tensor& weights, const Tensor& cu_seqlens_q,
                    const Sequences& keys_of, int64_t width) {
    const int64_t tokens = q.sizes()[0];
    Tensor logits = empty_like_device(weights, {tokens, width}, ScalarType::Float);
    float* out = mutable_data<float>(logits);
    const auto blocks = row_blocks(cu_seqlens_q, tokens, width, keys_of);
    for_each_block<IndexerScorer>(blocks, [&](const RowBlock& block, IndexerScorer& scorer) {
        scorer.score(q, weights, keys_of(block.sequence), block, 0,
                     [&](int64_t t, int64_t base, const float* scores, int64_t n) {
                         std::memcpy(out + t * width + base, scores, n * sizeof(float));
                     });
        for (int64_t t = block.begin; t < block.end; ++t)
            std::fill(out + t * width + block.visible(t), out + (t + 1) * width, -kInf);
    });
    return logits;
}

Tensor indexer_logits(const Tensor& q, const Tensor& weights, const Tensor& k,
                      const Tensor& k_scale, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                      int64_t max_seqlen_k) {
    return write_logits(q, weights, cu_seqlens_q, PackedSequences(k, k_scale, cu_seqlens_k),
                        max_seqlen_k);
}

Tensor indexer_logits_paged(const Tensor& q, const Tensor& weights, const Tensor& index_cache,
                            const Tensor& page_table, const Tensor& lengths,
                            const Tensor& cu_seqlens_q) {
    return write_logits(q, weights, cu_seqlens_q, PagedSequences(index_cache, page_table, lengths),
                        page_table.sizes()[1] * kPageSize);
}

DSA_REGISTER_CPU(m) {
    m.impl("indexer_logits", TORCH_BOX(&indexer_logits));
    m.impl("indexer_logits_paged", TORCH_BOX(&indexer_logits_paged));
}

}  // namespace dsa::DSA_ISA
