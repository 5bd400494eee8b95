// indexer_logits on Hopper, the launches; the kernel is in sm90.cuh.
#include <algorithm>

#include "common/indexer_launch.h"
#include "indexer_logits/launch.h"
#include "indexer_logits/sm90.cuh"

namespace dsa {
namespace {

template <class Shape>
void launch(IndexerLogitsParams p, const KeyMaps& maps, cudaStream_t stream) {
    constexpr int kSharedBytes = sizeof(LogitsStorage<Shape>) + 1024;
    static_assert(kSharedBytes <= kMostSharedBytes);
    allow_shared_memory(indexer_logits_kernel<Shape>, kSharedBytes);
    // Of a block of tokens at most; counted in 32 bits.
    const int64_t rounds = int64_t{Shape::kTokens} *
                           ((p.width + Shape::kRoundKeys - 1) / Shape::kRoundKeys + kStartRounds);
    const int64_t most_blocks = std::min<int64_t>(kMostTokenBlocks, INT32_MAX / rounds);
    const int32_t end = p.tokens, most = static_cast<int32_t>(most_blocks) * Shape::kTokens;
    while (p.first_token < end) {
        const int32_t tokens = std::min(end - p.first_token, most);
        p.tokens = p.first_token + tokens;
        p.token_blocks = (tokens + Shape::kTokens - 1) / Shape::kTokens;
        const int64_t blocks = std::min<int64_t>(num_multiprocessors(), p.token_blocks * rounds);
        launch_after(stream, indexer_logits_kernel<Shape>, static_cast<int>(blocks),
                     kIndexerThreads, kSharedBytes, 1, maps, p);
        p.first_token = p.tokens;
        p.out += tokens * p.out_stride;
        if (p.visible != nullptr) p.visible += tokens;
    }
}

Tensor logits(IndexerLogitsParams& p, const KeyMaps& maps, bool paged, const Tensor& q) {
    Tensor out = torch::stable::new_empty(q, {q.sizes()[0], p.width}, ScalarType::Float);
    p.out = static_cast<float*>(out.data_ptr());
    p.out_stride = p.width;
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    score_tokens(p, maps, paged, q.sizes()[1], q.sizes()[2], current_stream(q));
    return out;
}

}  // namespace

void score_tokens(IndexerLogitsParams& p, const KeyMaps& maps, bool paged, int64_t heads,
                  int64_t dim, cudaStream_t stream) {
    if (p.tokens == p.first_token || p.width == 0) return;
    const bool few = p.tokens <= int64_t{4} * p.num_sequences;  // each, as when decoding
    const auto run = [&]<class Shape>() { launch<Shape>(p, maps, stream); };
    if (paged) {
        few ? with_indexer_shape<true, Division::kFewTokens>(heads, dim, run)
            : with_indexer_shape<true, Division::kByTokens>(heads, dim, run);
    } else {
        few ? with_indexer_shape<false, Division::kFewTokens>(heads, dim, run)
            : with_indexer_shape<false, Division::kByTokens>(heads, dim, run);
    }
}

Tensor indexer_logits(const Tensor& q, const Tensor& weights, const Tensor& k,
                      const Tensor& k_scale, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                      int64_t max_seqlen_k) {
    IndexerLogitsParams p{};
    set_queries(p, q, weights, cu_seqlens_q);
    const KeyMaps maps = packed_keys(p, k, k_scale, cu_seqlens_k, max_seqlen_k);
    return logits(p, maps, false, q);
}

Tensor indexer_logits_paged(const Tensor& q, const Tensor& weights, const Tensor& index_cache,
                            const Tensor& page_table, const Tensor& lengths,
                            const Tensor& cu_seqlens_q) {
    IndexerLogitsParams p{};
    set_queries(p, q, weights, cu_seqlens_q);
    const KeyMaps maps = paged_keys(p, index_cache, page_table, lengths, q.sizes()[2]);
    return logits(p, maps, true, q);
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("indexer_logits", TORCH_BOX(&indexer_logits));
    m.impl("indexer_logits_paged", TORCH_BOX(&indexer_logits_paged));
}

}  // namespace dsa
