// Where sequences of packed rows, or the rows of experts, begin and end: the one way in which the
// CPU kernels read boundaries, whose values nobody has checked.
#pragma once

#include "common/cpu.h"

namespace dsa::DSA_ISA {

// The running maximum of the boundaries [S + 1], clamped to [0, total]: range s is [bounds[s],
// bounds[s + 1]), so ranges ascend, stay inside and never overlap, whatever the tensor holds.
inline std::vector<int64_t> sequence_bounds(const Tensor& boundaries, int64_t total) {
    const int32_t* values = data<int32_t>(boundaries);
    std::vector<int64_t> bounds(boundaries.sizes()[0]);
    int64_t last = 0;
    for (size_t s = 0; s < bounds.size(); ++s)
        bounds[s] = last = std::clamp<int64_t>(values[s], last, total);
    return bounds;
}

}  // namespace dsa::DSA_ISA
