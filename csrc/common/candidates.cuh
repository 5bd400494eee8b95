// Exact selection on the GPU: what a group of threads does with a list of candidates, each a score
// and a position.
//
// Two kernels stream scores past a bound and append what beats it (topk_select, indexer_topk). They
// guess the bound from a sample of the row: if at least `topk` scores beat it and the list holds
// them all, the best `topk` of the list are the set, whatever the guess was. If not, they go
// through the row again with a bound that is certain: when the list is full, it is cut to its best
// `topk`, and the bound rises to the last of these. Keys come in ascending order from one cut to
// the next, so what only ties with that bound comes too late. Exact for any input, in at most two
// passes.
//
// A cut is a radix select whose digits follow the data: with the smallest and largest key of the
// list known, one pass spreads them over 1024 bins, and the next looks at the one bin that holds
// the topk-th. Scores above a bound are a narrow slice of floating point; a fixed digit would send
// them all to a few bins, whose atomics would queue up.
#pragma once

#include <climits>
#include <cstdint>

#include "common/ptx.cuh"
#include "common/warp.cuh"

namespace dsa {

struct alignas(8) Candidate {
    float score;
    int32_t position;
};

constexpr uint32_t kNanKey = 1;

// An integer that orders as the scores do: NaN below everything, -0.0 equal to +0.0. 0 is no
// candidate.
__device__ __forceinline__ uint32_t order_key(float score) {
    if (score != score) return kNanKey;
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0.0 + 0.0 is +0.0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float score_of(uint32_t key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);  // 1 gives a NaN again
}

// Whether a score may still belong to the set: it beats the bound, or one of the two is NaN.
__device__ __forceinline__ bool passes(float score, float bound) { return !(score <= bound); }

// kSize threads: a warp, or some that meet at a named barrier of their own.
template <int kSize>
struct ThreadGroup {
    static constexpr int kThreads = kSize;
    static constexpr int kWarps = kSize / 32;
    int thread;   // of the group
    int barrier;  // its number

    __device__ void sync() const {
        if constexpr (kSize == 32) {
            __syncwarp();
        } else {
            named_barrier_sync(barrier, kThreads);
        }
    }
    __device__ int lane() const { return thread % 32; }
    __device__ int warp() const { return thread / 32; }
    __device__ uint32_t lanes_below() const { return (1u << lane()) - 1; }
};

constexpr int kLogBins = 10;
constexpr int kBins = 1 << kLogBins;
constexpr int kNoBin = kBins;

// Equal bins over a range, for any score: what lies outside counts in the first and the last, NaN
// in the first. The distance from `low`, held to [0, 1], becomes the last bits of a sum. Two
// roundings, neither of which falls as the score rises, so a bin never does.
template <int kCount>
struct EqualBins {
    static constexpr uint32_t kFirst = 0x4b000000;  // 2^23, a float whose last bit counts ones
    static constexpr uint32_t kNowhere = kFirst + kCount;  // behind the last one
    static constexpr float kSteepest = 1e30f;              // for a range of one value
    float scale;
    float shift;
    float low;
    float width;

    EqualBins() = default;
    __device__ EqualBins(float low_, float high)
        : scale(fminf(1.0f / (high - low_), kSteepest)),
          shift(-low_ * scale),
          low(low_),
          width((high - low_) / (kCount - 1)) {}
    // kFirst for the first bin.
    __device__ uint32_t number(float score) const {
        const float place = __saturatef(fmaf(score, scale, shift));
        return __float_as_uint(fmaf(place, kCount - 1, __uint_as_float(kFirst)));
    }
    __device__ int bin(float score) const { return number(score) - kFirst; }
    // About where a bin begins.
    __device__ float lower(int bin) const { return low + (bin - 0.5625f) * width; }
};

// The smallest and the largest of some scores that are finite. low > high if there are none.
struct ScoreRange {
    float low = INFINITY;
    float high = -INFINITY;

    __device__ void add(float score, bool there) {
        if (there && fabsf(score) < INFINITY) low = fminf(low, score), high = fmaxf(high, score);
    }
    __device__ void add_lanes() {
        low = score_of(__reduce_min_sync(~0u, order_key(low)));
        high = score_of(__reduce_max_sync(~0u, order_key(high)));
    }
};

// Where a list is cut: at least `wanted` of the `count` values that are left from `value` on
// belong.
struct Cut {
    uint32_t value;
    int wanted;
    int count;
};

// What a group needs in shared memory for a cut.
struct SelectScratch {
    alignas(16) uint32_t histogram[kBins + 1];  // and what counts in no bin
    union {  // of each warp, up to 32; the group meets between one and the other
        uint32_t low[32];
        int sums[32];
    };
    uint32_t high[32];
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

// A list of candidates in pieces: piece j holds count(j) of them from entry j * stride on, an even
// number. In shared memory, on 16 bytes.
template <class Count>
struct CandidateList {
    const Candidate* entries;
    int pieces;
    int stride;
    Count count;
};

// n candidates without a gap, in as many pieces as the group has warps.
template <class Group>
__device__ auto dense(const Candidate* entries, int n) {
    const int stride = (n + 2 * Group::kWarps - 1) / (2 * Group::kWarps) * 2;
    const auto count = [=](int piece) { return min(max(n - piece * stride, 0), stride); };
    return CandidateList<decltype(count)>{entries, Group::kWarps, stride, count};
}

// Calls f(keys, entries) with arrays of kLaneCandidates for all candidates, each warp a piece at a
// time, all its lanes together. The keys order as the scores do; those that are not there are 0.
constexpr int kLaneCandidates = 8;
template <class Group, class List, class F>
__device__ __forceinline__ void for_each(const Group& group, const List& list, const F& f) {
#pragma unroll 1  // code that does not fit the instruction cache costs more than a loop
    for (int piece = group.warp(); piece < list.pieces; piece += Group::kWarps) {
        const int n = list.count(piece);
        const Candidate* entries = list.entries + piece * list.stride;
#pragma unroll 1
        for (int base = 0; base < n; base += 32 * kLaneCandidates) {
            uint32_t keys[kLaneCandidates];
            Candidate own[kLaneCandidates];
#pragma unroll
            for (int u = 0; u < kLaneCandidates; u += 2) {
                const int i = base + 32 * u + 2 * group.lane();
                float4 two = {};
                if (i < n) two = *reinterpret_cast<const float4*>(entries + i);
                own[u] = {two.x, __float_as_int(two.y)};
                own[u + 1] = {two.z, __float_as_int(two.w)};
                keys[u] = i < n ? order_key(two.x) : 0;
                keys[u + 1] = i + 1 < n ? order_key(two.z) : 0;
            }
            f(keys, own);
        }
    }
}

// The sum over the threads before this one; `all` becomes the sum over the whole group.
template <class Group>
__device__ int sum_before(const Group& group, SelectScratch& s, int own, int& all) {
    const int inclusive = sum_up_to(own);
    if (group.lane() == 31) s.sums[group.warp()] = inclusive;
    group.sync();
    const int warp_sum = group.lane() < Group::kWarps ? s.sums[group.lane()] : 0;
    all = __reduce_add_sync(~0u, warp_sum);
    return __reduce_add_sync(~0u, group.lane() < group.warp() ? warp_sum : 0) + inclusive - own;
}

template <int kCount, class Group>
__device__ __forceinline__ void clear_counts(const Group& group, uint32_t* counts) {
#pragma unroll
    for (int i = 4 * group.thread; i < kCount; i += 4 * Group::kThreads)
        *reinterpret_cast<uint4*>(counts + i) = {0, 0, 0, 0};
    group.sync();
}

template <class Group>
__device__ __forceinline__ void clear_histogram(const Group& group, SelectScratch& s) {
    clear_counts<kBins>(group, s.histogram);
}

// Which count, in the order of the lanes, reaches `wanted`: its lane, what is left of `wanted`
// there, and the count. By a warp.
template <class Group>
__device__ Cut reach(const Group& group, int own, int wanted) {
    const int before = sum_up_to(own) - own;
    const uint32_t here = __ballot_sync(~0u, before < wanted && wanted <= before + own);
    const int lane = __ffs(here) - 1;
    return {static_cast<uint32_t>(lane), wanted - __shfl_sync(~0u, before, lane),
            __shfl_sync(~0u, own, lane)};
}

// The bin of kCount, counted from the top, that holds the `wanted`-th value. By a warp: a run of
// kCount / 32 bins, then the bin.
template <int kCount>
__device__ Cut find_bin(const uint32_t* counts, int wanted) {
    constexpr unsigned kRun = kCount / 32, kPieces = kRun / 4;
    static_assert(kRun <= 32 && kPieces <= 8);
    const ThreadGroup<32> warp{static_cast<int>(threadIdx.x % 32), 0};
    const auto* own = reinterpret_cast<const uint4*>(counts + kCount - kRun * (warp.lane() + 1));
    int run = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {  // eight lanes read all banks
        const uint4 four = own[(i + warp.lane() * kPieces / 8) % kPieces];
        run += four.x + four.y + four.z + four.w;
    }
    const Cut outer = reach(warp, run, wanted);
    const int top = kCount - 1 - kRun * outer.value;
    const Cut inner = reach(warp, warp.lane() < kRun ? counts[top - warp.lane()] : 0, outer.wanted);
    __syncwarp();  // the counts are read
    return {top - inner.value, inner.wanted, inner.count};
}

// The same for a group and its histogram.
template <class Group>
__device__ Cut find_bin(const Group& group, SelectScratch& s, int wanted) {
    if constexpr (Group::kWarps == 1) return find_bin<kBins>(s.histogram, wanted);
    constexpr int kOwnBins = kBins / Group::kThreads;  // bins of a thread
    int counts[kOwnBins], sum = 0, all;
    const int top = kBins - 1 - group.thread * kOwnBins;
#pragma unroll
    for (int j = 0; j < kOwnBins; ++j) sum += counts[j] = s.histogram[top - j];
    int before = sum_before(group, s, sum, all);
#pragma unroll
    for (int j = 0; j < kOwnBins; ++j) {
        if (before < wanted && wanted <= before + counts[j])
            s.found = {static_cast<uint32_t>(top - j), wanted - before, counts[j]};
        before += counts[j];
    }
    group.sync();
    return s.found;
}

// Cuts the values value(key, position), without those that are 0, at the `wanted`-th largest; at
// least that many must be there. Where count equals wanted the cut may lie below the value itself,
// with nothing between.
template <class Group, class List, class Value>
__device__ Cut find_cut(const Group& group, SelectScratch& s, const List& list, const Value& value,
                        int wanted) {
    const auto for_each_value = [&](const auto& f) {
        for_each(group, list, [&](const auto& keys, const auto& entries) {
#pragma unroll
            for (int u = 0; u < kLaneCandidates; ++u) f(value(keys[u], entries[u].position));
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
    clear_histogram(group, s);
    low = __reduce_min_sync(~0u, s.low[group.lane() % Group::kWarps]) + 1;
    high = __reduce_max_sync(~0u, s.high[group.lane() % Group::kWarps]);
    const uint32_t bins = shared_address(s.histogram);
#pragma unroll 1
    while (true) {
        const int shift = max(32 - __clz(high - low) - kLogBins, 0);
        for_each_value([&](uint32_t v) {  // 0 lies outside the range: low is at least 1
            shared_add(bins + (v - low <= high - low ? (v - low) >> shift : kNoBin) * 4, 1);
        });
        group.sync();
        const Cut bin = find_bin(group, s, wanted);
        low += bin.value << shift;
        high = min(high, low + ((1u << shift) - 1));
        wanted = bin.wanted;
        if (shift == 0 || wanted == bin.count) return {low, wanted, bin.count};
        clear_histogram(group, s);
    }
}

// The cut at the `wanted`-th best key.
template <class Group, class List>
__device__ Cut find_key(const Group& group, SelectScratch& s, const List& list, int wanted) {
    return find_cut(group, s, list, [](uint32_t key, int32_t) { return key; }, wanted);
}

// The threshold of the best `topk`, at most as many as there are.
template <class Group, class List>
__device__ Threshold find_threshold(const Group& group, SelectScratch& s, const List& list,
                                    int topk) {
    const Cut cut = find_key(group, s, list, topk);
    if (cut.wanted == cut.count) return {cut.value, INT_MAX};
    const auto earliness = [&](uint32_t key, int32_t position) {
        return key == cut.value ? 0x80000000u - position : 0u;
    };
    const Cut tie = find_cut(group, s, list, earliness, cut.wanted);
    return {cut.value, static_cast<int32_t>(0x80000000u - tie.value)};
}

// Copies the candidates that belong to `target`, which does not overlap the list.
template <class Group, class List>
__device__ void keep(const Group& group, SelectScratch& s, const List& list, Threshold threshold,
                     Candidate* target) {
    const auto members_of = [&](const auto& keys, const auto& entries) {
        uint32_t members = 0;
#pragma unroll
        for (int u = 0; u < kLaneCandidates; ++u)
            members |= static_cast<uint32_t>(belongs(keys[u], entries[u].position, threshold)) << u;
        return members;
    };
    int own = 0, all;
    for_each(group, list, [&](const auto& keys, const auto& entries) {
        own += __popc(members_of(keys, entries));
    });
    int place = __shfl_sync(~0u, sum_before(group, s, own, all), 0);
    for_each(group, list, [&](const auto& keys, const auto& entries) {
        const uint32_t members = members_of(keys, entries);
        const int inclusive = sum_up_to(__popc(members));
        int at = place + inclusive - __popc(members);
        place += __shfl_sync(~0u, inclusive, 31);
#pragma unroll
        for (int u = 0; u < kLaneCandidates; ++u) {
            if (members >> u & 1) target[at] = entries[u];
            at += members >> u & 1;
        }
    });
    group.sync();
}

// Whether a set that ends at the threshold lies above a guess, which some scores did not beat. NaN
// scores beat any bound and rank last: their number must not make up for that of the others.
__device__ __forceinline__ bool above_guess(Threshold threshold, float bound) {
    return bound != bound || threshold.key > order_key(bound);
}

// How many of `sample` candidates, drawn evenly from n, should beat a bound that at least topk of
// the n beat: five standard deviations more than topk / n of them. 0 if that is most of them: no
// guess.
__host__ __device__ inline int sample_rank(int sample, int topk, int n) {
    const float expected = static_cast<float>(sample) * topk / n;
    const int rank = static_cast<int>(expected + 5.0f * sqrtf(expected)) + 8;
    return 2 * rank > sample ? 0 : rank;
}

// The positions of the bits of a lane's four words, of which the first is `first`, to addresses in
// shared memory from `next` on; by a warp. A bit of each word at a time, without branches.
__device__ __forceinline__ void stage_bits(uint4 four, int first, uint32_t next) {
    uint32_t words[4] = {four.x, four.y, four.z, four.w}, places[4];
    int most = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int bits = __popc(words[j]);
        most = max(most, bits);
        places[j] = next;
        next += 4 * bits;
    }
    most = __reduce_max_sync(~0u, most);
#pragma unroll 1
    for (int round = 0; round < most; ++round) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            shared_store(places[j], first + 32 * j - 1 + __ffs(words[j]), words[j] != 0);
            words[j] &= words[j] - 1;
            places[j] += 4;
        }
    }
}

// Writes the positions, in [0, length), that `mark` marks, ascending: mark(set), which calls
// set(position, belongs) for all candidates, by all threads of the group. `bitmap` is kBitmapWords
// words of shared memory, on 16 bytes: so many times 32 positions are written at a time.
template <int kBitmapWords, class Group, class Mark>
__device__ void write_marked(const Group& group, SelectScratch& s, const Mark& mark, int length,
                             uint32_t* bitmap, int32_t* out) {
    constexpr int kRun = kBitmapWords / Group::kWarps;  // words of a warp
    constexpr int kStaged = kBins / Group::kWarps;      // positions that leave side by side
    static_assert(kRun % 128 == 0);
    auto* staged = reinterpret_cast<int32_t*>(s.histogram) + group.warp() * kStaged;
#pragma unroll 1
    for (int64_t base = 0; base < length; base += 32 * kBitmapWords) {
        const int words_left =
            static_cast<int>(min((length - base + 31) / 32, int64_t{kBitmapWords}));
#pragma unroll 1
        for (int i = 4 * group.thread; i < words_left; i += 4 * Group::kThreads)
            *reinterpret_cast<uint4*>(bitmap + i) = {0, 0, 0, 0};
        group.sync();
        const uint32_t words = shared_address(bitmap);
        mark([&](int32_t position, bool belongs) {
            const uint32_t bit = position - static_cast<int32_t>(base);
            shared_or(words + bit / 32 % kBitmapWords * 4,
                      belongs && bit < 32 * kBitmapWords ? 1u << (bit % 32) : 0);
        });
        group.sync();
        // Each warp owns a run of words: first its number of bits, then, with those of the warps
        // before it, the places.
        const uint32_t* run = bitmap + group.warp() * kRun;
        const int run_words = min(words_left - group.warp() * kRun, kRun);
        const auto four_words = [&](int i) {
            const int own = i + 4 * group.lane();
            return own < run_words ? *reinterpret_cast<const uint4*>(run + own) : uint4{};
        };
        const auto bits_of = [](uint4 w) {
            return __popc(w.x) + __popc(w.y) + __popc(w.z) + __popc(w.w);
        };
        int place = 0, all = 0;
        if constexpr (Group::kWarps > 1) {
            int bits = 0;
#pragma unroll 1
            for (int i = 0; i < run_words; i += 128) bits += bits_of(four_words(i));
            place = __shfl_sync(~0u, sum_before(group, s, bits, all), 0);
        }
#pragma unroll 1
        for (int i = 0; i < run_words; i += 128) {
            const uint4 four = four_words(i);
            const int inclusive = sum_up_to(bits_of(four));
            const int here = __shfl_sync(~0u, inclusive, 31);
            const int before = inclusive - bits_of(four);
            const int first =
                static_cast<int>(base) + 32 * (group.warp() * kRun + i + 4 * group.lane());
            if (here <= kStaged) {
                stage_bits(four, first, shared_address(staged + before));
                __syncwarp();
                for (int j = group.lane(); j < here; j += 32) out[place + j] = staged[j];
                __syncwarp();
            } else {
                int32_t* next = out + place + before;
                int column = first - 1;
                for (uint32_t word : {four.x, four.y, four.z, four.w}) {
#pragma unroll 1
                    for (; word != 0; word &= word - 1) *next++ = column + __ffs(word);
                    column += 32;
                }
            }
            place += here;
        }
        out += Group::kWarps > 1 ? all : place;
        group.sync();
    }
}

// Writes the positions of the candidates that belong.
template <int kBitmapWords, class Group, class List>
__device__ void write_ascending(const Group& group, SelectScratch& s, const List& list,
                                Threshold threshold, int length, uint32_t* bitmap, int32_t* out) {
    const auto mark = [&](const auto& set) {
        for_each(group, list, [&](const auto& keys, const auto& entries) {
#pragma unroll
            for (int u = 0; u < kLaneCandidates; ++u)
                set(entries[u].position, belongs(keys[u], entries[u].position, threshold));
        });
    };
    write_marked<kBitmapWords>(group, s, mark, length, bitmap, out);
}

}  // namespace dsa
