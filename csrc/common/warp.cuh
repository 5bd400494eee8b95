// What the lanes of a warp do together beyond a single instruction. Blocks are one-dimensional.
#pragma once

#include <cstdint>

namespace dsa {

// The sum over the lanes of the warp up to this one.
__device__ __forceinline__ int sum_up_to(int own) {
    int inclusive = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(~0u, inclusive, offset);
        if (threadIdx.x % 32 >= offset) inclusive += other;
    }
    return inclusive;
}

}  // namespace dsa
