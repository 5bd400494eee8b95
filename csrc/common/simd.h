// Vectors of floats with GCC/Clang vector extensions: 16, 8 or 4 lanes by instruction set, no
// intrinsics. `a * b + c` contracts to one FMA where the instruction set has it.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace dsa::DSA_ISA {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecI __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecU __attribute__((vector_size(kLanes * 4)));
typedef uint16_t VecH __attribute__((vector_size(kLanes * 2)));

inline constexpr float kInf = std::numeric_limits<float>::infinity();

inline Vec splat(float x) { return Vec{} + x; }
// The same where it is an operand of a loop: splat adds 0, which the compiler must keep (-0 + 0 is
// 0); x - 0 is x for every x and folds into the load.
inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// bf16 is the upper half of a float; stores round to nearest even and keep NaN a NaN.
struct bf16 {
    uint16_t bits;
};
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline Vec load(const bf16* p) {
    VecH h;
    std::memcpy(&h, p, sizeof h);
    return (Vec)(__builtin_convertvector(h, VecU) << 16);
}
inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, bf16* out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out->bits = x == x ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : uint16_t(0x7fc0);
}
inline void store(bf16* p, Vec v) {
    const VecU bits = (VecU)v;
    VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = v == v ? rounded : (VecU{} + 0x7fc0u);
    const VecH h = __builtin_convertvector(rounded, VecH);
    std::memcpy(p, &h, sizeof h);
}

// out[0, n) = x[0, n) as floats, and back.
template <typename T>
inline void widen(const T* x, int64_t n, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
    for (; i < n; ++i) out[i] = to_float(x[i]);
}
template <typename T>
inline void narrow(const float* x, int64_t n, T* out) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i));
    for (; i < n; ++i) from_float(x[i], out + i);
}

inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }

// Pairwise over the lanes, so the order does not depend on the caller.
inline float reduce_add(Vec v) {
    float x[kLanes];
    store(x, v);
    for (int w = kLanes / 2; w > 0; w /= 2)
        for (int i = 0; i < w; ++i) x[i] += x[i + w];
    return x[0];
}
inline float reduce_max(Vec v) {
    float x[kLanes];
    store(x, v);
    for (int w = kLanes / 2; w > 0; w /= 2)
        for (int i = 0; i < w; ++i) x[i] = x[i] > x[i + w] ? x[i] : x[i + w];
    return x[0];
}

// exp(x), relative error below 2e-7 on [-87, 88]; 0 below -87.3, -inf included; clamped above 88.
inline Vec vexp(Vec x) {
    const Vec clamped = vmin(vmax(x, splat(-87.33654f)), splat(88.0f));
    const Vec shifted =
        clamped * splat(1.44269504f) + splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer
    const Vec n = shifted - splat(12582912.0f);
    Vec r = clamped - n * splat(0.693359375f);
    r = r - n * splat(-2.12194440e-4f);
    Vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const VecI exponent = ((VecI)shifted - (VecI)splat(12582912.0f) + 127) << 23;
    const Vec y = p * (Vec)exponent;
    return x < splat(-87.33654f) ? Vec{} : y;
}
// The numerator of a softmax; keeps a NaN a NaN.
inline Vec exp_or_nan(Vec x) { return x == x ? vexp(x) : x; }

// sum over i of a[i] * b[i]; n a multiple of kLanes. Two accumulators hide the FMA latency.
template <typename A, typename B>
inline float dot(const A* a, const B* b, int64_t n) {
    Vec s0{}, s1{};
    int64_t i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
        s0 = load(a + i) * load(b + i) + s0;
        s1 = load(a + i + kLanes) * load(b + i + kLanes) + s1;
    }
    for (; i < n; i += kLanes) s0 = load(a + i) * load(b + i) + s0;
    return reduce_add(s0 + s1);
}

}  // namespace dsa::DSA_ISA
