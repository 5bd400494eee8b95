// indexer_topk on Hopper, what a warp does for a token whose scores are all kept, as there are few:
// it selects from a row in L2.
//
// Two walks over the row: its scores are counted in 1024 equal bins over the range of the first of
// them, which says in which bin the topk-th lies; then a bit a column, whether it lies in a better
// bin, and the few columns of that bin are listed and compared with each other. A bin never falls
// as the score rises, so the set is exact however well the bins fit. If too many columns lie in
// one, they may mostly be equal: one of them is tried as the topk-th. If it is not, the radix
// select of common/candidates.cuh finds that.
#pragma once

#include "indexer_topk/lists.cuh"

namespace dsa {

constexpr int kWalkWords = 12;  // columns of a lane in a step of a walk; more spill
constexpr int kWalkColumns = 32 * kWalkWords;
constexpr int kMostRanked = 128;  // columns of a bin

// How many scores of a row have room in place of a list, a multiple of what a walk takes at a time.
__host__ __device__ inline int kept_columns(int capacity) {
    return capacity * static_cast<int>(sizeof(Candidate) / sizeof(float)) / kWalkColumns *
           kWalkColumns;
}

template <class Shape>
__device__ float* row_of(const IndexerTopkParams& p, int t) {
    return reinterpret_cast<float*>(list_of<Shape>(p, t));
}

// A row as a list for the radix select.
struct KeptRow {
    const float* scores;
    int length;
};

template <class F>
__device__ __forceinline__ void for_each(const ThreadGroup<32>& group, const KeptRow& row,
                                         const F& f) {
#pragma unroll 1
    for (int base = 0; base < row.length; base += 32 * kLaneCandidates) {
        uint32_t keys[kLaneCandidates];
        Candidate own[kLaneCandidates];
#pragma unroll
        for (int u = 0; u < kLaneCandidates; ++u) {
            const int i = base + 32 * u + group.lane();
            own[u] = {i < row.length ? __ldcg(row.scores + i) : 0.0f, i};
            keys[u] = i < row.length ? order_key(own[u].score) : 0;
        }
        f(keys, own);
    }
}

// Part of a walk: a lane's scores of every 32nd column from `first` + its number on.
struct WalkStep {
    float score[kWalkWords];
    int first;
    int rest;  // columns of the row from the lane's first one on

    __device__ void load(const KeptRow& row, int first_column) {
        const int lane = threadIdx.x % 32;
        first = first_column;
        rest = row.length - first - lane;
#pragma unroll
        for (int j = 0; j < kWalkWords; ++j)  // what is behind the row has room too
            score[j] = __ldcg(row.scores + first + 32 * j + lane);
    }
    __device__ bool is_there(int j) const { return 32 * j < rest; }
    // Calls f(whether word j has a column for this lane) in the form that needs no comparison where
    // the row goes on.
    template <class F>
    __device__ void for_all(const F& f) const {
        if (__all_sync(~0u, is_there(kWalkWords - 1))) {
            f([](int) { return true; });
        } else {
            f([&](int j) { return is_there(j); });
        }
    }
};

// Calls f(step) for all steps of a walk, of which `one` is the first; the next one is on its way.
template <class F>
__device__ __forceinline__ void walk(const KeptRow& row, WalkStep& one, const F& f) {
    WalkStep two;
#pragma unroll 1
    for (int first = 0;; first += 2 * kWalkColumns) {
        const int second = first + kWalkColumns, third = second + kWalkColumns;
        if (second < row.length) two.load(row, second);
        f(one);
        if (second >= row.length) return;
        if (third < row.length) one.load(row, third);
        f(two);
        if (third >= row.length) return;
    }
}

// Counts all scores in bins; returns these.
__device__ __forceinline__ EqualBins count_row(const KeptRow& row, SelectScratch& scratch) {
    WalkStep step;
    step.load(row, 0);
    clear_histogram(this_warp(), scratch);
    ScoreRange range;
#pragma unroll
    for (int j = 0; j < kWalkWords; ++j) range.add(step.score[j], step.is_there(j));
    range.add_lanes();
    const EqualBins bins(range.low, range.high);
    const uint32_t histogram = shared_address(scratch.histogram) - 4 * EqualBins::kFirst;
    constexpr uint32_t kNowhere = EqualBins::kFirst + kNoBin;
    walk(row, step, [&](const WalkStep& own) {
        own.for_all([&](const auto& is_there) {
#pragma unroll
            for (int j = 0; j < kWalkWords; ++j)
                shared_add(histogram + (is_there(j) ? bins.number(own.score[j]) : kNowhere) * 4, 1);
        });
    });
    __syncwarp();
    return bins;
}

// Two bits a column: whether its score is better than what is looked for, and whether it is at
// least as good.
template <int kMostWords>
struct RowBits {
    uint32_t* better;
    int words;

    __device__ uint32_t* passing() const { return better + kMostWords; }
    __device__ uint32_t inside(int i) const { return i < words ? passing()[i] & ~better[i] : 0; }

    __device__ __forceinline__ void mark(const KeptRow& row, WalkStep& step, const EqualBins& bins,
                                         uint32_t cut_number) const {
        const int lane = threadIdx.x % 32;
        walk(row, step, [&](const WalkStep& own) {
            own.for_all([&](const auto& is_there) {
#pragma unroll
                for (int j = 0; j < kWalkWords; j += 4) {
                    uint32_t above[4], from[4];
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const uint32_t number = bins.number(own.score[j + i]);
                        above[i] = __ballot_sync(~0u, is_there(j + i) && number > cut_number);
                        from[i] = __ballot_sync(~0u, is_there(j + i) && number >= cut_number);
                    }
                    const int word = own.first / 32 + j;
                    if (lane == 0) {
                        *reinterpret_cast<uint4*>(better + word) = {above[0], above[1], above[2],
                                                                    above[3]};
                        *reinterpret_cast<uint4*>(passing() + word) = {from[0], from[1], from[2],
                                                                       from[3]};
                    }
                }
            });
        });
        __syncwarp();
    }

    // If the topk-th score equals that of the first column inside, as on a plateau, marks the set.
    __device__ bool mark_plateau(const KeptRow& row, int topk) const {
        const int lane = threadIdx.x % 32;
        int first = row.length;
        for (int i = lane; i < words; i += 32)
            if (const uint32_t word = inside(i); word != 0)
                first = min(first, 32 * i + __ffs(word) - 1);
        const float value = __ldcg(row.scores + __reduce_min_sync(~0u, first));
#pragma unroll 1
        for (int i = 0; i < words; ++i) {
            const int column = 32 * i + lane;
            const float score = column < row.length ? __ldcg(row.scores + column) : NAN;
            const uint32_t above = __ballot_sync(~0u, score > value);
            const uint32_t from = __ballot_sync(~0u, score >= value);
            if (lane == 0) better[i] = above, passing()[i] = from;
        }
        __syncwarp();
        int above = 0, equal = 0;
        for (int i = lane; i < words; i += 32)
            above += __popc(better[i]), equal += __popc(inside(i));
        int wanted = topk - __reduce_add_sync(~0u, above);
        if (wanted <= 0 || wanted > __reduce_add_sync(~0u, equal)) return false;
#pragma unroll 1
        for (int base = 0; base < words && wanted > 0; base += 32) {
            uint32_t word = inside(base + lane);
            const int inclusive = sum_up_to(__popc(word));
            uint32_t members = 0;
#pragma unroll 1
            for (int left = wanted - (inclusive - __popc(word)); word != 0 && left > 0; --left)
                members |= word & -word, word &= word - 1;
            if (members != 0) better[base + lane] |= members;
            wanted -= __shfl_sync(~0u, inclusive, 31);
        }
        __syncwarp();
        return true;
    }
};

// Writes the positions of the bits of `words` words, ascending: 32 words at a time, a lane those of
// one from both ends.
__device__ __forceinline__ void write_bits(const uint32_t* bitmap, int words,
                                           SelectScratch& scratch, int32_t* out) {
    const int lane = threadIdx.x % 32;
    auto* staged = reinterpret_cast<int32_t*>(scratch.histogram);
    static_assert(32 * 32 <= kBins);
#pragma unroll 1
    for (int base = 0; base < words; base += 32) {
        const int i = base + lane;
        uint32_t word = i < words ? bitmap[i] : 0;
        const int bits = __popc(word), inclusive = sum_up_to(bits);
        int32_t* low = staged + inclusive - bits;
        int32_t* high = staged + inclusive;
#pragma unroll 1
        while (word != 0) {  // the same one twice, if it is the last
            const int bit = 31 - __clz(word);
            *low++ = 32 * i + __ffs(word) - 1;
            *--high = 32 * i + bit;
            word ^= 1u << bit;
            word &= word - 1;
        }
        __syncwarp();
        const int here = __shfl_sync(~0u, inclusive, 31);
#pragma unroll 4
        for (int j = lane; j < here; j += 32) out[j] = staged[j];
        out += here;
        __syncwarp();
    }
}

// Marks the best `wanted` of the columns inside, which are listed for that.
template <class Bits>
__device__ __forceinline__ void mark_inside(const Bits& bits, const KeptRow& row, uint2* list,
                                            int wanted) {
    const int lane = threadIdx.x % 32;
    int listed = 0;
#pragma unroll 1
    for (int base = 0; base < bits.words; base += 32) {
        uint32_t word = bits.inside(base + lane);
#pragma unroll 1
        for (uint32_t hits; (hits = __ballot_sync(~0u, word != 0)) != 0; word &= word - 1) {
            const int place = listed + __popc(hits & ((1u << lane) - 1));
            if (word != 0) list[place].y = 32 * (base + lane) + __ffs(word) - 1;
            listed += __popc(hits);
        }
    }
    __syncwarp();
    for (int i = lane; i < listed; i += 32) list[i].x = order_key(__ldcg(row.scores + list[i].y));
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < listed; i += 32) {
        const uint2 own = list[i];
        int before = 0;
#pragma unroll 4
        for (int j = 0; j < listed; ++j) {
            const uint2 other = list[j];
            before += other.x > own.x || (other.x == own.x && other.y < own.y);
        }
        shared_or(shared_address(bits.better + own.y / 32), before < wanted ? 1u << own.y % 32 : 0);
    }
    __syncwarp();
}

// Selects for token t, which sees more than topk keys, by a warp.
template <class Shape>
__device__ void select_row(const IndexerTopkParams& p, TopkStorage<Shape>& s, int t,
                           int first_token) {
    const ThreadGroup<32> group = this_warp();
    SelectScratch& scratch = s.scratch[threadIdx.x / 32];
    const KeptRow row{row_of<Shape>(p, t), s.tokens[t].visible};
    int32_t* const out = p.indices + static_cast<int64_t>(first_token + t) * p.topk;
    uint32_t* const bitmap = s.bitmap[threadIdx.x / 32];
    const RowBits<TopkStorage<Shape>::kBitmapWords / 2> bits{bitmap, (row.length + 31) / 32};
    const EqualBins bins = count_row(row, scratch);
    WalkStep step;
    step.load(row, 0);
    const Cut cut = find_bin(group, scratch, p.topk);
    bits.mark(row, step, bins, cut.value + EqualBins::kFirst);
    if (cut.count <= kMostRanked) {
        mark_inside(bits, row, reinterpret_cast<uint2*>(scratch.histogram), cut.wanted);
    } else if (!bits.mark_plateau(row, p.topk)) {
        const Threshold threshold = find_threshold(group, scratch, row, p.topk);
        write_ascending<TopkStorage<Shape>::kBitmapWords>(group, scratch, row, threshold,
                                                          row.length, bitmap, out);
        return;
    }
    write_bits(bits.better, bits.words, scratch, out);
}

}  // namespace dsa
