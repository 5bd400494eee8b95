// topk_select of a row that fits into the shared memory of one block, up to 32768 columns.
//
// A thread owns 32 neighbouring columns and describes them by a word, a bit each. While TMA brings
// the row, a sample of an eighth of it, read from memory, says between which two scores the topk-th
// will lie. One walk over the row then knows the columns above this bracket, which belong, and
// those inside, of which a few hundred are left; 1024 equal bins over the bracket leave one bin,
// which mostly holds one column. Nothing is moved until the end, when every thread writes the
// positions of its bits, in order, over the row it no longer needs.
//
// No guess has to be right: the columns above the bracket and inside are counted, and if the
// topk-th is not among those inside, or equal scores fill a bin, the radix select of
// common/candidates.cuh looks at what is left open, be it the whole row.
//
// Shared memory is read in vectors of 16 bytes. Those of a thread follow each other, so that eight
// threads would read the same four banks; each begins at another one of its vectors and rotates the
// word afterwards. Measured on an H200: 72 us for 4096 rows of 8192, six blocks an SM, of which
// reading is 40; 267 us for 4096 of 32768, one block an SM, of which reading is 134.
#pragma once

#include <cuda_bf16.h>

#include "common/candidates.cuh"
#include "topk_select/row.cuh"

namespace dsa {

constexpr int kWordColumns = 32;  // of a thread
constexpr int kMostBracketThreads = 1024;
constexpr int kFewestBracketed = 1024;  // columns of a row

struct BracketStorage {
    SelectScratch scratch;
    Cut found[2];
    ScoreRange range[32];  // of each warp's sample
    uint32_t above;        // columns above the bracket,
    uint32_t inside;       // and inside
    uint64_t full;
    alignas(16) uint8_t row[];  // in the end its members
};

// The columns of a thread that are still open.
template <typename T>
struct OpenColumns {
    uint32_t word;
    const T* scores;  // of its 32 columns
};

// Each lane its own columns; those that do not exist have the key 0.
template <class Group, typename T, class F>
__device__ __forceinline__ void for_each(const Group&, const OpenColumns<T>& open, const F& f) {
    uint32_t word = open.word;
#pragma unroll 1
    while (__any_sync(~0u, word != 0)) {
        uint32_t keys[kLaneCandidates];
#pragma unroll
        for (int u = 0; u < kLaneCandidates; ++u, word &= word - 1)
            keys[u] = word != 0 ? order_key(static_cast<float>(open.scores[__ffs(word) - 1])) : 0;
        constexpr Candidate kUnused[kLaneCandidates] = {};
        f(keys, kUnused);
    }
}

template <typename T, int kThreads>
struct BracketSelect {
    static constexpr int kVector = 16 / sizeof(T);
    static constexpr int kVectors = kWordColumns / kVector;  // of a thread
    using Group = ThreadGroup<kThreads>;
    union Vector {
        uint4 raw;
        T value[kVector];
    };
    // Where the topk-th score lies: above `low`, up to `high`; and bins for those inside.
    struct Bracket {
        float low, high;
        EqualBins inside;
    };

    const Row<T>& row;
    const int topk;
    BracketStorage& s;
    const Group group{static_cast<int>(threadIdx.x), 0};
    const int first = kWordColumns * threadIdx.x;
    const T* own = reinterpret_cast<const T*>(s.row) + first;
    uint32_t members = 0;  // a bit for each of the own columns
    uint32_t open = bits_below(row.end - first) & ~bits_below(row.begin - first);

    static __device__ uint32_t bits_below(int n) {
        return n <= 0 ? 0 : ~0u >> (kWordColumns - min(n, kWordColumns));
    }

    // Whole vectors: the first and the last hold at least one column of the row.
    __device__ void start_loading() {
        if (threadIdx.x == 0) {
            const uint32_t bytes = (row.end + kVector - 1) / kVector * 16;
            mbarrier_init(&s.full, 1);
            fence_mbarrier_init();
            mbarrier_arrive_expect(&s.full, bytes);
            s.above = s.inside = 0;
            bulk_load(s.row, row.scores, bytes, &s.full);
        }
    }

    // The bins, counted from the top, that hold the `first`-th and the `second`-th value; a warp
    // looks for each, while the others wait. There are that many, and at least one.
    __device__ void find_bins(int first, int second) {
        group.sync();
        if (group.warp() < 2) {
            const ThreadGroup<32> warp{group.lane(), 0};
            const Cut cut = find_bin(warp, s.scratch, group.warp() == 0 ? first : second);
            if (group.lane() == 0) s.found[group.warp()] = cut;
        }
        group.sync();
    }

    __device__ void count(int bin) { shared_add(shared_address(s.scratch.histogram) + bin * 4, 1); }

    // From every eighth vector or so. Four standard deviations of the sample on either side.
    __device__ Bracket guess() {
        const int first_vector = (row.begin + kVector - 1) / kVector;
        const int vectors = row.length() / (8 * kVector);  // at most one a thread
        const int step = (row.end / kVector - first_vector) / vectors;
        const bool sampled = threadIdx.x < vectors;
        Vector sample{};
        if (sampled)
            sample.raw = __ldg(reinterpret_cast<const uint4*>(row.scores) + first_vector +
                               threadIdx.x * step);
        ScoreRange range;
#pragma unroll
        for (int v = 0; v < kVector; ++v) range.add(static_cast<float>(sample.value[v]), sampled);
        range.add_lanes();
        if (group.lane() == 0) s.range[group.warp()] = range;
        group.sync();
        range = s.range[group.lane() % Group::kWarps];
        range.add_lanes();
        const EqualBins bins(range.low, range.high);
        if (sampled) {
#pragma unroll
            for (int v = 0; v < kVector; ++v) count(bins.bin(static_cast<float>(sample.value[v])));
        }
        const float share = static_cast<float>(topk) / row.length();
        const int sample_size = vectors * kVector;
        const float expected = sample_size * share;
        const float margin = 4.0f * sqrtf(expected * (1.0f - share)) + 1.0f;
        const int below = static_cast<int>(expected + margin);
        const int above = static_cast<int>(expected - margin);
        find_bins(min(below, sample_size), max(above, 1));
        const int low_bin = s.found[0].value, high_bin = s.found[1].value;
        Bracket bracket{-INFINITY, INFINITY, bins};
        if (below < sample_size && low_bin > 0) bracket.low = range.low = bins.edge(low_bin);
        if (above > 0 && high_bin < kBins - 1) bracket.high = range.high = bins.edge(high_bin + 1);
        bracket.inside = EqualBins(range.low, range.high);
        return bracket;
    }

    // Which scores beat a bound is a sign each, without a comparison: none of a NaN, none of 0.
    static __device__ uint32_t shift_in_sign(uint32_t word, float difference) {
        return __funnelshift_l(__float_as_uint(difference), word, 1);
    }

    // Which of the open columns are members for sure; `wanted` of the `count` that stay open
    // belong.
    __device__ Cut apply(const Bracket& bracket) {
        uint32_t above = 0, inside = 0;
        if (open != 0) {
            const uint32_t turn = threadIdx.x * 4 / kVector % kVectors;  // 8 threads, all banks
#pragma unroll
            for (int j = kVectors - 1; j >= 0; --j) {
                Vector vector;
                vector.raw = reinterpret_cast<const uint4*>(own)[(j + turn) % kVectors];
#pragma unroll
                for (int v = kVector - 1; v >= 0; --v) {
                    const float score = static_cast<float>(vector.value[v]);
                    above = shift_in_sign(above, bracket.high - score);
                    inside = shift_in_sign(inside, bracket.low - score);
                }
            }
            above = __funnelshift_l(above, above, turn * kVector) & open;
            inside = __funnelshift_l(inside, inside, turn * kVector) & open & ~above;
        }
        const uint32_t warp_above = __reduce_add_sync(~0u, __popc(above));
        const uint32_t warp_inside = __reduce_add_sync(~0u, __popc(inside));
        if (group.lane() == 0) {
            shared_add(shared_address(&s.above), warp_above);
            shared_add(shared_address(&s.inside), warp_inside);
        }
        group.sync();
        const int all_above = s.above, all_inside = s.inside;
        if (topk <= all_above || all_above + all_inside < topk) return whole_row();
        for_each_column(inside, [&](int, float score) { count(bracket.inside.bin(score)); });
        find_bins(topk - all_above, 1);
        const Cut cut = s.found[0];
        const int cut_bin = cut.value;
        members = above;
        open = 0;
        for_each_column(inside, [&](uint32_t bit, float score) {
            const int bin = bracket.inside.bin(score);
            if (bin > cut_bin) members |= bit;
            if (bin == cut_bin) open |= bit;
        });
        return cut;
    }

    __device__ Cut whole_row() const { return {0, topk, row.length()}; }

    template <class F>
    __device__ void for_each_column(uint32_t word, const F& f) {
#pragma unroll 1
        for (; word != 0; word &= word - 1)
            f(word & -word, static_cast<float>(own[__ffs(word) - 1]));
    }

    // The best `wanted` of what is open become members: those above the last key, and as many as
    // are left of those that equal it, the earliest first.
    __device__ void settle(int wanted) {
        const OpenColumns<T> columns{open, own};
        const Cut cut = find_key(group, s.scratch, columns, wanted);
        uint32_t equal = 0;
        for_each_column(open, [&](uint32_t bit, float score) {
            const uint32_t key = order_key(score);
            if (key > cut.value) members |= bit;
            if (key == cut.value) equal |= bit;
        });
        int all;
        const int before = sum_before(group, s.scratch, __popc(equal), all);
        for (int left = cut.wanted - before; equal != 0 && left > 0; --left, equal &= equal - 1)
            members |= equal & -equal;
        group.sync();
    }

    __device__ void select() {
        start_loading();
        clear_histogram(group, s.scratch);
        Cut cut = whole_row();
        if (row.length() >= kFewestBracketed) {
            const Bracket bracket = guess();
            clear_histogram(group, s.scratch);
            mbarrier_wait(&s.full, 0);
            cut = apply(bracket);
        } else {
            mbarrier_wait(&s.full, 0);
        }
        if (cut.wanted == cut.count) {
            members |= open;
        } else {
            settle(cut.wanted);
        }
    }

    // Writes the positions of the members, ascending.
    __device__ void write() {
        int all;
        int at = sum_before(group, s.scratch, __popc(members), all);  // nobody reads the row now
        int32_t* chosen = reinterpret_cast<int32_t*>(s.row);
#pragma unroll 1
        for (uint32_t word = members; word != 0; word &= word - 1)
            chosen[at++] = first - row.begin + __ffs(word) - 1;
        group.sync();
#pragma unroll 1
        for (int i = threadIdx.x; i < topk; i += kThreads) row.out[i] = chosen[i];
    }
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, kMostBracketThreads * 3 / 2 / kThreads)
    topk_select_bracket_kernel(const TopkSelectParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    wait_for_kernels_before();
    const Row<T> row(p, blockIdx.x);
    if (row.take_all(p.topk, threadIdx.x, kThreads)) return;
    BracketSelect<T, kThreads> select{row, p.topk, *reinterpret_cast<BracketStorage*>(shared)};
    select.select();
    select.write();
}

}  // namespace dsa
