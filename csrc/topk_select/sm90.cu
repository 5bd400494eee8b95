// topk_select on the GPU: exact, deterministic, smallest position first among equals, no workspace.
//
// A block reads its row once: one warp copies rounds of 4096 columns by TMA into a ring in shared
// memory, 16 warps take 256 columns each of a round. What beats the bound goes to the warp's own
// segment of the list of candidates in shared memory: a ballot and a store, no atomics. The fullest
// segment says how many rounds fit before the warps meet again; when none does, the list is cut to
// the best `topk` and the bound rises to the last of them (common/candidates.cuh). In random order
// that happens after 8 K columns, 22 K and 60 K; the last cut, after the last column, gives the
// set. The ring, 96 KB of scores, fills while a cut runs: one block of 200 KB an SM, bound by
// memory for long rows, by the cuts for short ones.
#include <algorithm>

#include "common/candidates.cuh"
#include "common/cuda.h"
#include "topk_select/params.h"

namespace dsa {
namespace {

constexpr int kScanThreads = 512;
constexpr int kThreads = kScanThreads + 32;  // one warp loads
constexpr int kWarps = kScanThreads / 32;
constexpr int kLaneColumns = 8;  // of a round
constexpr int kWarpColumns = 32 * kLaneColumns;
constexpr int kRoundColumns = kWarps * kWarpColumns;
constexpr int kSegment = 512;

using Group = ThreadGroup<kScanThreads>;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
struct Storage {
    static constexpr int kStages = sizeof(T) == 4 ? 6 : 8;
    alignas(16) T ring[kStages][kRoundColumns];
    uint32_t bitmap[kBitmapWords];
    SelectScratch scratch;
    uint64_t full[kStages];
    uint64_t empty[kStages];
    int appended[2][kWarps];      // in turn, so that one can be read while the next fills
    alignas(16) uint32_t list[];  // [capacity] keys, then [capacity] positions
};

// The columns of a row, counted from the 16-byte boundary before the first one: [begin, end).
template <typename T>
struct Row {
    const T* scores;
    int64_t begin;
    int64_t end;

    __device__ int rounds() const {
        return static_cast<int>((end + kRoundColumns - 1) / kRoundColumns);
    }
};

// Whole 16-byte pieces that hold at least one column of the row; by one thread.
template <typename T>
__device__ void load_row(const Row<T>& row, Storage<T>& s) {
    constexpr int kPiece = 16 / sizeof(T);
    for (int round = 0; round < row.rounds(); ++round) {
        const int stage = round % Storage<T>::kStages;
        const int64_t first = int64_t{round} * kRoundColumns;
        const int64_t left = (row.end - first + kPiece - 1) / kPiece * kPiece;
        const uint32_t bytes = sizeof(T) * min(left, int64_t{kRoundColumns});
        mbarrier_wait(&s.empty[stage], round / Storage<T>::kStages % 2 ^ 1);
        mbarrier_arrive_expect(&s.full[stage], bytes);
        bulk_load(s.ring[stage], row.scores + first, bytes, &s.full[stage]);
    }
}

// Appends what passes of a round to this warp's segment; `count` is how much it holds. `first` is
// the position of the lane's first column.
template <typename T>
__device__ void append(const T* columns, int64_t first, int64_t length, bool edge, float bound,
                       uint32_t* keys, int32_t* positions, int& count) {
    constexpr int kVector = 16 / sizeof(T);
    const uint32_t lanes_below = (1u << (threadIdx.x % 32)) - 1;
#pragma unroll
    for (int j = 0; j < kLaneColumns; j += kVector) {
        union {
            uint4 raw;
            T value[kVector];
        } four;
        four.raw = *reinterpret_cast<const uint4*>(columns + j * 32);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
            const float score = to_float(four.value[v]);
            bool pass = passes(score, bound);
            if (edge) pass = pass && first + j * 32 + v >= 0 && first + j * 32 + v < length;
            const uint32_t ballot = __ballot_sync(~0u, pass);
            if (pass) {
                const int at = count + __popc(ballot & lanes_below);
                keys[at] = order_key(score);
                positions[at] = static_cast<int32_t>(first) + j * 32 + v;
            }
            count += __popc(ballot);
        }
    }
}

template <typename T>
__device__ void select_row(const TopkSelectParams& p, const Row<T>& row, Storage<T>& s,
                           int32_t* out) {
    constexpr int kStages = Storage<T>::kStages;
    const Group group{static_cast<int>(threadIdx.x), 1};
    const int lane = group.lane(), warp = group.warp();
    const int rounds = row.rounds(), own = p.front + warp * p.segment;
    const int in_round = warp * kWarpColumns + lane * (16 / sizeof(T));
    const int64_t length = row.end - row.begin;
    uint32_t* keys = s.list;
    int32_t* positions = reinterpret_cast<int32_t*>(s.list + p.capacity);

    int count = 0, front = 0, turn = 0;
    float bound = NAN;
    for (int done = 0, fullest = 0; done < rounds;) {
        const int stop = min(rounds, done + (p.segment - fullest) / kWarpColumns);
        for (; done < stop; ++done) {
            const int stage = done % kStages;
            mbarrier_wait(&s.full[stage], done / kStages % 2);
            append(s.ring[stage] + in_round, int64_t{done} * kRoundColumns + in_round - row.begin,
                   length, done == 0 || done == rounds - 1, bound, keys + own, positions + own,
                   count);
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&s.empty[stage]);
        }
        turn ^= 1;
        if (lane == 0) s.appended[turn][warp] = count;
        group.sync();
        fullest = __reduce_max_sync(~0u, s.appended[turn][lane % kWarps]);
        const bool last = done == rounds;
        if (!last && p.segment - fullest >= kWarpColumns) continue;

        for (int i = count + lane; i < p.segment; i += 32) keys[own + i] = 0;
        for (int i = front + threadIdx.x; i < p.front; i += kScanThreads) keys[i] = 0;
        const int total =
            front + __reduce_add_sync(~0u, lane < kWarps ? s.appended[turn][lane] : 0);
        group.sync();
        Threshold threshold{0, INT_MAX};
        if (total >= p.topk)
            threshold = find_threshold(group, s.scratch, p.capacity, keys, positions, p.topk);
        if (last) {
            write_ascending(group, s.scratch, p.capacity, keys, threshold, positions,
                            static_cast<int>(length), s.bitmap, out);
        } else {
            keep(group, s.scratch, p.capacity, keys, threshold, keys, positions);
            if (total >= p.topk) bound = score_of(threshold.key);
            front = min(total, p.topk);
            count = fullest = 0;
        }
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) topk_select_kernel(const TopkSelectParams p) {
    extern __shared__ __align__(16) uint8_t dynamic[];
    Storage<T>& s = *reinterpret_cast<Storage<T>*>(dynamic);
    const int row = blockIdx.x;
    const int start = p.starts ? min(max(p.starts[row], 0), p.width) : 0;
    const int n = p.lengths ? min(max(p.lengths[row], 0), p.width - start) : p.width - start;
    int32_t* out = p.indices + static_cast<int64_t>(row) * p.topk;
    if (n <= p.topk) {
        for (int i = threadIdx.x; i < p.topk; i += kThreads) out[i] = i < n ? i : -1;
        return;
    }
    const T* scores = static_cast<const T*>(p.scores) + row * p.row_stride + start;
    const int64_t begin = reinterpret_cast<uintptr_t>(scores) % 16 / sizeof(T);
    const Row<T> columns{scores - begin, begin, begin + n};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < Storage<T>::kStages; ++stage) {
            mbarrier_init(&s.full[stage], 1);
            mbarrier_init(&s.empty[stage], kWarps);
        }
        fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < kScanThreads) {
        select_row(p, columns, s, out);
    } else if (threadIdx.x == kScanThreads) {
        load_row(columns, s);
    }
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
        .front = static_cast<int32_t>((topk + 3) / 4 * 4),
        .segment = kSegment,
    };
    params.capacity = params.front + kWarps * kSegment;
    const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
    const cudaStream_t stream = current_stream(scores);
    const auto launch = [&](auto* kernel, int storage_bytes) {
        const int shared = storage_bytes + 8 * params.capacity;
        allow_shared_memory(kernel, shared);
        kernel<<<rows, kThreads, shared, stream>>>(params);
        check_launch("topk_select_kernel");
    };
    if (scores.scalar_type() == ScalarType::Float) {
        launch(topk_select_kernel<float>, sizeof(Storage<float>));
    } else {
        launch(topk_select_kernel<__nv_bfloat16>, sizeof(Storage<__nv_bfloat16>));
    }
    return indices;
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("topk_select", TORCH_BOX(&topk_select));
}

}  // namespace dsa
