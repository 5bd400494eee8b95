// topk_select on the GPU: exact, deterministic, smallest position first among equals, no workspace.
//
// One block of 512 threads a row reads it once. Each warp takes 256 columns of every 4096, loaded
// one step ahead; what beats the bound goes to the warp's own segment of the list of candidates in
// shared memory: a ballot and a store, no atomics. The fullest segment says how many steps fit
// before the warps meet again; when none does, the list is cut to the best `topk` and the bound
// rises to the last of them (common/candidates.cuh). In random order that happens after 10 K
// columns and 40 K; the last cut, after the last column, gives the set. 103 KB of shared memory:
// two blocks an SM, so that one reads while the other cuts.
#include <algorithm>

#include "common/candidates.cuh"
#include "common/cuda.h"
#include "topk_select/params.h"

namespace dsa {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kLaneColumns = 8;  // a step
constexpr int kStep = 32 * kLaneColumns;
constexpr int kSegment = 640;

using Group = ThreadGroup<kThreads>;

struct Storage {
    SelectScratch scratch;
    int appended[2][kWarps];  // in turn, so that one can be read while the next fills
    uint32_t list[];          // [capacity] keys, then [capacity] positions
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// What a lane holds of a step: kLaneColumns columns, in vectors of 16 bytes, and which of them
// belong to the row.
template <typename T>
struct Columns {
    static constexpr int kVector = 16 / sizeof(T);
    static constexpr int kLoads = kLaneColumns / kVector;
    union {
        uint4 raw[kLoads];
        T value[kLaneColumns];
    };
    uint32_t inside = 0;

    __device__ Columns() {}

    // Of the columns counted from `row`, an aligned address; those in [begin, end) belong.
    __device__ void load(const T* row, int64_t first, int64_t begin, int64_t end) {
        inside = 0;
#pragma unroll
        for (int j = 0; j < kLoads; ++j) {
            const int64_t at = first + column(j * kVector);
            if (at >= begin && at + kVector <= end) {
                raw[j] = __ldcs(reinterpret_cast<const uint4*>(row + at));
                inside |= ((1u << kVector) - 1) << (j * kVector);
            } else {
#pragma unroll
                for (int v = 0; v < kVector; ++v)
                    if (at + v >= begin && at + v < end) {
                        value[j * kVector + v] = row[at + v];
                        inside |= 1u << (j * kVector + v);
                    }
            }
        }
    }

    // The column of value i, counted from the first of the step.
    static __device__ int column(int i) {
        return i / kVector * (32 * kVector) + threadIdx.x % 32 * kVector + i % kVector;
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) topk_select_kernel(const TopkSelectParams p) {
    extern __shared__ uint8_t dynamic[];
    Storage& s = *reinterpret_cast<Storage*>(dynamic);
    uint32_t* keys = s.list;
    int32_t* positions = reinterpret_cast<int32_t*>(s.list + p.capacity);
    const Group group{static_cast<int>(threadIdx.x), 1};
    const int lane = group.lane(), warp = group.warp();

    const int row = blockIdx.x;
    const int start = p.starts ? min(max(p.starts[row], 0), p.width) : 0;
    const int n = p.lengths ? min(max(p.lengths[row], 0), p.width - start) : p.width - start;
    int32_t* out = p.indices + static_cast<int64_t>(row) * p.topk;
    if (n <= p.topk) {
        for (int i = threadIdx.x; i < p.topk; i += kThreads) out[i] = i < n ? i : -1;
        return;
    }
    // Columns are counted from the 16-byte boundary before the first one.
    const T* scores = static_cast<const T*>(p.scores) + row * p.row_stride + start;
    const int64_t origin = reinterpret_cast<uintptr_t>(scores) % 16 / sizeof(T);
    scores -= origin;
    const int64_t end = origin + n;
    const int rounds = static_cast<int>((end + kWarps * kStep - 1) / (kWarps * kStep));
    const auto first_of = [&](int round) { return (int64_t{round} * kWarps + warp) * kStep; };

    const int own = p.topk + warp * p.segment;  // where this warp's segment begins
    int count = 0, front = 0, turn = 0;
    float bound = NAN;
    Columns<T> next;
    next.load(scores, first_of(0), origin, end);
    for (int done = 0, fullest = 0; done < rounds;) {
        const int stop = min(rounds, done + (p.segment - fullest) / kStep);
        for (; done < stop; ++done) {
            Columns<T> now = next;
            next.load(scores, first_of(done + 1), origin, end);
            const int first = static_cast<int>(first_of(done) - origin);
            uint32_t passing = 0;
#pragma unroll
            for (int i = 0; i < kLaneColumns; ++i)
                passing |= static_cast<uint32_t>(passes(to_float(now.value[i]), bound)) << i;
            passing &= now.inside;
            if (__any_sync(~0u, passing)) {
#pragma unroll
                for (int i = 0; i < kLaneColumns; ++i) {
                    const bool pass = passing >> i & 1;
                    const uint32_t ballot = __ballot_sync(~0u, pass);
                    const int at = own + count + __popc(ballot & group.lanes_below());
                    if (pass) {
                        keys[at] = order_key(to_float(now.value[i]));
                        positions[at] = first + Columns<T>::column(i);
                    }
                    count += __popc(ballot);
                }
            }
        }
        turn ^= 1;
        if (lane == 0) s.appended[turn][warp] = count;
        group.sync();
        fullest = __reduce_max_sync(~0u, s.appended[turn][lane % kWarps]);
        if (done < rounds && p.segment - fullest >= kStep) continue;

        for (int i = count + lane; i < p.segment; i += 32) keys[own + i] = 0;
        for (int i = front + threadIdx.x; i < p.topk; i += kThreads) keys[i] = 0;
        const int total =
            front + __reduce_add_sync(~0u, lane < kWarps ? s.appended[turn][lane] : 0);
        group.sync();
        Threshold threshold{0, INT_MAX};
        if (total >= p.topk) {
            threshold = find_threshold(group, s.scratch, p.capacity, keys, positions, p.topk);
            bound = score_of(threshold.key);
        }
        keep(group, s.scratch, p.capacity, keys, threshold, keys, positions);
        front = min(total, p.topk);
        count = fullest = 0;
    }
    write_ascending(group, s.scratch, positions, p.topk, n, keys, p.capacity, out);
}

}  // namespace

Tensor topk_select(const Tensor& scores, int64_t topk, std::optional<Tensor> starts,
                   std::optional<Tensor> lengths) {
    const int64_t rows = scores.sizes()[0];
    Tensor indices = torch::stable::new_empty(scores, {rows, topk}, ScalarType::Int);
    if (rows == 0) return indices;
    TopkSelectParams params{
        .scores = scores.data_ptr(),
        .starts = starts ? static_cast<const int32_t*>(starts->data_ptr()) : nullptr,
        .lengths = lengths ? static_cast<const int32_t*>(lengths->data_ptr()) : nullptr,
        .indices = static_cast<int32_t*>(indices.data_ptr()),
        .row_stride = scores.stride(0),
        .rows = static_cast<int32_t>(rows),
        .width = static_cast<int32_t>(scores.sizes()[1]),
        .topk = static_cast<int32_t>(topk),
        .segment = kSegment,
        .capacity = static_cast<int32_t>(topk + kWarps * kSegment),
    };
    const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
    const cudaStream_t stream = current_stream(scores);
    const auto launch = [&](auto* kernel) {
        const int shared = sizeof(Storage) + 8 * params.capacity;
        allow_shared_memory(kernel, shared);
        kernel<<<rows, kThreads, shared, stream>>>(params);
        check_launch("topk_select_kernel");
    };
    if (scores.scalar_type() == ScalarType::Float) {
        launch(topk_select_kernel<float>);
    } else {
        launch(topk_select_kernel<__nv_bfloat16>);
    }
    return indices;
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("topk_select", TORCH_BOX(&topk_select));
}

}  // namespace dsa
