// indexer_topk on the CPU: blocks of rows in parallel; each row keeps its candidates (at most 4 K
// of them, common/topk_row.h) while the scores of common/indexer_score.h stream past, so no thread
// holds a row of scores. Rows that see at most K keys take all of them, unscored.
//
// Bound by FMAs: T * L * H * D of them; the selection is about a tenth of the time at 16 x 64.
#include "common/cpu.h"

#include "common/indexer_score.h"
#include "common/topk_row.h"

namespace dsa::DSA_ISA {

struct Selector {
    IndexerScorer scorer;
    TopkRow rows[kMaxRows];
};

template <typename Sequences>
Tensor select_keys(const Tensor& q, const Tensor& weights, const Tensor& cu_seqlens_q,
                   const Sequences& keys_of, int64_t width, int64_t topk) {
    const int64_t tokens = q.sizes()[0];
    Tensor indices = empty_like_device(q, {tokens, topk}, ScalarType::Int);
    int32_t* out = mutable_data<int32_t>(indices);
    const auto blocks = row_blocks(cu_seqlens_q, tokens, width, keys_of);
    for_each_block<Selector>(blocks, [&](const RowBlock& block, Selector& selector) {
        for (int64_t t = block.begin; t < block.end; ++t)
            selector.rows[t - block.begin].begin(topk);
        selector.scorer.score(q, weights, keys_of(block.sequence), block, topk,
                              [&](int64_t t, int64_t base, const float* scores, int64_t n) {
                                  selector.rows[t - block.begin].feed(scores, base, n);
                              });
        for (int64_t t = block.begin; t < block.end; ++t) {
            const int64_t n = block.visible(t);
            if (n <= topk) {
                select_all(n, topk, out + t * topk);
            } else {
                selector.rows[t - block.begin].finish(out + t * topk);
            }
        }
    });
    return indices;
}

Tensor indexer_topk(const Tensor& q, const Tensor& weights, const Tensor& k, const Tensor& k_scale,
                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t topk,
                    int64_t max_seqlen_k) {
    return select_keys(q, weights, cu_seqlens_q, PackedSequences(k, k_scale, cu_seqlens_k),
                       max_seqlen_k, topk);
}

Tensor indexer_topk_paged(const Tensor& q, const Tensor& weights, const Tensor& index_cache,
                          const Tensor& page_table, const Tensor& lengths,
                          const Tensor& cu_seqlens_q, int64_t topk) {
    return select_keys(q, weights, cu_seqlens_q, PagedSequences(index_cache, page_table, lengths),
                       page_table.sizes()[1] * kPageSize, topk);
}

DSA_REGISTER_CPU(m) {
    m.impl("indexer_topk", TORCH_BOX(&indexer_topk));
    m.impl("indexer_topk_paged", TORCH_BOX(&indexer_topk_paged));
}

}  // namespace dsa::DSA_ISA
