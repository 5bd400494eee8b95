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

// What a group needs in shared memory for a cut.
struct SelectScratch {
    uint32_t histogram[kBins];
    uint32_t low[16];
    uint32_t high[16];
    uint32_t found_bin;
    int found_rank;
    int found_count;
    int kept;
};

// The values of a list that are at least `value`, `wanted` of the `count` in the last bin looked at
// included.
struct Cut {
    uint32_t value;
    int wanted;
    int count;
};

// The candidates that belong: a key above, or the same key at a position up to `last`.
struct Threshold {
    uint32_t key;
    int32_t last;
};

// The bin, counted from the top, that holds the `wanted`-th value.
template <class Group>
__device__ Cut find_bin(const Group& group, SelectScratch& s, int wanted) {
    constexpr int kOwn = kBins / Group::kThreads;  // bins of a thread
    uint32_t counts[kOwn], sum = 0;
    const int top = kBins - 1 - group.thread * kOwn;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sum += counts[j] = s.histogram[top - j];
    uint32_t inclusive = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const uint32_t other = __shfl_up_sync(~0u, inclusive, offset);
        if (group.lane() >= offset) inclusive += other;
    }
    if (group.lane() == 31) s.low[group.warp()] = inclusive;
    group.sync();
    uint32_t before = inclusive - sum;
    for (int w = 0; w < group.warp(); ++w) before += s.low[w];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
        if (before < wanted && wanted <= before + counts[j]) {
            s.found_bin = top - j;
            s.found_rank = wanted - before;
            s.found_count = counts[j];
        }
        before += counts[j];
    }
    group.sync();
    return {s.found_bin, s.found_rank, s.found_count};
}

// Cuts the values value(0) ... value(n - 1), without those that are 0, at the `wanted`-th largest;
// at least that many must be there. Where count equals wanted the cut may lie below the value
// itself, with nothing between.
template <class Group, class Value>
__device__ Cut find_cut(const Group& group, SelectScratch& s, int n, Value value, int wanted) {
    uint32_t low = ~0u, high = 0;
#pragma unroll 4
    for (int i = group.thread; i < n; i += Group::kThreads) {
        const uint32_t v = value(i);
        low = v ? min(low, v) : low;
        high = max(high, v);
    }
    low = __reduce_min_sync(~0u, low);
    high = __reduce_max_sync(~0u, high);
    if (group.lane() == 0) s.low[group.warp()] = low, s.high[group.warp()] = high;
    group.sync();
#pragma unroll
    for (int w = 0; w < Group::kWarps; ++w) low = min(low, s.low[w]), high = max(high, s.high[w]);
    while (true) {
        const int shift = max(32 - __clz(high - low) - kLogBins, 0);
        for (int i = group.thread; i < kBins; i += Group::kThreads) s.histogram[i] = 0;
        group.sync();
#pragma unroll 4
        for (int i = group.thread; i < n; i += Group::kThreads) {
            const uint32_t v = value(i);  // 0 lies outside the range: low is at least 1
            if (v - low <= high - low) atomicAdd(&s.histogram[(v - low) >> shift], 1);
        }
        group.sync();
        const Cut bin = find_bin(group, s, wanted);
        low += bin.value << shift;
        high = min(high, low + ((1u << shift) - 1));
        wanted = bin.wanted;
        if (shift == 0 || wanted == bin.count) return {low, wanted, bin.count};
    }
}

// The threshold of the best `topk` among n candidates, at least topk of which are not 0; keys[i] in
// shared memory.
template <class Group>
__device__ Threshold find_threshold(const Group& group, SelectScratch& s, int n,
                                    const uint32_t* keys, const int32_t* positions, int topk) {
    const Cut cut = find_cut(group, s, n, [&](int i) { return keys[i]; }, topk);
    if (cut.wanted == cut.count) return {cut.value, INT_MAX};
    const auto earliness = [&](int i) {
        return keys[i] == cut.value ? 0x80000000u - positions[i] : 0u;
    };
    const Cut tie = find_cut(group, s, n, earliness, cut.wanted);
    return {cut.value, static_cast<int32_t>(0x80000000u - tie.value)};
}

// Moves the candidates that belong to the front of `keys` and `positions`; `view` holds the keys to
// judge by, and may be `keys` itself. A step reads its candidates before anything is written, and
// writes no further than it has read.
template <class Group>
__device__ void keep(const Group& group, SelectScratch& s, int n, const uint32_t* view,
                     Threshold threshold, uint32_t* keys, int32_t* positions) {
    constexpr int kOwn = 4;
    if (group.thread == 0) s.kept = 0;
    for (int base = 0; base < n; base += kOwn * Group::kThreads) {
        uint32_t key[kOwn];
        int32_t position[kOwn];
#pragma unroll
        for (int u = 0; u < kOwn; ++u) {
            const int i = base + u * Group::kThreads + group.thread;
            key[u] = i < n ? view[i] : 0;
            position[u] = 0;
            if (key[u] != 0 && key[u] >= threshold.key) {
                position[u] = positions[i];
                if (key[u] == threshold.key && position[u] > threshold.last) key[u] = 0;
            } else {
                key[u] = 0;
            }
        }
        group.sync();
#pragma unroll
        for (int u = 0; u < kOwn; ++u) {
            const uint32_t ballot = __ballot_sync(~0u, key[u] != 0);
            int place = 0;
            if (ballot != 0 && group.lane() == 0) place = atomicAdd(&s.kept, __popc(ballot));
            place = __shfl_sync(~0u, place, 0) + __popc(ballot & group.lanes_below());
            if (key[u] != 0) keys[place] = key[u], positions[place] = position[u];
        }
    }
    group.sync();
}

// Writes positions[0, count), distinct and in [0, length), ascending. `bitmap` is `words` words of
// shared memory.
template <class Group>
__device__ void write_ascending(const Group& group, SelectScratch& s, const int32_t* positions,
                                int count, int length, uint32_t* bitmap, int words, int32_t* out) {
    for (int64_t base = 0; base < length; base += 32 * words) {
        const int used = static_cast<int>(min((length - base + 31) / 32, int64_t{words}));
        for (int i = group.thread; i < used; i += Group::kThreads) bitmap[i] = 0;
        group.sync();
        for (int i = group.thread; i < count; i += Group::kThreads) {
            const int64_t bit = positions[i] - base;
            if (bit >= 0 && bit < 32 * words) atomicOr(&bitmap[bit / 32], 1u << (bit % 32));
        }
        group.sync();
        // Each warp owns a run of words: first its number of bits, then, with those of the warps
        // before it, the places.
        const int run = ((used + Group::kWarps - 1) / Group::kWarps + 31) / 32 * 32;
        const int begin = group.warp() * run, end = min(begin + run, used);
        int bits = 0;
        for (int i = begin + group.lane(); i < end; i += 32) bits += __popc(bitmap[i]);
        bits = __reduce_add_sync(~0u, bits);
        if (group.lane() == 0) s.low[group.warp()] = bits;
        group.sync();
        int place = 0, all = 0;
#pragma unroll
        for (int w = 0; w < Group::kWarps; ++w) {
            if (w < group.warp()) place += s.low[w];
            all += s.low[w];
        }
        for (int i = begin; i < end; i += 32) {
            uint32_t word = i + group.lane() < end ? bitmap[i + group.lane()] : 0;
            int inclusive = __popc(word);
            const int own = inclusive;
#pragma unroll
            for (int offset = 1; offset < 32; offset *= 2) {
                const int other = __shfl_up_sync(~0u, inclusive, offset);
                if (group.lane() >= offset) inclusive += other;
            }
            int at = place + inclusive - own;
            const int32_t first = static_cast<int32_t>(base) + 32 * (i + group.lane());
            for (; word != 0; word &= word - 1) out[at++] = first + __ffs(word) - 1;
            place += __shfl_sync(~0u, inclusive, 31);
        }
        out += all;
        group.sync();
    }
}

}  // namespace dsa
