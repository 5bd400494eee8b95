// FP8 e4m3 (4 exponent bits of bias 7, 3 mantissa bits, no infinity, 0x7f and 0xff are NaN) to
// float: exact, and independent of the flush-denormals mode.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "common/simd.h"

namespace dsa::DSA_ISA {

typedef uint8_t VecB __attribute__((vector_size(kLanes)));

// One code a lane.
inline Vec e4m3_to_float(VecU code) {
    const VecU magnitude = code & 0x7fu;
    // 2^(e-7) (1 + m/8); without an exponent 2^-6 m/8, written as 2^-6 (1 + m/8) - 2^-6.
    const Vec normal = (Vec)((magnitude << 20) + (120u << 23));
    const Vec subnormal = (Vec)((magnitude << 20) + (121u << 23)) - 0x1p-6f;
    Vec x = magnitude < 8u ? subnormal : normal;
    x = magnitude == 0x7fu ? splat(std::numeric_limits<float>::quiet_NaN()) : x;
    return (Vec)((VecU)x | ((code & 0x80u) << 24));
}

inline Vec load_e4m3(const uint8_t* p) {
    VecB codes;
    std::memcpy(&codes, p, sizeof codes);
    return e4m3_to_float(__builtin_convertvector(codes, VecU));
}

}  // namespace dsa::DSA_ISA
