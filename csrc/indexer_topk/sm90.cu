// indexer_topk on Hopper, the launches; the kernel is in sm90.cuh.
#include <algorithm>

#include "common/indexer_launch.h"
#include "indexer_topk/sm90.cuh"

namespace dsa {
namespace {

constexpr int64_t kWorkspaceBytes = 60 << 20;
constexpr int kLargestCapacity = 8192;  // of a list

template <class Shape>
void launch(IndexerTopkParams& p, const CUtensorMap& map, const Tensor& like, cudaStream_t stream) {
    constexpr int kStorageBytes = sizeof(TopkStorage<Shape>) + 1024;
    p.token_blocks = (p.tokens + Shape::kTokens - 1) / Shape::kTokens;
    const int blocks = std::min(p.token_blocks, num_multiprocessors());
    const int64_t in_workspace = kWorkspaceBytes / (8 * Shape::kTokens * blocks);
    const int64_t in_shared = (kMostSharedBytes - kStorageBytes) / (8 * kWarpgroups);
    p.capacity = static_cast<int32_t>(
        std::min<int64_t>({in_workspace, in_shared, kLargestCapacity}) / 4 * 4);
    p.front = (p.topk + 3) / 4 * 4;
    STD_TORCH_CHECK(p.capacity - p.front >= kScoreWarps * kFewestRounds * kWarpKeys,
                    "topk: no room for the candidates of ", p.topk);

    const int64_t entries = int64_t{blocks} * Shape::kTokens * p.capacity;
    Tensor workspace = torch::stable::new_empty(like, {2 * entries + 1}, ScalarType::Int);
    p.candidates = static_cast<Candidate*>(workspace.data_ptr());
    p.next_block = reinterpret_cast<int32_t*>(p.candidates + entries);
    const cudaError_t error = cudaMemsetAsync(p.next_block, 0, sizeof(int32_t), stream);
    STD_TORCH_CHECK(error == cudaSuccess, "cudaMemsetAsync: ", cudaGetErrorString(error));
    const int shared = kStorageBytes + 8 * kWarpgroups * p.capacity;
    allow_shared_memory(indexer_topk_kernel<Shape>, shared);
    indexer_topk_kernel<Shape><<<blocks, kIndexerThreads, shared, stream>>>(map, p);
    check_launch("indexer_topk_kernel");
}

template <bool kPaged>
Tensor select(IndexerTopkParams& p, const CUtensorMap& map, const Tensor& q, int64_t topk) {
    Tensor indices = torch::stable::new_empty(q, {q.sizes()[0], topk}, ScalarType::Int);
    if (p.tokens == 0) return indices;
    p.indices = static_cast<int32_t*>(indices.data_ptr());
    p.topk = static_cast<int32_t>(topk);
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const cudaStream_t stream = current_stream(q);
    with_indexer_shape<kPaged>(q.sizes()[1], q.sizes()[2],
                               [&]<class Shape>() { launch<Shape>(p, map, q, stream); });
    return indices;
}

}  // namespace

Tensor indexer_topk(const Tensor& q, const Tensor& weights, const Tensor& k, const Tensor& k_scale,
                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t topk,
                    int64_t max_seqlen_k) {
    IndexerTopkParams p{};
    set_queries(p, q, weights, cu_seqlens_q);
    const CUtensorMap map = packed_keys(p, k, k_scale, cu_seqlens_k, max_seqlen_k);
    return select<false>(p, map, q, topk);
}

Tensor indexer_topk_paged(const Tensor& q, const Tensor& weights, const Tensor& index_cache,
                          const Tensor& page_table, const Tensor& lengths,
                          const Tensor& cu_seqlens_q, int64_t topk) {
    IndexerTopkParams p{};
    set_queries(p, q, weights, cu_seqlens_q);
    const CUtensorMap map = paged_keys(p, index_cache, page_table, lengths, q.sizes()[2]);
    return select<true>(p, map, q, topk);
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("indexer_topk", TORCH_BOX(&indexer_topk));
    m.impl("indexer_topk_paged", TORCH_BOX(&indexer_topk_paged));
}

}  // namespace dsa
