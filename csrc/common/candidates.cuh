// Exact selection on the GPU: a group of threads cuts a list of candidates down to the best `topk`,
// in the order (score descending, position ascending), and writes their positions ascending.
//
// Two kernels stream scores past a bound and append what beats it to a list (topk_select,
// indexer_topk). When the list is full, the group finds the topk-th best, drops what is worse and
// goes on with a higher bound. That is exact for any input: the bound is the score of a candidate
// that topk - 1 others equal or beat, and keys come in ascending order from one cut to the next, so
// what only ties with the bound comes too late.
//
// A cut is a radix select whose digits follow the data: with the smallest and largest key of the
// list known, one pass spreads them over 1024 bins, and the next looks at the one bin that holds
// the topk-th. Scores above a bound are a narrow slice of floating point; a fixed digit would send
// them all to a few bins, whose atomics would queue up.
#pragma once

#include <climits>
#include <cstdint>

#include "common/ptx.cuh"

namespace dsa {

// An integer that orders as the scores do: NaN below everything, -0.0 equal to +0.0. 0 is no
// candidate.
__device__ __forceinline__ uint32_t order_key(float score) {
    if (score != score) return 1;
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0.0 + 0.0 is +0.0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);  // 1 gives a NaN again
}

// Whether a score may still belong to the set: it beats the bound, or one of the two is NaN.
__device__ __forceinline__ bool passes(float score, float bound) { return !(score <= bound); }

// kSize threads that meet at a named barrier of their own.
template <int kSize>
struct ThreadGroup {
    static constexpr int kThreads = kSize;
    static constexpr int kWarps = kSize / 32;
    int thread;   // of the group
    int barrier;  // its number

    __device__ void sync() const { named_barrier_sync(barrier, kThreads); }
    __device__ int lane() const { return thread % 32; }
    __device__ int warp() const { return thread / 32; }
    __device__ uint32_t lanes_below() const { return (1u << lane()) - 1; }
};

constexpr int kLogBins = 10;
constexpr int kBins = 1 << kLogBins;

// Where a list is cut: at least `wanted` of the `count` values that are left from `value` on
// belong.
struct Cut {
    uint32_t value;
    int wanted;
    int count;
};

// What a group needs in shared memory for a cut.
struct SelectScratch {
    uint32_t histogram[kBins];
    uint32_t low[16];
    uint32_t high[16];
    int sums[16];
    Cut found;
};

// The candidates that belong: a key above, or the same key at a position up to `last`.
struct Threshold {
    uint32_t key;
    int32_t last;
};

__device__ __forceinline__ bool belongs(uint32_t key, int32_t position, Threshold threshold) {
    return key > threshold.key || (key == threshold.key && key != 0 && position <= threshold.last);
}

// Calls f(i, four) for i = 0, 4, 8, ... < n with the four entries from `list[i]` on; on 16 bytes, n
// a multiple of 4.
template <class Four, class Group, class T, class F>
__device__ __forceinline__ void for_each_four(const Group& group, const T* list, int n,
                                              const F& f) {
    constexpr int kUnroll = 4;
    for (int base = 4 * group.thread; base < n; base += 4 * kUnroll * Group::kThreads) {
        Four four[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int i = base + 4 * u * Group::kThreads;
            four[u] = i < n ? *reinterpret_cast<const Four*>(list + i) : Four{0, 0, 0, 0};
        }
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) f(base + 4 * u * Group::kThreads, four[u]);
    }
}

// The sum over the threads before this one; `all` becomes the sum over the whole group.
template <class Group>
__device__ int sum_before(const Group& group, SelectScratch& s, int own, int& all) {
    int inclusive = own;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(~0u, inclusive, offset);
        if (group.lane() >= offset) inclusive += other;
    }
    if (group.lane() == 31) s.sums[group.warp()] = inclusive;
    group.sync();
    int before = inclusive - own;
    all = 0;
#pragma unroll
    for (int w = 0; w < Group::kWarps; ++w) {
        if (w < group.warp()) before += s.sums[w];
        all += s.sums[w];
    }
    return before;
}

// The bin, counted from the top, that holds the `wanted`-th value.
template <class Group>
__device__ Cut find_bin(const Group& group, SelectScratch& s, int wanted) {
    constexpr int kOwn = kBins / Group::kThreads;  // bins of a thread
    int counts[kOwn], sum = 0, all;
    const int top = kBins - 1 - group.thread * kOwn;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sum += counts[j] = s.histogram[top - j];
    int before = sum_before(group, s, sum, all);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        if (before < wanted && wanted <= before + counts[j])
            s.found = {static_cast<uint32_t>(top - j), wanted - before, counts[j]};
        before += counts[j];
    }
    group.sync();
    return s.found;
}

// Cuts the values value(key, position), without those that are 0, at the `wanted`-th largest; at
// least that many must be there. Positions are read only if `kTies`. Where count equals wanted the
// cut may lie below the value itself, with nothing between.
template <bool kTies, class Group, class Value>
__device__ Cut find_cut(const Group& group, SelectScratch& s, int n, const uint32_t* keys,
                        const int32_t* positions, const Value& value, int wanted) {
    const auto for_each_value = [&](const auto& f) {
        for_each_four<uint4>(group, keys, n, [&](int i, uint4 key) {
            int4 position = {0, 0, 0, 0};
            if (kTies && i < n) position = *reinterpret_cast<const int4*>(positions + i);
            f(value(key.x, position.x));
            f(value(key.y, position.y));
            f(value(key.z, position.z));
            f(value(key.w, position.w));
        });
    };
    uint32_t low = ~0u, high = 0;
    for_each_value([&](uint32_t v) {
        low = min(low, v - 1);  // 0 becomes the largest
        high = max(high, v);
    });
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (group.lane() == 0) s.low[group.warp()] = low, s.high[group.warp()] = high;
    for (int i = group.thread; i < kBins; i += Group::kThreads) s.histogram[i] = 0;
    group.sync();
#pragma unroll
    for (int w = 0; w < Group::kWarps; ++w) low = min(low, s.low[w]), high = max(high, s.high[w]);
    ++low;
    while (true) {
        const int shift = max(32 - __clz(high - low) - kLogBins, 0);
        for_each_value([&](uint32_t v) {  // 0 lies outside the range: low is at least 1
            shared_add(&s.histogram[(v - low) >> shift & (kBins - 1)], 1, v - low <= high - low);
        });
        group.sync();
        const Cut bin = find_bin(group, s, wanted);
        low += bin.value << shift;
        high = min(high, low + ((1u << shift) - 1));
        wanted = bin.wanted;
        if (shift == 0 || wanted == bin.count) return {low, wanted, bin.count};
        for (int i = group.thread; i < kBins; i += Group::kThreads) s.histogram[i] = 0;
        group.sync();
    }
}

// The threshold of the best `topk` among n candidates, at least topk of which are not 0; keys in
// shared memory.
template <class Group>
__device__ Threshold find_threshold(const Group& group, SelectScratch& s, int n,
                                    const uint32_t* keys, const int32_t* positions, int topk) {
    const Cut cut = find_cut<false>(
        group, s, n, keys, positions, [](uint32_t key, int32_t) { return key; }, topk);
    if (cut.wanted == cut.count) return {cut.value, INT_MAX};
    const auto earliness = [&](uint32_t key, int32_t position) {
        return key == cut.value ? 0x80000000u - position : 0u;
    };
    const Cut tie = find_cut<true>(group, s, n, keys, positions, earliness, cut.wanted);
    return {cut.value, static_cast<int32_t>(0x80000000u - tie.value)};
}

// Moves the candidates that belong to the front of `keys` and `positions`; `list` holds the keys to
// judge by, and may be `keys` itself. A step reads its candidates before anything is written, and
// writes no further than it has read.
template <class Group>
__device__ void keep(const Group& group, SelectScratch& s, int n, const uint32_t* list,
                     Threshold threshold, uint32_t* keys, int32_t* positions) {
    constexpr int kFours = Group::kThreads > 128 ? 2 : 4;  // of a thread in a step
    int kept = 0;
    for (int base = 4 * group.thread; base < n + 4 * group.thread;
         base += 4 * kFours * Group::kThreads) {
        uint4 key[kFours];
        int4 position[kFours];
#pragma unroll
        for (int u = 0; u < kFours; ++u) {
            const int i = base + 4 * u * Group::kThreads;
            key[u] = {0, 0, 0, 0}, position[u] = {0, 0, 0, 0};
            if (i < n) {
                key[u] = *reinterpret_cast<const uint4*>(list + i);
                position[u] = *reinterpret_cast<const int4*>(positions + i);
            }
        }
        uint32_t members = 0;
        const auto for_each = [&](const auto& f) {
#pragma unroll
            for (int u = 0; u < kFours; ++u) {
                f(4 * u, key[u].x, position[u].x);
                f(4 * u + 1, key[u].y, position[u].y);
                f(4 * u + 2, key[u].z, position[u].z);
                f(4 * u + 3, key[u].w, position[u].w);
            }
        };
        for_each([&](int i, uint32_t k, int32_t p) {
            members |= static_cast<uint32_t>(belongs(k, p, threshold)) << i;
        });
        int all;
        int place = kept + sum_before(group, s, __popc(members), all);
        kept += all;
        for_each([&](int i, uint32_t k, int32_t p) {
            if (members >> i & 1) keys[place] = k, positions[place] = p;
            place += members >> i & 1;
        });
        group.sync();
    }
}

constexpr int kBitmapWords = 4096;  // positions in a window: 131072

// Writes the positions, in [0, length), of the candidates that belong, ascending. `bitmap` is
// kBitmapWords words of shared memory, on 16 bytes.
template <class Group>
__device__ void write_ascending(const Group& group, SelectScratch& s, int n, const uint32_t* list,
                                Threshold threshold, const int32_t* positions, int length,
                                uint32_t* bitmap, int32_t* out) {
    constexpr int kRun = kBitmapWords / Group::kWarps;  // words of a warp
    static_assert(kRun % 128 == 0);
    for (int64_t base = 0; base < length; base += 32 * kBitmapWords) {
        for (int i = 4 * group.thread; i < kBitmapWords; i += 4 * Group::kThreads)
            *reinterpret_cast<uint4*>(bitmap + i) = {0, 0, 0, 0};
        group.sync();
        for_each_four<uint4>(group, list, n, [&](int i, uint4 key) {
            int4 position = {0, 0, 0, 0};
            if (i < n) position = *reinterpret_cast<const int4*>(positions + i);
            const auto mark = [&](uint32_t k, int32_t p) {
                const uint32_t bit = p - static_cast<int32_t>(base);
                shared_or(&bitmap[bit / 32 % kBitmapWords], 1u << (bit % 32),
                          belongs(k, p, threshold) && bit < 32 * kBitmapWords);
            };
            mark(key.x, position.x);
            mark(key.y, position.y);
            mark(key.z, position.z);
            mark(key.w, position.w);
        });
        group.sync();
        // Each warp owns a run of words: first its number of bits, then, with those of the warps
        // before it, the places.
        const uint32_t* run = bitmap + group.warp() * kRun;
        const auto four_words = [&](int i) {
            return *reinterpret_cast<const uint4*>(run + i + 4 * group.lane());
        };
        const auto bits_of = [](uint4 w) {
            return __popc(w.x) + __popc(w.y) + __popc(w.z) + __popc(w.w);
        };
        int bits = 0, all;
        for (int i = 0; i < kRun; i += 128) bits += bits_of(four_words(i));
        int place = __shfl_sync(~0u, sum_before(group, s, bits, all), 0);
        for (int i = 0; i < kRun; i += 128) {
            const uint4 four = four_words(i);
            int inclusive = bits_of(four);
            int at = place - inclusive;
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other = __shfl_up_sync(~0u, inclusive, offset);
                if (group.lane() >= offset) inclusive += other;
            }
            at += inclusive;
            place += __shfl_sync(~0u, inclusive, 31);
            int32_t first =
                static_cast<int32_t>(base) + 32 * (group.warp() * kRun + i + 4 * group.lane());
            for (uint32_t word : {four.x, four.y, four.z, four.w}) {
                for (; word != 0; word &= word - 1) out[at++] = first + __ffs(word) - 1;
                first += 32;
            }
        }
        out += all;
        group.sync();
    }
}

}  // namespace dsa
