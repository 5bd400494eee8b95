// topk_select on the GPU: exact, deterministic, smallest position first among equals, no workspace.
//
// One block of 1024 threads per row. A score becomes an order-preserving 32-bit key (NaN lowest,
// -0.0 = +0.0); three rounds of a shared-memory histogram over 11, 11 and 10 bits find the k-th
// largest key and how many of its ties belong to the set. The last round walks the row in position
// order, 1024 columns a step: ballots and a scan over the 32 warps give every kept column its
// place, so the output is ascending and the same on every run.
//
// Shared memory: 2048 bins + 33 counters, 8.4 KB. No atomics decide an order: histogram counts
// commute. Bound by reads: the row is read four times, the first from HBM and the others from L2
// where rows in flight (132 x row bytes) fit it.
#include "common/cuda.h"
#include "topk_select/params.h"

namespace dsa {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ uint32_t order_key(float score) {
    if (score != score) return 0;
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0.0 + 0.0 is +0.0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Finds the bin, counted from the top, in which the `wanted`-th key lies. Returns the bin; `wanted`
// becomes the rank inside it. All threads get the same answer. Thread i owns bins 2i and 2i+1, from
// the top.
__device__ uint32_t find_bin(uint32_t* histogram, uint32_t* warp_sums, int num_bins, int& wanted) {
    __shared__ uint32_t found_bin;
    __shared__ int found_rank;
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int high = num_bins - 1 - 2 * thread, low = high - 1;
    const uint32_t count_high = high >= 0 ? histogram[high] : 0;
    const uint32_t count_low = low >= 0 ? histogram[low] : 0;
    uint32_t inclusive = count_high + count_low;
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, inclusive, offset);
        if (lane >= offset) inclusive += other;
    }
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    uint32_t before = inclusive - count_high - count_low;
    for (int w = 0; w < warp; ++w) before += warp_sums[w];
    const uint32_t want = wanted;
    if (before < want && want <= before + count_high) {
        found_bin = high;
        found_rank = want - before;
    } else if (before + count_high < want && want <= before + count_high + count_low) {
        found_bin = low;
        found_rank = want - before - count_high;
    }
    __syncthreads();
    wanted = found_rank;
    return found_bin;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) topk_select_kernel(const TopkSelectParams p) {
    __shared__ uint32_t histogram[kBins];
    __shared__ uint32_t warp_sums[kWarps];
    const int row = blockIdx.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int start = p.starts ? min(max(p.starts[row], 0), p.width) : 0;
    const int n = p.lengths ? min(max(p.lengths[row], 0), p.width - start) : p.width - start;
    const T* scores = static_cast<const T*>(p.scores) + row * p.row_stride + start;
    int32_t* out = p.indices + static_cast<int64_t>(row) * p.topk;

    if (n <= p.topk) {
        for (int i = thread; i < p.topk; i += kThreads) out[i] = i < n ? i : -1;
        return;
    }

    uint32_t threshold = 0;
    int ties = p.topk;   // after the rounds: how many keys equal to the threshold belong to the set
    uint32_t known = 0;  // the bits of the key that the rounds so far decided
    constexpr int kShifts[3] = {21, 10, 0};
    constexpr int kSizes[3] = {2048, 2048, 1024};
#pragma unroll
    for (int round = 0; round < 3; ++round) {
        const int shift = kShifts[round];
        for (int i = thread; i < kBins; i += kThreads) histogram[i] = 0;
        __syncthreads();
        for (int i = thread; i < n; i += kThreads) {
            const uint32_t key = order_key(to_float(scores[i]));
            if ((key & known) == threshold)
                atomicAdd(&histogram[(key >> shift) & (kSizes[round] - 1)], 1);
        }
        __syncthreads();
        threshold |= find_bin(histogram, warp_sums, kSizes[round], ties) << shift;
        known |= (kSizes[round] - 1u) << shift;
        __syncthreads();
    }

    // Ties are counted in position order; two counters travel together, 16 bits a warp suffice for
    // a step of 1024.
    int filled = 0, tied = 0;
    for (int base = 0; base < n && filled < p.topk; base += kThreads) {
        const int i = base + thread;
        const uint32_t key = i < n ? order_key(to_float(scores[i])) : 0;
        const bool above = i < n && key > threshold, equal = i < n && key == threshold;
        const uint32_t above_ballot = __ballot_sync(~0u, above),
                       equal_ballot = __ballot_sync(~0u, equal);
        if (lane == 0) warp_sums[warp] = __popc(above_ballot) << 16 | __popc(equal_ballot);
        __syncthreads();
        uint32_t before = 0, total = 0;
        for (int w = 0; w < kWarps; ++w) {
            if (w == warp) before = total;
            total += warp_sums[w];
        }
        const uint32_t lanes_below = (1u << lane) - 1;
        const int above_before = (before >> 16) + __popc(above_ballot & lanes_below);
        const int equal_before = tied + (before & 0xffff) + __popc(equal_ballot & lanes_below);
        if (above || (equal && equal_before < ties)) {
            out[filled + above_before + min(equal_before, ties) - min(tied, ties)] = i;
        }
        const int tied_after = tied + (total & 0xffff);
        filled += (total >> 16) + min(tied_after, ties) - min(tied, ties);
        tied = tied_after;
        __syncthreads();
    }
}

}  // namespace

Tensor topk_select(const Tensor& scores, int64_t topk, std::optional<Tensor> starts,
                   std::optional<Tensor> lengths) {
    const int64_t rows = scores.sizes()[0];
    Tensor indices = torch::stable::new_empty(scores, {rows, topk}, ScalarType::Int);
    if (rows == 0) return indices;
    const TopkSelectParams params{
        .scores = scores.data_ptr(),
        .starts = starts ? static_cast<const int32_t*>(starts->data_ptr()) : nullptr,
        .lengths = lengths ? static_cast<const int32_t*>(lengths->data_ptr()) : nullptr,
        .indices = static_cast<int32_t*>(indices.data_ptr()),
        .row_stride = scores.stride(0),
        .rows = static_cast<int32_t>(rows),
        .width = static_cast<int32_t>(scores.sizes()[1]),
        .topk = static_cast<int32_t>(topk),
    };
    const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
    const cudaStream_t stream = current_stream(scores);
    if (scores.scalar_type() == ScalarType::Float) {
        topk_select_kernel<float><<<rows, kThreads, 0, stream>>>(params);
    } else {
        topk_select_kernel<__nv_bfloat16><<<rows, kThreads, 0, stream>>>(params);
    }
    check_launch("topk_select_kernel");
    return indices;
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("topk_select", TORCH_BOX(&topk_select));
}

}  // namespace dsa
