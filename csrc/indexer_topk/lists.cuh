// indexer_topk on Hopper, what a warp does for a token: it guesses the bound from a sample, and
// selects from the list of candidates that the scorers appended.
#pragma once

#include "indexer_topk/rows.cuh"

namespace dsa {

constexpr int kSegments = kScoreThreads / 4;  // of a list: a quad scores a key for all tokens
constexpr int kSpareEntries = 3;              // of a segment
constexpr int kRowBytes = kSegments * sizeof(Candidate);     // an entry of each
constexpr int kStepBytes = kLaneCandidates / 2 * kRowBytes;  // of a warp's walk over a list

template <class Shape>
struct alignas(1024) TopkStorage {
    static constexpr int kBitmapWords = row_words(Shape::kDim);
    static constexpr int kSampled = kBitmapWords;  // keys of a token, at most
    static_assert(Shape::kTokens <= kScoreWarps);  // a warp for each list
    static constexpr int kKeyBytes = sizeof(ScoreStorage<Shape>::keys) / kScoreWarps;  // a warp's
    static constexpr int kCountAhead = kBitmapWords * 4 / kStepBytes;
    static constexpr int kMarkAhead = kKeyBytes / kStepBytes;

    ScoreStorage<Shape> score;
    union {
        alignas(16) uint32_t bitmap[kScoreWarps][kBitmapWords];
        float sample[Shape::kTokens][kSampled / kSegments][kSegments];  // scores, as in segments
    };
    SelectScratch scratch[kScoreWarps];
    LaneToken tokens[Shape::kTokens];
    int appended[Shape::kTokens][kSegments];  // those that found no room included
    int front[Shape::kTokens];                // candidates before the segments
    float bound[Shape::kTokens];
    float high[Shape::kTokens];  // the best of the sample
    uint32_t again[2];           // of a run and the next: tokens whose bound was not right
    int block;                   // of tokens
    // The scorers have told the loaders the block; the loaders have heard; a run's `again` is
    // known.
    uint64_t told, heard, settled;
};

// The segments of a list lie side by side: entry e of number i at begin + e * kSegments + i. The
// last kSpareEntries take what finds no room.
struct Segments {
    int begin;
    int room;

    __device__ Segments(const IndexerTopkParams& p, bool with_front)
        : begin(with_front ? p.front : 0), room((p.capacity - begin) / kSegments - kSpareEntries) {}
};

// A list as a warp reads it: two neighbouring columns of 64 a lane, first of what lies before the
// segments, then of these.
struct ColumnList {
    const Candidate* entries[2];
    int2 counts[2];  // of this lane's columns
    int rows[2];
    int total;  // candidates; if not `whole`, more than these were appended
    bool whole;

    template <class Shape>
    __device__ ColumnList(const IndexerTopkParams& p, const TopkStorage<Shape>& s, int t,
                          const Segments& segments)
        : entries{list_of<Shape>(p, t), list_of<Shape>(p, t) + segments.begin} {
        const int column = threadIdx.x % 32 * 2, front = s.front[t];
        counts[0] = {(front - column + kSegments - 1) / kSegments,
                     (front - column + kSegments - 2) / kSegments};
        const int2 appended = *reinterpret_cast<const int2*>(&s.appended[t][column]);
        counts[1] = {min(appended.x, segments.room), min(appended.y, segments.room)};
        rows[0] = (front + kSegments - 1) / kSegments;
        rows[1] = __reduce_max_sync(~0u, max(counts[1].x, counts[1].y));
        total = front + __reduce_add_sync(~0u, counts[1].x + counts[1].y);
        whole = __all_sync(~0u, max(appended.x, appended.y) <= segments.room);
    }
};

// What a lane has of kRows rows of a list: some entries are not there.
struct ListStep {
    static constexpr int kRows = kLaneCandidates / 2;
    Candidate own[kLaneCandidates];
    bool there[kLaneCandidates];

    // Row u, number `row` of the list: one entry of each of the lane's columns.
    __device__ void set(int u, float4 two, int row, int2 counts) {
        own[2 * u] = {two.x, __float_as_int(two.y)};
        own[2 * u + 1] = {two.z, __float_as_int(two.w)};
        there[2 * u] = row < counts.x;
        there[2 * u + 1] = row < counts.y;
    }
};

// Calls f(entries, there) for all candidates of a list without a front. A lane copies its own to
// shared memory, kAhead steps ahead.
template <int kAhead, class F>
__device__ __forceinline__ void for_each_ahead(const ColumnList& list, void* stages, const F& f) {
    constexpr int kRows = ListStep::kRows;
    const int lane = threadIdx.x % 32;
    const uint32_t stage = shared_address(stages) + lane * sizeof(float4);
    const Candidate* entries = list.entries[1] + lane * 2;
    const int2 counts = list.counts[1];
    const int own_rows = max(counts.x, counts.y);
    const auto place = [&](int row) { return stage + row % (kAhead * kRows) * kRowBytes; };
    const auto fetch = [&](int row) {
#pragma unroll
        for (int u = 0; u < kRows; ++u)
            if (row + u < own_rows) copy_async(place(row + u), entries + (row + u) * kSegments);
        copy_async_commit();
    };
#pragma unroll 1
    for (int a = 0; a < kAhead; ++a) fetch(a * kRows);
#pragma unroll 1
    for (int row = 0; row < list.rows[1]; row += kRows) {
        ListStep step;
        copy_async_wait_group<kAhead - 1>();
#pragma unroll
        for (int u = 0; u < kRows; ++u)
            step.set(u, shared_load_four(place(row + u)), row + u, counts);
        f(step.own, step.there);
        fetch(row + kAhead * kRows);  // where those were read
    }
}

template <class F>
__device__ __forceinline__ void for_each(const ThreadGroup<32>& group, const ColumnList& list,
                                         const F& f) {
    constexpr int kRows = ListStep::kRows;
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
        const Candidate* entries = (part ? list.entries[1] : list.entries[0]) + group.lane() * 2;
        const int2 counts = part ? list.counts[1] : list.counts[0];
        const int rows = part ? list.rows[1] : list.rows[0];
#pragma unroll 1
        for (int row = 0; row < rows; row += kRows) {
            ListStep step;
#pragma unroll
            for (int u = 0; u < kRows; ++u) {
                const auto* two = reinterpret_cast<const float4*>(entries + (row + u) * kSegments);
                const bool there = row + u < max(counts.x, counts.y);
                step.set(u, there ? __ldcg(two) : float4{}, row + u, counts);
            }
            uint32_t keys[kLaneCandidates];
#pragma unroll
            for (int u = 0; u < kLaneCandidates; ++u)
                keys[u] = step.there[u] ? order_key(step.own[u].score) : 0;
            f(keys, step.own);
        }
    }
}

// Guesses the bound of token t from its sample, by a warp: 1024 equal bins over the sample's range.
template <class Shape>
__device__ void guess_bound(const IndexerTopkParams& p, TopkStorage<Shape>& s, int t) {
    const int lane = threadIdx.x % 32;
    const int2 counts = *reinterpret_cast<const int2*>(&s.appended[t][2 * lane]);
    const int rows = __reduce_max_sync(~0u, max(counts.x, counts.y));
    const int sampled = __reduce_add_sync(~0u, counts.x + counts.y);
    const int rank = sample_rank(sampled, p.topk, s.tokens[t].visible);
    if (rank == 0) return;
    SelectScratch& scratch = s.scratch[threadIdx.x / 32];
    const auto for_each_two = [&](const auto& f) {
#pragma unroll 4
        for (int row = 0; row < rows; ++row) {
            const auto* two = reinterpret_cast<const float2*>(&s.sample[t][row][2 * lane]);
            f(two->x, row < counts.x);
            f(two->y, row < counts.y);
        }
    };
    ScoreRange range;
    for_each_two([&](float score, bool there) { range.add(score, there); });
    range.add_lanes();
    clear_histogram(this_warp(), scratch);
    const EqualBins<kBins> bins(range.low, range.high);
    for_each_two(
        [&](float score, bool there) { count_score(bins, scratch.histogram, score, there); });
    __syncwarp();
    const int bin = find_bin(this_warp(), scratch, rank).value;
    if (lane == 0 && bin > 0) s.bound[t] = bins.lower(bin);
    if (lane == 0) s.high[t] = range.high;
}

enum class Guessed { kWritten, kCrowded, kTooFew };

// Writes the topk best of a list of all scores that beat a finite bound, by a warp, if there are so
// many; all keys are scored, so where they lay is free. Two passes over the list: 1024 equal bins
// between the bound and the best of the sample, of which one holds the topk-th; then all of better
// bins are marked, and of this one those that belong, if it is not too crowded for a warp to rank.
template <class Shape>
__device__ Guessed write_guessed(const IndexerTopkParams& p, TopkStorage<Shape>& s, int t,
                                 const ColumnList& list, int32_t* row) {
    const ThreadGroup<32> group = this_warp();
    const int warp = threadIdx.x / 32;
    SelectScratch& scratch = s.scratch[warp];
    const EqualBins<kBins> bins(s.bound[t], s.high[t]);
    clear_histogram(group, scratch);
    int above = 0;  // without NaN
    using Storage = TopkStorage<Shape>;
    const auto count = [&](const auto& entries, const auto& there) {
#pragma unroll
        for (int u = 0; u < kLaneCandidates; ++u) {
            const bool counts = there[u] && entries[u].score == entries[u].score;
            count_score(bins, scratch.histogram, entries[u].score, counts);
            above += counts;
        }
    };
    for_each_ahead<Storage::kCountAhead>(list, s.bitmap[warp], count);
    __syncwarp();
    if (__reduce_add_sync(~0u, above) < p.topk) return Guessed::kTooFew;
    const Cut cut = find_bin(group, scratch, p.topk);
    if (cut.count > kMostRanked) return Guessed::kCrowded;
    const int cut_bin = cut.value;
    // The candidates of the cut's bin, collected where the first bins were counted.
    auto* in_bin = reinterpret_cast<uint2*>(scratch.histogram);
    const auto mark = [&](const auto& set) {
        if (group.lane() == 0) scratch.sums[0] = 0;
        __syncwarp();
        const auto mark_some = [&](const auto& entries, const auto& there) {
            uint32_t hits = 0;
#pragma unroll
            for (int u = 0; u < kLaneCandidates; ++u) {
                const float score = entries[u].score;
                const int bin = bins.bin(score);
                set(entries[u].position, there[u] && bin > cut_bin);
                hits |= static_cast<uint32_t>(there[u] && bin == cut_bin && score == score) << u;
            }
            if (hits == 0) return;
#pragma unroll
            for (int u = 0; u < kLaneCandidates; ++u)
                if (hits >> u & 1)
                    in_bin[atomicAdd(&scratch.sums[0], 1)] = {
                        order_key(entries[u].score), static_cast<uint32_t>(entries[u].position)};
        };
        for_each_ahead<Storage::kMarkAhead>(
            list, &s.score.keys[0][0][0] + warp * Storage::kKeyBytes, mark_some);
        __syncwarp();
        rank_listed(in_bin, cut.count, cut.wanted, set);
    };
    write_marked<Storage::kBitmapWords>(group, scratch, mark, s.tokens[t].visible, s.bitmap[warp],
                                        row);
    fence_proxy_async();  // keys lie there next
    return Guessed::kWritten;
}

// What a pass, or a part of a certain one, ends with for the list of token t, by a warp: one that
// is full before the last key is cut to its best topk, kept before the segments, and gives the next
// bound; one that is complete is written out, if the guess was right.
template <class Shape>
__device__ void settle_list(const IndexerTopkParams& p, TopkStorage<Shape>& s, int t,
                            int first_token, bool certain, bool last, uint32_t* again) {
    const ColumnList list(p, s, t, Segments(p, certain));
    const ThreadGroup<32> group = this_warp();
    const int warp = threadIdx.x / 32;
    SelectScratch& scratch = s.scratch[warp];
    int32_t* row = indices_of(p, first_token + t);
    const float guess = s.bound[t];
    bool enough = list.total >= p.topk && list.whole;
    if (!certain && guess == guess && enough) {
        const Guessed guessed = write_guessed(p, s, t, list, row);
        if (guessed == Guessed::kWritten) return;
        enough = guessed == Guessed::kCrowded;
    }
    Threshold threshold{0, INT_MAX};
    if (enough) threshold = find_threshold(group, scratch, list, p.topk);
    if (!last) {
        keep(group, scratch, list, threshold, list_of<Shape>(p, t));
        if (group.thread == 0) {
            s.front[t] = min(list.total, p.topk);
            if (enough) s.bound[t] = score_of(threshold.key);
        }
    } else if (enough) {
        write_ascending<TopkStorage<Shape>::kBitmapWords>(group, scratch, list, threshold,
                                                          s.tokens[t].visible, s.bitmap[warp], row);
    } else if (group.thread == 0) {
        atomicOr(again, 1u << t);
    }
}

}  // namespace dsa
