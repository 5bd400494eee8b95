// indexer_topk on Hopper, what a warp does for a token whose scores are all kept, as there are few:
// it selects from a row in L2.
//
// Its scores are counted in equal bins, which says in which bin the topk-th lies: by the scorers as
// they make them (kept.cuh), or in a walk over the row. Another walk leaves two bits a column,
// whether it lies in a better bin and whether in that bin or a better one, and the few columns of
// that bin are listed and compared with each other. A bin never falls as the score rises, so the
// set is exact however well the bins fit. If too many columns lie in one, finer bins are laid over
// it. If that does not help, they may mostly be equal: what most lanes find there first is tried as
// the topk-th. If it is not, the radix select of common/candidates.cuh finds that.
//
// A walk is bound by latency: the row comes through shared memory, copied ahead, and a lane has
// neighbouring columns, whose bits it makes without a vote.
#pragma once

#include <type_traits>

#include "indexer_topk/workspace.cuh"

namespace dsa {

constexpr int kWholeColumns = 512;  // rows begin at multiples of these: whole steps of a walk
constexpr int kMostKept = kLargestCapacity * sizeof(Candidate) / sizeof(float);
constexpr int kMostKeptWords = kMostKept / 32;  // of a bit a column
constexpr int kMostRanked = 128;                // of a bin, each compared with all others

// How many scores of a row have room in place of a list.
inline int kept_columns(int capacity) {
    return capacity * static_cast<int>(sizeof(Candidate) / sizeof(float)) / kWholeColumns *
           kWholeColumns;
}

// Shared memory of a warp that selects in turn with others: two bits a column, then the stages of a
// walk.
__host__ __device__ constexpr int row_words(int dim) { return dim == 64 ? 4096 : 2048; }

// All scores of a token, in a ring of `room` places from number `start` on. It serves as a list for
// the radix select.
struct KeptRow {
    const float* ring;
    int room;
    int start;
    int length;

    __device__ const float* place(int column) const {
        const int place = start + column;
        return ring + (place < room ? place : place - room);
    }
    __device__ float score(int column) const { return __ldcg(place(column)); }
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
            own[u] = {i < row.length ? row.score(i) : 0.0f, i};
            keys[u] = i < row.length ? order_key(own[u].score) : 0;
        }
        f(keys, own);
    }
}

// Walks over a row, by a warp, in steps of which kStages - 1 are on their way to shared memory. A
// lane gets kOwn neighbouring columns of a step; so that lanes read theirs from different banks,
// they are stored with their 16-byte pieces exchanged among those of eight.
template <int kOwn, int kStages>
struct RowWalk {
    static constexpr int kColumns = 32 * kOwn, kPieces = kOwn / 4;
    static constexpr int kWords = kStages * kColumns;  // of shared memory
    static_assert(kWholeColumns % kColumns == 0 && kPieces <= 4);

    const KeptRow& row;
    const uint32_t stages;  // address in shared memory of kStages * kColumns floats
    int fetched, place;  // of the next step to fetch: its first column, where it lies in the ring

    // A lane's part of a step.
    struct Step {
        static constexpr int kScores = kOwn;
        float score[kOwn];
        int first;  // column
        int rest;   // columns of the row from that one on

        __device__ bool is_there(int j) const { return j < rest; }
        // Calls f(whether score j is there) in the form that needs no comparison where the row goes
        // on.
        template <class F>
        __device__ void for_all(const F& f) const {
            if (__all_sync(~0u, is_there(kOwn - 1))) {
                f([](int) { return true; });
            } else {
                f([&](int j) { return is_there(j); });
            }
        }
    };

    __device__ RowWalk(const KeptRow& row_, void* stages_)
        : row(row_), stages(shared_address(stages_)) {}

    __device__ uint32_t stage(int column) const {
        return stages + column / kColumns % kStages * kColumns * sizeof(float);
    }
    __device__ void fetch() {
        const int lane = threadIdx.x % 32;
        if (fetched < row.length) {
            uint32_t target = stage(fetched) + (lane ^ (lane / 8 & (kPieces - 1))) * 16;
            const float* source = row.ring + place + 4 * lane;
            keep_address(target);
#pragma unroll
            for (int i = 0; i < kColumns; i += 128)
                copy_async(target + i * sizeof(float), source + i);
        }
        copy_async_commit();
        fetched += kColumns;
        place += kColumns;
        if (place == row.room) place = 0;
    }
    __device__ void start() {
        fetched = 0;
        place = row.start;
#pragma unroll 1
        for (int step = 0; step < kStages - 1; ++step) fetch();
    }
    // Waits for a step; then all lanes are done with the one before.
    __device__ void arrive() const {
        copy_async_wait_group<kStages - 2>();
        __syncwarp();
    }
    __device__ Step step(int column) const {
        const int lane = threadIdx.x % 32;
        Step own;
        own.first = column + kOwn * lane;
        own.rest = row.length - own.first;
        const uint32_t pieces = stage(column) + kOwn * lane * sizeof(float);
        const uint32_t exchange = (kPieces * lane / 8 & (kPieces - 1)) * 16;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            const float4 four = shared_load_four(pieces + (16 * i ^ exchange));
            own.score[4 * i] = four.x, own.score[4 * i + 1] = four.y;
            own.score[4 * i + 2] = four.z, own.score[4 * i + 3] = four.w;
        }
        return own;
    }
    // Calls f(step) for all steps of a walk that has started.
    template <class F>
    __device__ __forceinline__ void go(const F& f) {
#pragma unroll 1
        for (int column = 0; column < row.length; column += kColumns) {
            arrive();
            fetch();
            f(step(column));
        }
        __syncwarp();
    }
};

template <int kDim>
using StagedWalk = RowWalk<kDim == 64 ? 16 : 8, 4>;

// Counts a score in its bin. Behind the counts is a word for what is not there.
template <int kCount>
__device__ __forceinline__ void count_score(const EqualBins<kCount>& bins, uint32_t* counts,
                                            float score, bool is_there) {
    using Bins = EqualBins<kCount>;
    const uint32_t number = is_there ? bins.number(score) : Bins::kNowhere;
    shared_add(shared_address(counts) - 4 * Bins::kFirst + 4 * number, 1);
}

// All of a row, in a walk that has started.
template <int kCount, int kOwn, int kStages>
__device__ __forceinline__ void count_row(RowWalk<kOwn, kStages>& walk,
                                          const EqualBins<kCount>& bins, uint32_t* counts) {
    walk.go([&](const auto& own) {
        own.for_all([&](const auto& is_there) {
#pragma unroll
            for (int j = 0; j < kOwn; ++j) count_score(bins, counts, own.score[j], is_there(j));
        });
    });
}

// Two bits a column: whether its score is better than what is looked for, and whether it is at
// least as good.
struct RowBits {
    uint32_t* better;
    uint32_t* passing;
    int words;

    __device__ uint32_t inside(int i) const { return i < words ? passing[i] & ~better[i] : 0; }
    __device__ void add(uint32_t column, bool belongs) const {
        shared_or(shared_address(better + column / 32), belongs ? 1u << column % 32 : 0);
    }

    // In a walk that has started: compare(score, above, below) moves both words on by a bit.
    template <int kOwn, int kStages, class Compare>
    __device__ __forceinline__ void mark(RowWalk<kOwn, kStages>& walk,
                                         const Compare& compare) const {
        using Bits = std::conditional_t<kOwn == 16, uint16_t, uint8_t>;
        static_assert(kOwn == 8 * sizeof(Bits));
        walk.go([&](const auto& own) {
            uint32_t above = 0, below = 0;
#pragma unroll
            for (int j = kOwn - 1; j >= 0; --j) compare(own.score[j], above, below);
            const uint32_t there = (1u << min(max(own.rest, 0), kOwn)) - 1;
            const int place = own.first / kOwn;
            reinterpret_cast<Bits*>(better)[place] = above & there;
            reinterpret_cast<Bits*>(passing)[place] = ~below & there;
        });
    }

    // By bins. A difference's sign is the next bit: no predicates, which would wait for each other.
    template <class Walk>
    __device__ __forceinline__ void mark_bins(Walk& walk, const auto& bins, uint32_t cut) const {
        const uint32_t cut_number = bins.kFirst + cut;
        mark(walk, [&](float score, uint32_t& above, uint32_t& below) {
            const uint32_t number = bins.number(score);
            above = __funnelshift_l(cut_number - number, above, 1);
            below = __funnelshift_l(number - cut_number, below, 1);
        });
    }

    // If the topk-th score equals the one that most lanes find inside first, as on a plateau, marks
    // the set.
    template <class Walk>
    __device__ bool mark_plateau(Walk& walk, const KeptRow& row, int topk) const {
        const int lane = threadIdx.x % 32;
        walk.start();
        int first = -1;
#pragma unroll 1
        for (int i = lane; i < words && first < 0; i += 32)
            if (const uint32_t word = inside(i); word != 0) first = 32 * i + __ffs(word) - 1;
        const float own = first < 0 ? NAN : row.score(first);
        const int alike = __popc(__match_any_sync(~0u, order_key(own)));
        const int most = first < 0 ? 0 : alike;
        const uint32_t winners = __ballot_sync(~0u, most == __reduce_max_sync(~0u, most));
        const float value = __shfl_sync(~0u, own, __ffs(winners) - 1);
        mark(walk, [&](float score, uint32_t& above, uint32_t& below) {
            above = 2 * above + (score > value);
            below = 2 * below + !(score >= value);
        });
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

// Writes the positions of the bits of `words` words, ascending, by a warp: a lane has two words at
// a time and puts theirs where the sums say, in shared memory.
__device__ __forceinline__ void write_bits(const uint32_t* bitmap, int words,
                                           SelectScratch& scratch, int32_t* out) {
    const int lane = threadIdx.x % 32;
    const auto* staged = reinterpret_cast<const uint16_t*>(scratch.histogram);
    static_assert(2 * 32 * 32 <= 2 * kBins && kMostKept <= 1 << 16);
    const uint32_t target = shared_address(scratch.histogram);
#pragma unroll 1
    for (int base = lane; base < words + lane; base += 64) {
        const uint32_t low = base < words ? bitmap[base] : 0;
        const uint32_t high = base + 32 < words ? bitmap[base + 32] : 0;
        const int counts = __popc(low) | __popc(high) << 16;
        const int inclusive = sum_up_to(counts), before = inclusive - counts;
        const int all = __shfl_sync(~0u, inclusive, 31);
        const int all_low = all & 0xffff, here = all_low + (all >> 16);
        uint32_t next_low = target + 2 * (before & 0xffff);
        uint32_t next_high = target + 2 * (all_low + (before >> 16));
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            shared_append(next_low, 32 * base + i, low & 1u << i);
            shared_append(next_high, 32 * base + 1024 + i, high & 1u << i);
        }
        __syncwarp();
#pragma unroll 4
        for (int i = lane; i < here; i += 32) __stcs(out + i, static_cast<int>(staged[i]));
        out += here;
        __syncwarp();
    }
}

// Calls set(position, belongs) for all of a list in shared memory, each an order key and a
// position: the best `wanted` belong.
template <class Set>
__device__ __forceinline__ void rank_listed(const uint2* list, int listed, int wanted,
                                            const Set& set) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < listed; i += 32) {
        const uint2 own = list[i];
        int before = 0;
#pragma unroll 4
        for (int j = 0; j < listed; ++j) {
            const uint2 other = list[j];
            before += other.x > own.x || (other.x == own.x && other.y < own.y);
        }
        set(own.y, before < wanted);
    }
    __syncwarp();
}

// Lists the columns inside, each an order key and a position; returns how many.
__device__ __forceinline__ int list_inside(const RowBits& bits, const KeptRow& row, uint2* list) {
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
    for (int i = lane; i < listed; i += 32) list[i].x = order_key(row.score(list[i].y));
    __syncwarp();
    return listed;
}

// Counts the first kColumns scores of a row.
template <int kColumns, int kCount>
__device__ __forceinline__ void count_first(const KeptRow& row, const EqualBins<kCount>& bins,
                                            uint32_t* counts) {
    const int first = threadIdx.x % 32;
    float scores[kColumns / 32];
#pragma unroll
    for (int i = 0; i < kColumns / 32; ++i) scores[i] = row.score(32 * i + first);
#pragma unroll
    for (int i = 0; i < kColumns / 32; ++i)
        count_score(bins, counts, scores[i], 32 * i + first < row.length);
    __syncwarp();
}

// Marks the topk best of more than so many in bits.better, by a warp, and calls read() when it has
// read the row. `counts` are the bins' when complete() returns, and zeros in the end, unless the
// scratch lies there; it may also lie where the stages do.
template <int kDim, int kCount, class Complete, class Read>
__device__ __forceinline__ void mark_set(const KeptRow& row, const EqualBins<kCount>& bins,
                                         uint32_t* counts, const RowBits& bits, uint32_t* stages,
                                         SelectScratch& scratch, int topk, const Complete& complete,
                                         const Read& read) {
    const ThreadGroup<32> group = this_warp();
    StagedWalk<kDim> walk(row, stages);
    const auto mark = [&](const EqualBins<kCount>& bins) {
        const Cut cut = find_bin<kCount>(counts, topk);
        clear_counts<kCount>(group, counts);
        bits.mark_bins(walk, bins, cut.value);
        return cut;
    };
    walk.start();
    complete();
    Cut cut = mark(bins);
    if (cut.count > kMostRanked) {
        const EqualBins<kCount> finer(bins.lower(cut.value - 1), bins.lower(cut.value + 2));
        walk.start();
        count_row(walk, finer, counts);
        walk.start();
        cut = mark(finer);
    }
    if (cut.count <= kMostRanked) {
        auto* list = reinterpret_cast<uint2*>(scratch.histogram);
        const int listed = list_inside(bits, row, list);
        read();
        rank_listed(list, listed, cut.wanted,
                    [&](uint32_t column, bool belongs) { bits.add(column, belongs); });
        return;
    }
    if (!bits.mark_plateau(walk, row, topk)) {
        const Threshold threshold = find_threshold(group, scratch, row, topk);
        for (int i = group.lane(); i < bits.words; i += 32) bits.better[i] = 0;
        __syncwarp();
        for_each(group, row, [&](const auto& keys, const auto& entries) {
#pragma unroll
            for (int u = 0; u < kLaneCandidates; ++u)
                bits.add(entries[u].position, belongs(keys[u], entries[u].position, threshold));
        });
        __syncwarp();
    }
    read();
}

// Selects for a token that sees more than topk keys, by a warp with row_words(kDim) words. The bins
// cover the range of the row's first scores.
template <int kDim>
__device__ void select_row(const KeptRow& row, SelectScratch& scratch, uint32_t* words, int topk,
                           int32_t* out) {
    static_assert(2 * kMostKeptWords + StagedWalk<kDim>::kWords <= row_words(kDim));
    const RowBits bits{words, words + kMostKeptWords, (row.length + 31) / 32};
    uint32_t* stages = words + 2 * kMostKeptWords;
    StagedWalk<kDim> walk(row, stages);
    walk.start();
    clear_histogram(this_warp(), scratch);
    walk.arrive();
    const auto first = walk.step(0);
    ScoreRange range;
#pragma unroll
    for (int j = 0; j < first.kScores; ++j) range.add(first.score[j], first.is_there(j));
    range.add_lanes();
    const EqualBins<kBins> bins(range.low, range.high);
    count_row(walk, bins, scratch.histogram);
    mark_set<kDim>(row, bins, scratch.histogram, bits, stages, scratch, topk, [] {}, [] {});
    write_bits(bits.better, bits.words, scratch, out);
}

}  // namespace dsa
