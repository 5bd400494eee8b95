// Small matrix products on fp32 panels, the packing that makes them, and a vector logarithm.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/simd.h"

namespace dsa::DSA_ISA {

inline constexpr int64_t kBlock = 32;  // keys of a packed panel: 16 KB at depth 128, half of L1

// ---- c = a . b
// -----------------------------------------------------------------------------------

// R rows by two vectors in registers: 8 sums, 2 loads and 4 broadcasts a step at R = 4.
template <int R>
inline void panel(const float* a, int64_t a_row, int64_t a_col, const float* b, int64_t b_row,
                  int64_t depth, float* c, int64_t c_row, bool add) {
    Vec sum[R][2];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) sum[r][v] = add ? load(c + r * c_row + v * kLanes) : Vec{};
    for (int64_t x = 0; x < depth; ++x) {
        const Vec b0 = load(b + x * b_row), b1 = load(b + x * b_row + kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec value = splat(a[r * a_row + x * a_col]);
            sum[r][0] = value * b0 + sum[r][0];
            sum[r][1] = value * b1 + sum[r][1];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
}

// c[r][i] (+)= sum over x in [0, depth) of a[r, x] b[x][i], r in [0, rows), i in [0, width), width
// a multiple of 2 * kLanes. a[r, x] lies at a[r * a_row + x * a_col].
inline void multiply(const float* a, int64_t a_row, int64_t a_col, int64_t rows, const float* b,
                     int64_t b_row, int64_t depth, int64_t width, float* c, int64_t c_row,
                     bool add) {
    for (int64_t i = 0; i < width; i += 2 * kLanes) {
        int64_t r = 0;
        for (; r + 4 <= rows; r += 4)
            panel<4>(a + r * a_row, a_row, a_col, b + i, b_row, depth, c + r * c_row + i, c_row,
                     add);
        for (; r < rows; ++r)
            panel<1>(a + r * a_row, a_row, a_col, b + i, b_row, depth, c + r * c_row + i, c_row,
                     add);
    }
}

// ---- packing
// -------------------------------------------------------------------------------------

// Lane l of `low` or `high` when rows i and i + W of a square exchange their off-diagonal halves.
template <int W>
constexpr int low_lane(int l) {
    return l & W ? kLanes + l - W : l;
}
template <int W>
constexpr int high_lane(int l) {
    return l & W ? kLanes + l : l + W;
}

template <int W, int... L>
inline void exchange(VecU& a, VecU& b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
    const VecU low = __builtin_shufflevector(a, b, low_lane<W>(L)...);
    const VecU high = __builtin_shufflevector(a, b, high_lane<W>(L)...);
#else
    const VecU low = __builtin_shuffle(a, b, VecU{uint32_t(low_lane<W>(L))...});
    const VecU high = __builtin_shuffle(a, b, VecU{uint32_t(high_lane<W>(L))...});
#endif
    a = low;
    b = high;
}

template <int W = 1>
inline void transpose(VecU (&square)[kLanes]) {
    if constexpr (W < kLanes) {
        for (int i = 0; i < kLanes; ++i)
            if (!(i & W))
                exchange<W>(square[i], square[i + W], std::make_integer_sequence<int, kLanes>());
        transpose<2 * W>(square);
    }
}

// out[d][s] = row rows[s], s in [0, n), as fp32 [depth][kBlock], 0 from n on. A square of 32-bit
// words is transposed at a time: one fp32 or two bf16 values each.
template <typename T>
inline void pack_transposed(const T* base, int64_t stride, const int64_t* rows, int64_t n,
                            int64_t depth, float* out) {
    constexpr int kPerWord = 4 / sizeof(T);
    for (int64_t s = 0; s < kBlock; s += kLanes) {
        for (int64_t d = 0; d < depth; d += kLanes * kPerWord) {
            VecU square[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                square[l] = VecU{};
                if (s + l < n)
                    std::memcpy(&square[l], base + rows[s + l] * stride + d, sizeof(VecU));
            }
            transpose(square);
            for (int l = 0; l < kLanes; ++l) {
                float* column = out + (d + l * kPerWord) * kBlock + s;
                if constexpr (kPerWord == 1) {
                    store(column, (Vec)square[l]);
                } else {
                    store(column, (Vec)(square[l] << 16));
                    store(column + kBlock, (Vec)(square[l] & 0xffff0000u));
                }
            }
        }
    }
}

// ---- log
// -----------------------------------------------------------------------------------------

// log(x) for normal x > 0, relative error below 2e-7 away from 1 and absolute error below 1e-7
// near it. x = m 2^e with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(r), r = (m - 1) / (m + 1).
inline Vec vlog(Vec x) {
    const VecU bits = (VecU)x;
    const VecI exponent = ((VecI)bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is sqrt(1/2)
    const Vec m = (Vec)(bits - ((VecU)exponent << 23));
    const Vec r = (m - splat(1.0f)) / (m + splat(1.0f));
    const Vec r2 = r * r;
    Vec series = splat(2.0f / 9);
    series = series * r2 + splat(2.0f / 7);
    series = series * r2 + splat(2.0f / 5);
    series = series * r2 + splat(2.0f / 3);
    const Vec e = __builtin_convertvector(exponent, Vec);
    return e * splat(0.693147182f) + (r * splat(2.0f) + series * r2 * r);
}

}  // namespace dsa::DSA_ISA
