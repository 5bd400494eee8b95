// indexer_prepare on Hopper, the kernel: one launch for queries, keys, gates and the cache.
//
// A vector belongs to Di / 32 neighbouring lanes. Each has two runs of 16 elements, at the same
// place of either half: RoPE's pairs meet in a lane, loads and stores are 16 bytes, and of the
// Hadamard transform only the rounds of distance 16 to Di / 4 cross lanes: at 64 one of six, a
// shuffle and an FMA an element. Few vectors go to four times as many lanes, with runs of 4: one
// token is a matter of latency. Sums have one order in both forms, so a vector's bits do not depend
// on the batch.
//
// A block of 128 threads takes 64 vectors a round (at 64). It asks for the first round's vectors,
// for cos and sin of its tokens and for the norm's weights before it waits for any of them; then
// each round asks for the next round's vectors before its own arithmetic. The grid ends with the
// blocks of the keys.
//
// bf16, as compiled: 80 registers, no spills, 24 warps an SM, 24 KB of vectors in flight or 48. A
// round is 690 instructions, 21.6 an element (24.8 at 128, 20.3 at 32), the start of a block 120
// more: 2 rounds make 23 an element at 8192 tokens of 16 x 64, 4 make 22 at 131072. The count that
// no form of it escapes is 18: 6 butterflies, 4 norm and its squares, 3 RoPE with its rounding, 1
// to unpack, 3 rounding, maximum, scale and code, 1 loads and stores. On an H200
// 8192 tokens move 29.7 MB, 6.9 us at the rate of a copy, and take 6.1 us of issue slots at 1.98
// GHz. Measured, cold: 15.3 us, where a copy of as many bytes takes 11.8; 142 us for 131072 tokens,
// 80% of the rate of a copy; 4.7 to 5.0 us for one. Two and one round a block: 15.9 and 16.2 us.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include "common/ptx.cuh"
#include "indexer_prepare/params.h"

namespace dsa {

using bf16 = __nv_bfloat16;

constexpr int kPrepareThreads = 128;

// As many as registers allow: 80 and 128 a thread.
template <typename T>
constexpr int kBlocksPerSm = sizeof(T) == 2 ? 6 : 4;

// Read and written by up to 16 bytes.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Run {
    T at[kCount];
};

template <class Run>
__device__ Run load_run(const void* source) {
    return *static_cast<const Run*>(source);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }

__device__ inline uint32_t bits_of(__nv_bfloat162 pair) {
    return reinterpret_cast<const uint32_t&>(pair);
}

// Of two bf16, the first and the second as floats: one instruction each.
__device__ inline float2 unpack(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
}

// x as a T holds it. A bf16 is the upper half of a float: one conversion, nothing to unpack.
template <typename T>
__device__ float rounded(float x) {
    if constexpr (sizeof(T) == 4) return x;
    return __uint_as_float(bits_of(__floats2bfloat162_rn(0.0f, x)));
}

__device__ inline uint32_t encode_e4m3(float a, float b, float c, float d) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
}

// What a lane has of a vector of kDim elements: kOwn / 2 neighbours of either half, so that RoPE's
// pairs meet in a lane.
template <typename T, int kDim, int kOwn>
struct Share {
    static constexpr int kLanes = kDim / kOwn;  // of a vector
    static constexpr int kRun = kOwn / 2;
    static constexpr int kHalf = kDim / 2;
    static constexpr int kVectors = kPrepareThreads / kLanes;  // of a block, at a time
    static constexpr float kNormalize = kDim == 32   ? 0.17677669529663687f
                                        : kDim == 64 ? 0.125f
                                                     : 0.08838834764831845f;
    // Di^-0.5 = 2^-3 commutes with rounding (but to infinity: a |y| of 2^125 may count as infinite)
    // and goes into the scale alone.
    static constexpr int kFoldedBits = kDim == 64 ? 3 : 0;

    using Floats = Run<float, kRun>;
    using Codes = Run<uint32_t, kRun / 4>;

    const int lane = threadIdx.x % kLanes;
    const int first = lane * kRun;
    float x[2][kRun];
    Codes codes[2];

    // As it lies in memory.
    struct Raw {
        Run<uint32_t, kRun * sizeof(T) / 4> half[2];
    };

    __device__ Raw fetch(const T* vector) const {
        using Half = Run<uint32_t, kRun * sizeof(T) / 4>;
        return {load_run<Half>(vector + first), load_run<Half>(vector + first + kHalf)};
    }

    __device__ void set(const Raw& raw) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
            const uint32_t word = raw.half[i / kRun].at[i % kRun * sizeof(T) / 4];
            float& own = x[i / kRun][i % kRun];
            if constexpr (sizeof(T) == 4) {
                own = __uint_as_float(word);
            } else {
                own = i % 2 == 0 ? unpack(word).x : unpack(word).y;
            }
        }
    }

    // The vector's elements joined by `add`: fours of either half in turn, then a tree of sums. The
    // same order whatever kOwn.
    template <class Add>
    __device__ float sum(const Add& add) const {
        constexpr int kFours = kRun / 4;
        float total[kFours];
#pragma unroll
        for (int j = 0; j < kFours; ++j) {
            total[j] = 0.0f;
#pragma unroll
            for (int i = 0; i < 8; ++i) total[j] = add(total[j], x[i / 4][4 * j + i % 4]);
        }
#pragma unroll
        for (int distance = 1; distance < kFours; distance *= 2)
#pragma unroll
            for (int j = 0; j < kFours; j += 2 * distance) total[j] += total[j + distance];
#pragma unroll
        for (int distance = 1; distance < kLanes; distance *= 2)
            total[0] += __shfl_xor_sync(~0u, total[0], distance);
        return total[0];
    }

    __device__ float inverse_rms(float eps) const {
        const float squares = sum([](float total, float v) { return fmaf(v, v, total); });
        return __frsqrt_rn(squares * (1.0f / kDim) + eps);
    }

    __device__ void rms_norm(const float* weight, float eps) {
        const float inverse = inverse_rms(eps);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Floats w = load_run<Floats>(weight + first + half * kHalf);
#pragma unroll
            for (int i = 0; i < kRun; ++i) x[half][i] = rounded<T>(x[half][i] * inverse * w.at[i]);
        }
    }

    __device__ void layer_norm(const float* weight, const float* bias, float eps) {
        const float mean = sum([](float total, float v) { return total + v; }) * (1.0f / kDim);
#pragma unroll
        for (int i = 0; i < kRun; ++i) x[0][i] -= mean, x[1][i] -= mean;
        const float inverse = inverse_rms(eps);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Floats w = load_run<Floats>(weight + first + half * kHalf);
            const Floats b = load_run<Floats>(bias + first + half * kHalf);
#pragma unroll
            for (int i = 0; i < kRun; ++i)
                x[half][i] = rounded<T>(fmaf(x[half][i] * inverse, w.at[i], b.at[i]));
        }
    }

    // By a row of cos, then sin.
    __device__ void rotate(const float* table) {
        const Floats cos = load_run<Floats>(table + first);
        const Floats sin = load_run<Floats>(table + first + kHalf);
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
            const float low = x[0][i], high = x[1][i];
            x[0][i] = rounded<T>(fmaf(-high, sin.at[i], low * cos.at[i]));
            x[1][i] = rounded<T>(fmaf(low, sin.at[i], high * cos.at[i]));
        }
    }

    __device__ static void butterfly(float& a, float& b) {
        const float sum = a + b, difference = a - b;
        a = sum, b = difference;
    }

    // Times Di^-0.5, unless that is folded into the scale.
    __device__ void hadamard() {
#pragma unroll
        for (int distance = 1; distance < kRun; distance *= 2)
#pragma unroll
            for (int i = 0; i < kRun; ++i)
                if ((i & distance) == 0)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        butterfly(x[half][i], x[half][i + distance]);
#pragma unroll
        for (int distance = 1; distance < kLanes; distance *= 2) {
            const float sign = lane & distance ? -1.0f : 1.0f;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) {
                float& own = x[i / kRun][i % kRun];
                own = fmaf(own, sign, __shfl_xor_sync(~0u, own, distance));
            }
        }
#pragma unroll
        for (int i = 0; i < kRun; ++i) butterfly(x[0][i], x[1][i]);
        if constexpr (kFoldedBits == 0) {
#pragma unroll
            for (int i = 0; i < kRun; ++i) x[0][i] *= kNormalize, x[1][i] *= kNormalize;
        }
    }

    // Sets the codes and returns the scale.
    __device__ float quantize() {
        if constexpr (sizeof(T) == 4) {
            float amax = 0.0f;
#pragma unroll
            for (int i = 0; i < kOwn; ++i) amax = max_nan(amax, fabsf(x[i / kRun][i % kRun]));
#pragma unroll
            for (int distance = 1; distance < kLanes; distance *= 2)
                amax = max_nan(amax, __shfl_xor_sync(~0u, amax, distance));
            const Scale scale(__float_as_uint(amax));
#pragma unroll
            for (int i = 0; i < kOwn; i += 4) {
                const float* y = &x[i / kRun][i % kRun];
                codes[i / kRun].at[i % kRun / 4] =
                    encode_e4m3(y[0] * scale.inverse, y[1] * scale.inverse, y[2] * scale.inverse,
                                y[3] * scale.inverse);
            }
            return scale.value;
        } else {
            __nv_bfloat162 y[kRun], highest{}, lowest{};
#pragma unroll
            for (int i = 0; i < kRun; ++i) {
                const float* pair = &x[2 * i / kRun][2 * i % kRun];
                y[i] = __floats2bfloat162_rn(pair[0], pair[1]);
                highest = __hmax2_nan(highest, y[i]), lowest = __hmin2_nan(lowest, y[i]);
            }
            __nv_bfloat162 amax = __habs2(__hmax2_nan(highest, __hneg2(lowest)));
#pragma unroll
            for (int distance = 1; distance < kLanes; distance *= 2)
                amax = __hmax2_nan(amax, __shfl_xor_sync(~0u, amax, distance));
            const Scale scale(max(bits_of(amax) << 16, bits_of(amax) & 0xffff0000));
            const __nv_bfloat162 inverse = __float2bfloat162_rn(scale.inverse);
#pragma unroll
            for (int i = 0; i < kRun; i += 2) {
                const float2 a = unpack(bits_of(__hmul2(y[i], inverse)));
                const float2 b = unpack(bits_of(__hmul2(y[i + 1], inverse)));
                codes[2 * i / kRun].at[2 * i % kRun / 4] = encode_e4m3(a.x, a.y, b.x, b.y);
            }
            return scale.value;
        }
    }

    // From the bits of max |x|: the scale, and what makes codes of x; both NaN if x is not finite.
    // 448 is 1.75 * 2^8: the exponent goes up by one where the mantissa exceeds 1.75.
    struct Scale {
        float value, inverse;

        __device__ explicit Scale(uint32_t amax) {
            constexpr uint32_t kFloor = 0x38d1b717, kNan = 0x7fc00000;  // 1e-4
            amax = max(amax, kFloor + (kFoldedBits << 23));
            const uint32_t exponent = (amax + 0x1fffff) >> 23;
            const bool finite = amax < 0x7f800000;
            value = __uint_as_float(finite ? (exponent - 8 - kFoldedBits) << 23 : kNan);
            inverse = __uint_as_float(finite ? (262 - exponent) << 23 : kNan);
        }
    };

    __device__ void store(uint8_t* vector) const {
        *reinterpret_cast<Codes*>(vector + first) = codes[0];
        *reinterpret_cast<Codes*>(vector + first + kHalf) = codes[1];
    }
};

__device__ inline float load(const NormWeight& weight, int i) {
    return weight.is_float ? static_cast<const float*>(weight.data)[i]
                           : to_float(static_cast<const bf16*>(weight.data)[i]);
}

// Element i of an array with a stride of so many bytes.
template <typename T>
__device__ const T* element(const void* array, uint32_t i, int64_t stride) {
    return reinterpret_cast<const T*>(static_cast<const char*>(array) + i * stride);
}

template <typename T, int kDim, int kOwn>
struct PrepareStorage {
    static constexpr int kVectors = Share<T, kDim, kOwn>::kVectors;
    alignas(16) float weight[kDim];
    alignas(16) float bias[kDim];
    alignas(16) float table[kVectors][kDim + 4];  // of each token cos, then sin; no bank conflicts

    // Asks for the rows of the table, of tokens [first, first + count).
    __device__ void copy_table(const IndexerPrepareParams& p, uint32_t first, int count) {
        constexpr int kPieces = kDim / 4;  // of a row
        const int piece = threadIdx.x % kPieces;
        const bool is_cos = piece < kPieces / 2;
        const float* source = is_cos ? p.cos + 4 * piece : p.sin + (4 * piece - kDim / 2);
        const int64_t stride = is_cos ? p.cos_stride : p.sin_stride;
#pragma unroll 1
        for (int t = threadIdx.x / kPieces; t < count; t += kPrepareThreads / kPieces)
            copy_async(&table[t][4 * piece], element<float>(source, first + t, stride));
    }

    // Lets the block read the table, and this thread's element of weight and bias.
    __device__ void complete(float w, float b) {
        weight[threadIdx.x % kDim] = w, bias[threadIdx.x % kDim] = b;
        copy_async_wait();
        __syncthreads();
    }
};

template <typename T, int kDim, int kOwn>
__global__ void __launch_bounds__(kPrepareThreads, kBlocksPerSm<T>)
    indexer_prepare_kernel(const IndexerPrepareParams p) {
    using Share = Share<T, kDim, kOwn>;
    static_assert(kDim <= kPrepareThreads);
    __shared__ PrepareStorage<T, kDim, kOwn> s;
    const int i = threadIdx.x % kDim;  // this thread's element of the weights
    const int vector = threadIdx.x / Share::kLanes;
    wait_for_kernels_before();
    let_next_kernel_start();
    Share share;
    if (blockIdx.x < p.query_blocks) {
        const auto token_of = [&](uint32_t query) {
            return static_cast<uint32_t>(uint64_t{query} * p.token_factor >> p.token_shift);
        };
        const uint32_t first = blockIdx.x * p.block_queries;
        const uint32_t end = min(first + p.block_queries, p.queries);
        const uint32_t first_token = token_of(first);
        struct Query {
            uint32_t row, token;
            T gate;
            typename Share::Raw raw;
        };
        const auto fetch = [&](uint32_t base) -> Query {
            const uint32_t row = min(base + vector, end - 1);
            const uint32_t token = token_of(row), head = row - token * p.heads;
            return {
                row, token, element<T>(p.gate, token, p.gate_stride)[head],
                share.fetch(element<T>(element<T>(p.q, token, p.q_stride), head, p.q_head_stride))};
        };
        Query next = fetch(first);
        s.copy_table(p, first_token, token_of(end - 1) - first_token + 1);
        s.complete(load(p.q_weight, i), 0.0f);
#pragma unroll 1
        for (uint32_t base = first; base < end; base += Share::kVectors) {
            const Query query = next;
            share.set(query.raw);
            if (base + Share::kVectors < end) next = fetch(base + Share::kVectors);
            share.rms_norm(s.weight, p.eps);
            share.rotate(s.table[query.token - first_token]);
            share.hadamard();
            const float scale = share.quantize();
            if (base + vector >= end) return;
            share.store(p.q_codes + uint64_t{query.row} * kDim);
            if (share.lane == 0)
                p.weights[query.row] = to_float(query.gate) * scale * Share::kNormalize;
        }
    } else {
        const uint32_t first = (blockIdx.x - p.query_blocks) * Share::kVectors;
        const uint32_t last = min(first + Share::kVectors, p.tokens) - 1;
        const uint32_t token = min(first + vector, last);
        const int64_t slot = p.cache ? p.slots[token] : -1;
        share.set(share.fetch(element<T>(p.k, token, p.k_stride)));
        s.copy_table(p, first, last - first + 1);
        s.complete(load(p.k_weight, i), load(p.k_bias, i));
        share.layer_norm(s.weight, s.bias, p.eps);
        share.rotate(s.table[token - first]);
        share.hadamard();
        const float scale = share.quantize();
        if (first + vector > last) return;
        share.store(p.k_codes + uint64_t{token} * kDim);
        if (share.lane == 0) p.k_scale[token] = scale;
        if (slot < 0 || slot >= p.cache_slots) return;
        uint8_t* page = p.cache + slot / 64 * p.page_stride;
        share.store(page + slot % 64 * kDim);
        if (share.lane == 0) reinterpret_cast<float*>(page + 64 * kDim)[slot % 64] = scale;
    }
}

}  // namespace dsa
