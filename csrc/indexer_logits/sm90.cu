// indexer_logits on Hopper, the launches; the kernels are in sm90.cuh and chunks.cuh.
#include <algorithm>

#include "common/indexer_launch.h"
#include "indexer_logits/chunks.cuh"
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
    if (p.chunk != nullptr) {
        launch_after(stream, indexer_logits_kernel<Shape>, num_multiprocessors(), kIndexerThreads,
                     kSharedBytes, 1, maps, p);
        return;
    }
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

// The most that plan_chunks_kernel counts: no more tokens than there are keys see any, each of them
// at most `width`; a block of tokens counts its last one's, and at the ends of a sequence that of
// the longest. (Half as many pairs, if no sequence were longer than `width`.)
template <class Shape>
int most_chunks(const ChunkPlanParams& p) {
    const double tokens = p.tokens - p.first_token, width = p.width, sequences = p.num_sequences;
    const double pairs = std::min<double>(tokens, p.num_keys) * width;
    const double blocks = tokens / Shape::kTokens + 1, runs = blocks + sequences;
    const double of_pairs = pairs / Shape::kTokens + blocks * Shape::kTokens / 2;
    const double rounds = (of_pairs + 2 * sequences * width) / Shape::kRoundKeys +
                          runs * (1 + kStartRounds) + blocks * p.block_rounds;
    return static_cast<int>((rounds + sequences * p.most_rounds) / (p.room - p.most_rounds)) + 3;
}

}  // namespace

int plan_chunks(ChunkPlanParams& p, int32_t* chunks, int64_t heads, int64_t dim,
                cudaStream_t stream) {
    const auto run = [&]<class Shape>() {
        p.tokens =
            std::min(p.tokens - p.first_token, kMostPlannedBlocks * Shape::kTokens) + p.first_token;
        p.token_blocks = (p.tokens - p.first_token + Shape::kTokens - 1) / Shape::kTokens;
        p.room = static_cast<int>(kChunkBytes / int64_t{sizeof(float)} / Shape::kTokens /
                                  Shape::kRoundKeys);
        p.block_rounds = (p.room + kMostTokenBlocks - 1) / kMostTokenBlocks;
        p.most_rounds =
            p.block_rounds + kStartRounds + (p.width + Shape::kRoundKeys - 1) / Shape::kRoundKeys;
        p.most_chunks = most_chunks<Shape>(p);
        if (chunks == nullptr) return;
        p.chunks = chunks;
        constexpr int kSharedBytes = sizeof(RoundCounts<kMostPlannedBlocks>);
        allow_shared_memory(plan_chunks_kernel<Shape>, kSharedBytes);
        launch_after(stream, plan_chunks_kernel<Shape>, 1, kIndexerThreads, kSharedBytes, 1, p);
    };
    with_indexer_shape<false, Division::kByTokens>(heads, dim, run);
    return p.most_chunks;
}

void score_tokens(IndexerLogitsParams& p, const KeyMaps& maps, bool paged, int64_t heads,
                  int64_t dim, cudaStream_t stream) {
    if (p.tokens == p.first_token || p.width == 0) return;
    const bool few = has_few_tokens(p);
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
