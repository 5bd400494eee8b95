// What the launches of indexer_logits and indexer_topk share: parameters and tensor maps from
// tensors, and the shapes that are compiled.
#pragma once

#include "common/indexer_tile.cuh"
#include "common/tensor_map.h"

namespace dsa {

inline const int32_t* ints(const Tensor& tensor) {
    return static_cast<const int32_t*>(tensor.data_ptr());
}

inline void set_queries(IndexerScoreParams& p, const Tensor& q, const Tensor& weights,
                        const Tensor& cu_seqlens_q) {
    p.q = static_cast<const uint8_t*>(q.data_ptr());
    p.weights = static_cast<const float*>(weights.data_ptr());
    p.cu_seqlens_q = ints(cu_seqlens_q);
    p.q_stride = q.stride(0);
    p.weight_stride = weights.stride(0);
    p.tokens = static_cast<int32_t>(q.sizes()[0]);
    p.num_sequences = static_cast<int32_t>(cu_seqlens_q.sizes()[0] - 1);
}

// Sets what p says of the keys, and returns their tensor maps.
inline KeyMaps packed_keys(IndexerScoreParams& p, const Tensor& k, const Tensor& k_scale,
                           const Tensor& cu_seqlens_k, int64_t max_seqlen_k) {
    p.key_scale = static_cast<const float*>(k_scale.data_ptr());
    p.key_bounds = ints(cu_seqlens_k);
    p.num_keys = static_cast<int32_t>(k.sizes()[0]);
    p.width = static_cast<int32_t>(max_seqlen_k);
    const auto dim = static_cast<cuuint64_t>(k.sizes()[1]);
    const cuuint64_t sizes[] = {dim, static_cast<cuuint64_t>(p.num_keys)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(k.stride(0))};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(dim), kTileKeys};
    KeyMaps maps{byte_tensor_map(k.data_ptr(), 2, sizes, strides, box)};
    // A tensor map begins on 16 bytes.
    const auto address = reinterpret_cast<uintptr_t>(p.key_scale);
    maps.scale_offset = static_cast<int>(address % 16 / sizeof(float));
    maps.scales = float_tensor_map(p.key_scale - maps.scale_offset,
                                   static_cast<cuuint64_t>(p.num_keys + int64_t{maps.scale_offset}),
                                   kLoadedScales);
    return maps;
}

inline KeyMaps paged_keys(IndexerScoreParams& p, const Tensor& index_cache,
                          const Tensor& page_table, const Tensor& lengths, int64_t dim) {
    p.key_scale = static_cast<const float*>(index_cache.data_ptr());
    p.key_bounds = ints(lengths);
    p.page_table = ints(page_table);
    p.table_stride = page_table.stride(0);
    p.num_pages = static_cast<int32_t>(index_cache.sizes()[0]);
    p.width = static_cast<int32_t>(page_table.sizes()[1] * kKeys);
    const auto row = static_cast<cuuint64_t>(dim), page = kKeys * (row + 4);
    const cuuint64_t sizes[] = {row, kKeys, static_cast<cuuint64_t>(p.num_pages)};
    const cuuint64_t strides[] = {row, page};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(dim), kKeys, 1};
    return {byte_tensor_map(index_cache.data_ptr(), 3, sizes, strides, box)};
}

// Calls run.operator()<IndexerShape<heads, dim, kPaged, kDivision>>(); the doors decline others.
template <bool kPaged, Division kDivision, class Run>
void with_indexer_shape(int64_t heads, int64_t dim, const Run& run) {
    const auto with_shape = [&]<int kHeads, int kDim>() {
        run.template operator()<IndexerShape<kHeads, kDim, kPaged, kDivision>>();
    };
    const auto with_heads = [&]<int kDim>() {
        if (heads == 4) return with_shape.template operator()<4, kDim>();
        if (heads == 8) return with_shape.template operator()<8, kDim>();
        if (heads == 16) return with_shape.template operator()<16, kDim>();
        if (heads == 32) return with_shape.template operator()<32, kDim>();
        if (heads == 64) return with_shape.template operator()<64, kDim>();
        STD_TORCH_CHECK(false, "q: expected 4, 8, 16, 32 or 64 heads, got ", heads);
    };
    if (dim == 64) return with_heads.template operator()<64>();
    if (dim == 128) return with_heads.template operator()<128>();
    STD_TORCH_CHECK(false, "q: expected a head dimension of 64 or 128, got ", dim);
}

}  // namespace dsa
