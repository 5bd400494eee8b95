// indexer_prepare on Hopper, the launches; the kernel is in sm90.cuh.
#include <algorithm>
#include <bit>
#include <tuple>

#include "common/cuda.h"
#include "indexer_prepare/sm90.cuh"

namespace dsa {
namespace {

constexpr int kMostRounds = 4;    // of a block of queries
constexpr int kFewestBlocks = 3;  // of an SM, for more than one round

template <typename T, int kDim, int kOwn>
void launch(IndexerPrepareParams& p, cudaStream_t stream) {
    constexpr int kVectors = Share<T, kDim, kOwn>::kVectors;
    // As many as leave every SM some blocks, and as the block's table has room for their tokens.
    const int rounds = p.queries / (kVectors * kFewestBlocks * num_multiprocessors());
    const int most = p.heads < 2 * kMostRounds ? 1 : kMostRounds;
    p.block_queries = kVectors * std::clamp(rounds, 1, most);
    p.query_blocks = (p.queries + p.block_queries - 1) / p.block_queries;
    launch_after(stream, indexer_prepare_kernel<T, kDim, kOwn>,
                 p.query_blocks + (p.tokens + kVectors - 1) / kVectors, kPrepareThreads, 0, 1, p);
}

// Few vectors, less than 16 warps an SM, have four times as many lanes each.
template <typename T, int kDim>
void launch(IndexerPrepareParams& p, cudaStream_t stream) {
    const int64_t lanes = int64_t{p.queries} * kDim / 8;
    lanes <= 512 * num_multiprocessors() ? launch<T, kDim, 8>(p, stream)
                                         : launch<T, kDim, 32>(p, stream);
}

NormWeight norm_weight(const Tensor& x) {
    return {x.data_ptr(), x.scalar_type() == ScalarType::Float};
}

using Prepared = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Prepared prepare(const Tensor& q, const Tensor& k, const Tensor& gate, const Tensor& q_weight,
                 const Tensor& k_weight, const Tensor& k_bias, const Tensor& cos, const Tensor& sin,
                 double eps, const Tensor* cache, const Tensor* slots) {
    const int64_t tokens = q.sizes()[0], heads = q.sizes()[1], dim = q.sizes()[2];
    Prepared prepared{
        torch::stable::new_empty(q, {tokens, heads, dim}, ScalarType::Float8_e4m3fn),
        torch::stable::new_empty(q, {tokens, heads}, ScalarType::Float),
        torch::stable::new_empty(q, {tokens, dim}, ScalarType::Float8_e4m3fn),
        torch::stable::new_empty(q, {tokens}, ScalarType::Float),
    };
    if (tokens == 0) return prepared;
    const auto& [q_codes, weights, k_codes, k_scale] = prepared;
    // Division by heads <= 2^n, exact for what is below 2^31.
    const int shift = 31 + std::bit_width(static_cast<uint64_t>(heads > 0 ? heads - 1 : 0));
    const int64_t factor = heads > 0 ? ((int64_t{1} << shift) + heads - 1) / heads : 0;
    const bool is_float = q.scalar_type() == ScalarType::Float;
    const int64_t size = is_float ? 4 : 2;  // of an element
    IndexerPrepareParams p{
        .q = q.data_ptr(),
        .k = k.data_ptr(),
        .gate = gate.data_ptr(),
        .q_weight = norm_weight(q_weight),
        .k_weight = norm_weight(k_weight),
        .k_bias = norm_weight(k_bias),
        .cos = static_cast<const float*>(cos.data_ptr()),
        .sin = static_cast<const float*>(sin.data_ptr()),
        .q_codes = static_cast<uint8_t*>(q_codes.data_ptr()),
        .weights = static_cast<float*>(weights.data_ptr()),
        .k_codes = static_cast<uint8_t*>(k_codes.data_ptr()),
        .k_scale = static_cast<float*>(k_scale.data_ptr()),
        .cache = cache ? static_cast<uint8_t*>(cache->data_ptr()) : nullptr,
        .slots = slots ? static_cast<const int64_t*>(slots->data_ptr()) : nullptr,
        .cache_slots = cache ? 64 * cache->sizes()[0] : 0,
        .page_stride = cache ? cache->stride(0) : 0,
        .q_stride = q.stride(0) * size,
        .q_head_stride = q.stride(1) * size,
        .k_stride = k.stride(0) * size,
        .gate_stride = gate.stride(0) * size,
        .cos_stride = cos.stride(0) * 4,
        .sin_stride = sin.stride(0) * 4,
        .tokens = static_cast<uint32_t>(tokens),
        .heads = static_cast<uint32_t>(heads),
        .queries = static_cast<uint32_t>(tokens * heads),
        .token_factor = static_cast<uint32_t>(factor),
        .token_shift = shift,
        .eps = static_cast<float>(eps),
    };
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const auto with_dim = [&]<typename T>() {
        if (dim == 32) return launch<T, 32>(p, current_stream(q));
        if (dim == 64) return launch<T, 64>(p, current_stream(q));
        launch<T, 128>(p, current_stream(q));
    };
    if (is_float) {
        with_dim.template operator()<float>();
    } else {
        with_dim.template operator()<bf16>();
    }
    return prepared;
}

}  // namespace

Prepared indexer_prepare(const Tensor& q, const Tensor& k, const Tensor& gate,
                         const Tensor& q_weight, const Tensor& k_weight, const Tensor& k_bias,
                         const Tensor& cos, const Tensor& sin, double eps) {
    return prepare(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, nullptr, nullptr);
}

Prepared indexer_prepare_cached(const Tensor& q, const Tensor& k, const Tensor& gate,
                                const Tensor& q_weight, const Tensor& k_weight,
                                const Tensor& k_bias, const Tensor& cos, const Tensor& sin,
                                double eps, const Tensor& index_cache, const Tensor& slots) {
    return prepare(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, &index_cache, &slots);
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("indexer_prepare", TORCH_BOX(&indexer_prepare));
    m.impl("indexer_prepare_cached", TORCH_BOX(&indexer_prepare_cached));
}

}  // namespace dsa
