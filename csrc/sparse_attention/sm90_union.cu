// build_union on the GPU: the ascending union of the keys that 16 consecutive tokens select, with a
// token mask per key.
//
// One block of 16 warps per tile, warp t for token t. The keys are taken in windows of 32768: a
// bitmap a token in shared memory (16 x 4 KB), filled with atomicOr by the token's own warp, which
// finds its ids of the window by bisection, as they ascend. Then every thread owns two words of 32
// keys: the OR over the tokens says which keys are present, a scan of the popcounts over the block
// where they go in the list, and its 16 words give the masks.
//
// Triton has no shared memory to scatter into: its version writes the bits to global scratch, 268M
// scattered words for a sequence of 131072, and takes 4 to 5 ms. Here each id is read once, and the
// lists are written once. 64 KB of shared memory and at most 40 registers a thread: three blocks an
// SM. No atomic decides an order.
#include "common/cuda.h"
#include "sparse_attention/params.h"

namespace dsa {
namespace {

constexpr int kTokens = 16;
constexpr int kThreads = 32 * kTokens;
constexpr int kWords = 2 * kThreads;  // of a window: two a thread
constexpr int kWindow = 32 * kWords;
constexpr int kSharedBytes = kTokens * kWords * 4;

// The first position of ids[0, n) whose id is at least `key`; empty entries (negative) count as
// above everything.
__device__ int lower_bound(const int32_t* ids, int n, int64_t key) {
    int low = 0;
    for (int high = n; low < high;) {
        const int middle = (low + high) / 2;
        const int32_t id = ids[middle];
        if (id >= 0 && id < key) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

__global__ void __launch_bounds__(kThreads, 3) build_union_kernel(const BuildUnionParams p) {
    extern __shared__ uint32_t bitmaps[];  // [kTokens][kWords]
    __shared__ int warp_counts[kTokens];
    __shared__ int32_t shared_last_key;
    const int thread = threadIdx.x, lane = thread % 32, token = thread / 32;
    const int32_t* tile = p.tiles + static_cast<int64_t>(blockIdx.x) * p.tile_fields;
    const int first = tile[0], tokens = tile[1], length = tile[3];
    int32_t* keys = p.keys + blockIdx.x * p.capacity;
    int32_t* masks = p.masks + blockIdx.x * p.capacity;
    const int32_t* ids = p.indices + (first + token) * p.index_stride;
    const int end = token < tokens ? lower_bound(ids, p.topk, length) : 0;

    const int capacity = static_cast<int>(p.capacity);
    int position = 0;  // of the first id not yet in a window
    int total = 0;     // keys listed so far, at most capacity + kWindow
    for (int64_t window = 0; window < length; window += kWindow) {
        const int stop = lower_bound(ids + position, end - position, window + kWindow) + position;
        if (!__syncthreads_or(stop > position)) continue;
        for (int word = thread; word < kTokens * kWords; word += kThreads) bitmaps[word] = 0;
        __syncthreads();
        for (int i = position + lane; i < stop; i += 32) {
            const int64_t key = ids[i] - window;
            if (key >= 0 && key < kWindow) {
                atomicOr(&bitmaps[token * kWords + key / 32], 1u << (key % 32));
            }
        }
        position = stop;
        __syncthreads();

        const uint2* pairs = reinterpret_cast<const uint2*>(bitmaps) + thread;
        uint2 present = {0, 0};
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            present.x |= pairs[t * kThreads].x;
            present.y |= pairs[t * kThreads].y;
        }
        const int mine = __popc(present.x) + __popc(present.y);
        int inclusive = mine;
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(~0u, inclusive, offset);
            if (lane >= offset) inclusive += other;
        }
        if (lane == 31) warp_counts[token] = inclusive;
        __syncthreads();
        int before = inclusive - mine, sum = 0;
        for (int w = 0; w < kTokens; ++w) {
            if (w < token) before += warp_counts[w];
            sum += warp_counts[w];
        }

        int rank = total + before;
        for (int half = 0; half < 2; ++half) {
            const int word = 2 * thread + half;
            uint32_t words[kTokens];
#pragma unroll
            for (int t = 0; t < kTokens; ++t) words[t] = bitmaps[t * kWords + word];
            uint32_t left = half ? present.y : present.x;
            for (; left && rank < capacity; left &= left - 1, ++rank) {
                const int bit = __ffs(left) - 1;
                uint32_t mask = 0;
#pragma unroll
                for (int t = 0; t < kTokens; ++t) mask |= ((words[t] >> bit) & 1u) << t;
                const auto key = static_cast<int32_t>(window + word * 32 + bit);
                keys[rank] = key;
                masks[rank] = static_cast<int32_t>(mask);
                if (rank == total + sum - 1) shared_last_key = key;
            }
        }
        total += sum;
        __syncthreads();
        if (total > capacity) break;
    }
    if (thread == 0) p.counts[blockIdx.x] = min(total, capacity + 1);
    const int padded = min((total + p.list_block - 1) / p.list_block * p.list_block, capacity);
    for (int i = total + thread; i < padded; i += kThreads) {
        keys[i] = shared_last_key;
        masks[i] = 0;
    }
}

}  // namespace

void build_union(const Tensor& indices, const Tensor& tiles, Tensor keys, Tensor masks,
                 Tensor counts, int64_t /*num_keys*/, int64_t list_block) {
    const int64_t num_tiles = tiles.sizes()[0];
    if (num_tiles == 0) return;
    const BuildUnionParams params{
        .indices = static_cast<const int32_t*>(indices.data_ptr()),
        .tiles = static_cast<const int32_t*>(tiles.data_ptr()),
        .keys = static_cast<int32_t*>(keys.data_ptr()),
        .masks = static_cast<int32_t*>(masks.data_ptr()),
        .counts = static_cast<int32_t*>(counts.data_ptr()),
        .index_stride = indices.stride(0),
        .capacity = keys.sizes()[1],
        .topk = static_cast<int32_t>(indices.sizes()[1]),
        .tile_fields = static_cast<int32_t>(tiles.sizes()[1]),
        .list_block = static_cast<int32_t>(list_block),
    };
    const torch::stable::accelerator::DeviceGuard guard(indices.get_device_index());
    cudaFuncSetAttribute(build_union_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         kSharedBytes);
    build_union_kernel<<<num_tiles, kThreads, kSharedBytes, current_stream(indices)>>>(params);
    check_launch("build_union_kernel");
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("build_union", TORCH_BOX(&build_union));
}

}  // namespace dsa
