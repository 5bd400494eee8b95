// Where a thread is in a ring of buffers, each with a full and an empty mbarrier: who fills it and
// who reads it count alike.
#pragma once

#include <cstdint>

namespace dsa {

struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void advance(int stages) {
        if (++stage == stages) stage = 0, parity ^= 1;
    }
};

}  // namespace dsa
