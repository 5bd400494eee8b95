// indexer_prepare on the CPU: one vector of Di elements at a time in registers, tokens in parallel.
//
// A vector is read once and its Di codes written once. In between: norm, rotation, and the Hadamard
// transform as log2(Di) rounds of butterflies, of neighbours first; the first rounds pair lanes of
// one register, the others pair registers. The order of the rounds is that of every implementation,
// so equal inputs of the transform give equal bits. Where the inputs are bf16, the vector is
// rounded to bf16 after each of the three steps.
#include "common/cpu.h"

#include "common/e4m3.h"
#include "common/paging.h"

namespace dsa::DSA_ISA {

inline Vec rounded(Vec x, float) { return x; }
inline Vec rounded(Vec x, bf16) {
    const VecU bits = (VecU)x;
    const VecU nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return x == x ? (Vec)nearest : x;
}

// x[i] of every lane i becomes x[i ^ kDistance].
template <int kDistance>
inline Vec exchange_lanes(Vec x) {
#ifdef __clang__
    Vec y;
    for (int i = 0; i < kLanes; ++i) y[i] = x[i ^ kDistance];
    return y;
#else  // GCC does not find the shuffle in that loop
    VecI from;
    for (int i = 0; i < kLanes; ++i) from[i] = i ^ kDistance;
    return __builtin_shuffle(x, from);
#endif
}

template <int kDistance>
inline Vec lane_butterfly(Vec x) {
    VecU sign;
    for (int i = 0; i < kLanes; ++i) sign[i] = i & kDistance ? 0x80000000u : 0u;
    return exchange_lanes<kDistance>(x) + (Vec)((VecU)x ^ sign);
}

template <int kDim, typename T>
class Prologue {
  public:
    static constexpr int kVecs = kDim / kLanes, kHalf = kVecs / 2;

    Prologue(const Tensor& q_weight, const Tensor& k_weight, const Tensor& k_bias, float eps)
        : eps_(eps) {
        widen(q_weight, q_weight_);
        widen(k_weight, k_weight_);
        widen(k_bias, k_bias_);
    }

    // Both return the scale and write the codes.
    float query(const T* q, const float* cos, const float* sin, uint8_t* codes) const {
        Vec x[kVecs], squares{};
        for (int i = 0; i < kVecs; ++i) {
            x[i] = load(q + i * kLanes);
            squares = x[i] * x[i] + squares;
        }
        const Vec inverse = splat(1.0f / std::sqrt(reduce_add(squares) / kDim + eps_));
        for (int i = 0; i < kVecs; ++i)
            x[i] = rounded(x[i] * inverse * load(q_weight_ + i * kLanes), T{});
        return rotate_and_quantize(x, cos, sin, codes);
    }

    float key(const T* k, const float* cos, const float* sin, uint8_t* codes) const {
        Vec x[kVecs], sum{}, squares{};
        for (int i = 0; i < kVecs; ++i) {
            x[i] = load(k + i * kLanes);
            sum = sum + x[i];
        }
        const Vec mean = splat(reduce_add(sum) / kDim);
        for (int i = 0; i < kVecs; ++i) {
            x[i] = x[i] - mean;
            squares = x[i] * x[i] + squares;
        }
        const Vec inverse = splat(1.0f / std::sqrt(reduce_add(squares) / kDim + eps_));
        for (int i = 0; i < kVecs; ++i) {
            const Vec weight = load(k_weight_ + i * kLanes), bias = load(k_bias_ + i * kLanes);
            x[i] = rounded(x[i] * inverse * weight + bias, T{});
        }
        return rotate_and_quantize(x, cos, sin, codes);
    }

  private:
    static float rotate_and_quantize(Vec* x, const float* cos, const float* sin, uint8_t* codes) {
        for (int i = 0; i < kHalf; ++i) {
            const Vec c = load(cos + i * kLanes), s = load(sin + i * kLanes);
            const Vec low = x[i], high = x[i + kHalf];
            x[i] = rounded(low * c - high * s, T{});
            x[i + kHalf] = rounded(high * c + low * s, T{});
        }
        for (int i = 0; i < kVecs; ++i) {
            x[i] = lane_butterfly<2>(lane_butterfly<1>(x[i]));
            if constexpr (kLanes > 4) x[i] = lane_butterfly<4>(x[i]);
            if constexpr (kLanes > 8) x[i] = lane_butterfly<8>(x[i]);
        }
        for (int distance = 1; distance < kVecs; distance *= 2)
            for (int i = 0; i < kVecs; ++i)
                if ((i & distance) == 0) {
                    const Vec a = x[i], b = x[i + distance];
                    x[i] = a + b;
                    x[i + distance] = a - b;
                }
        VecU largest{};
        for (int i = 0; i < kVecs; ++i) {
            x[i] = rounded(x[i] * splat(kNormalize), T{});
            const VecU magnitude = (VecU)x[i] & 0x7fffffffu;
            largest = magnitude > largest ? magnitude : largest;
        }
        uint32_t amax = 0;
        for (int i = 0; i < kLanes; ++i) amax = std::max<uint32_t>(amax, largest[i]);
        const float scale = e4m3_scale(amax);
        const Vec inverse = splat(1.0f / scale);  // a power of two: exact
        for (int i = 0; i < kVecs; ++i) store_e4m3(codes + i * kLanes, x[i] * inverse);
        return scale;
    }

    static void widen(const Tensor& from, float* to) {
        const bool is_float = from.scalar_type() == ScalarType::Float;
        for (int i = 0; i < kDim; ++i)
            to[i] = is_float ? data<float>(from)[i] : to_float(data<bf16>(from)[i]);
    }

  public:
    static constexpr float kNormalize = kDim == 32   ? 0.17677669529663687f
                                        : kDim == 64 ? 0.125f
                                                     : 0.08838834764831845f;

  private:
    float eps_;
    float q_weight_[kDim], k_weight_[kDim], k_bias_[kDim];
};

using Prepared = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <int kDim, typename T>
Prepared prepare(const Tensor& q, const Tensor& k, const Tensor& gate,
                 const Prologue<kDim, T>& prologue, const Tensor& cos, const Tensor& sin,
                 const IndexCache* cache, const int64_t* slots) {
    const int64_t tokens = q.sizes()[0], heads = q.sizes()[1];
    Tensor q_fp8 = empty_like_device(q, {tokens, heads, kDim}, ScalarType::Float8_e4m3fn);
    Tensor weights = empty_like_device(q, {tokens, heads}, ScalarType::Float);
    Tensor k_fp8 = empty_like_device(q, {tokens, kDim}, ScalarType::Float8_e4m3fn);
    Tensor k_scale = empty_like_device(q, {tokens}, ScalarType::Float);
    uint8_t *q_codes = mutable_data<uint8_t>(q_fp8), *k_codes = mutable_data<uint8_t>(k_fp8);
    float *weight = mutable_data<float>(weights), *key_scale = mutable_data<float>(k_scale);
    const T *q_rows = data<T>(q), *k_rows = data<T>(k), *gates = data<T>(gate);
    const float *cosines = data<float>(cos), *sines = data<float>(sin);
    const int64_t q_token = q.stride(0), q_head = q.stride(1), k_token = k.stride(0);
    const int64_t gate_token = gate.stride(0), cos_token = cos.stride(0), sin_token = sin.stride(0);
    parallel(tokens, 64 / (heads + 1) + 1, [&](int64_t t) {
        const float *c = cosines + t * cos_token, *s = sines + t * sin_token;
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t row = t * heads + h;
            const float scale =
                prologue.query(q_rows + t * q_token + h * q_head, c, s, q_codes + row * kDim);
            weight[row] = to_float(gates[t * gate_token + h]) * scale * prologue.kNormalize;
        }
        uint8_t* key = k_codes + t * kDim;
        key_scale[t] = prologue.key(k_rows + t * k_token, c, s, key);
        if (cache && cache->holds(slots[t])) cache->write(slots[t], key, key_scale[t]);
    });
    return {q_fp8, weights, k_fp8, k_scale};
}

Prepared prepare(const Tensor& q, const Tensor& k, const Tensor& gate, const Tensor& q_weight,
                 const Tensor& k_weight, const Tensor& k_bias, const Tensor& cos, const Tensor& sin,
                 double eps, const IndexCache* cache, const int64_t* slots) {
    const auto run = [&]<int kDim, typename T>(std::integral_constant<int, kDim>, T) {
        const Prologue<kDim, T> prologue(q_weight, k_weight, k_bias, static_cast<float>(eps));
        return prepare<kDim, T>(q, k, gate, prologue, cos, sin, cache, slots);
    };
    const auto with_dim = [&](auto element) {
        switch (q.sizes()[2]) {
            case 32:
                return run(std::integral_constant<int, 32>{}, element);
            case 64:
                return run(std::integral_constant<int, 64>{}, element);
            default:
                return run(std::integral_constant<int, 128>{}, element);
        }
    };
    return with_dtype(q, with_dim);
}

Prepared indexer_prepare(const Tensor& q, const Tensor& k, const Tensor& gate,
                         const Tensor& q_weight, const Tensor& k_weight, const Tensor& k_bias,
                         const Tensor& cos, const Tensor& sin, double eps) {
    return prepare(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, nullptr, nullptr);
}

Prepared indexer_prepare_cached(const Tensor& q, const Tensor& k, const Tensor& gate,
                                const Tensor& q_weight, const Tensor& k_weight,
                                const Tensor& k_bias, const Tensor& cos, const Tensor& sin,
                                double eps, const Tensor& index_cache, const Tensor& slots) {
    const IndexCache cache(index_cache);
    return prepare(q, k, gate, q_weight, k_weight, k_bias, cos, sin, eps, &cache,
                   data<int64_t>(slots));
}

DSA_REGISTER_CPU(m) {
    m.impl("indexer_prepare", TORCH_BOX(&indexer_prepare));
    m.impl("indexer_prepare_cached", TORCH_BOX(&indexer_prepare_cached));
}

}  // namespace dsa::DSA_ISA
