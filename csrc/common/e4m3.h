// FP8 e4m3 (4 exponent bits of bias 7, 3 mantissa bits, no infinity, 0x7f and 0xff are NaN): codes
// to floats, exactly; floats to codes, to nearest even; the power-of-two scale of a quantised
// vector. Independent of the flush-denormals mode.
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

// The code of every lane: round to nearest even, saturating at +-448; NaN gives 0x7f.
//
// From 2^-6 up the code is the upper bits of the float with its exponent bias changed from 127 to
// 7. Below, codes count multiples of 2^-9, which is the last place of a float in [2^14, 2^15):
// adding 2^14 rounds to them. The largest of those sums, 8, is the code of 2^-6.
inline VecU float_to_e4m3(Vec x) {
    const VecU bits = (VecU)x, magnitude = bits & 0x7fffffffu;
    const VecU normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    const VecU small = (VecU)((Vec)magnitude + splat(16384.0f)) - 0x46800000u;
    VecU code = magnitude < 0x3c800000u ? small : normal;
    code = magnitude > 0x43e00000u ? (VecU{} + 0x7eu) : code;
    code |= (bits >> 24) & 0x80u;
    return x == x ? code : (VecU{} + 0x7fu);
}

inline void store_e4m3(uint8_t* p, Vec x) {
    // Halved twice: GCC takes the direct conversion lane by lane.
    const VecH halves = __builtin_convertvector(float_to_e4m3(x), VecH);
    const VecB codes = __builtin_convertvector(halves, VecB);
    std::memcpy(p, &codes, sizeof codes);
}

// The smallest power of two s with max(amax, 1e-4) <= 448 s, where amax is given by its bits: 448
// is 1.75 * 2^8, so the exponent goes up by one where the mantissa exceeds 1.75. NaN if amax is not
// finite.
inline float e4m3_scale(uint32_t amax_bits) {
    constexpr uint32_t kFloor = 0x38d1b717u;  // 1e-4f
    uint32_t bits = amax_bits < kFloor ? kFloor : amax_bits;
    bits = bits >= 0x7f800000u ? 0x7fc00000u : (((bits + 0x1fffffu) >> 23) - 8) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return scale;
}

}  // namespace dsa::DSA_ISA
