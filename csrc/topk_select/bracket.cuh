// topk_select of a row of up to 32768 columns by the threads of a row, which read it once.
//
// A walk over the row counts its scores in 1024 equal bins over the range of some of them, and
// keeps in shared memory which bin each column is in, two bytes a column. The counts say in which
// bin the topk-th lies; a walk over the bins leaves two bits a column: whether it lies in a better
// bin, so that it belongs, and whether it lies in that bin or a better one. Some tens of columns
// lie in that bin, and are compared with each other. At the end every thread writes the positions
// of its bits, in order: no sort.
//
// A bin never falls as the score rises, for any score, so the set is exact however well the bins
// fit. If too many columns lie in one, they may mostly be equal: one of them is tried as the
// topk-th. If it is not, the bins cover their range next. If that does not help either, the radix
// select of common/candidates.cuh finds the topk-th.
//
// Read once, as L2 bounds what all SMs read again: with a second walk over the row itself 4096 rows
// of 8192 took 74 us, now 64, of which reading is 39; 4096 of 32768 take 214, of which reading is
// 134 (H200).
#pragma once

#include <cuda_bf16.h>

#include <algorithm>

#include "common/candidates.cuh"
#include "topk_select/launch.h"
#include "topk_select/row.cuh"

namespace dsa {

constexpr int kWordColumns = 32;
constexpr int kTileWords = 16;  // of a warp at a time
constexpr int kTileColumns = kTileWords * kWordColumns;
constexpr int kTilePairs = kTileColumns / 2;  // of bins, a word each
constexpr int kMostInside = 128;              // columns that are compared with each other
constexpr int kMostTurns = 3;                 // before the radix select
constexpr int kBracketThreadsOfSm = 1152;     // 56 registers each, or 64 where 1024 fit

struct BracketStorage {
    struct Inside {
        uint32_t key;
        int column;
    };
    SelectScratch scratch;
    uint32_t lowest, highest;  // keys: the range
    Cut cut;                   // the topk-th's bin
    int inside;                // columns of that bin that are listed,
    int first_inside;          // the first of them
    alignas(16) Inside list[kMostInside];
    // Two bits a column, and then two bytes a column or the positions of the members.
    alignas(16) uint32_t dynamic[];

    __device__ void forget_range() { lowest = ~0u, highest = 0; }
};

// Words of a bit a column, and the shared memory for a row of `width` columns.
inline int bracket_words(int width) {
    return (width + kTileColumns - 1) / kTileColumns * kTileWords;
}
inline int bracket_bytes(int width, int topk) {
    const int words = bracket_words(width), pairs = words * kWordColumns / 2;
    return sizeof(BracketStorage) + sizeof(uint32_t) * (2 * words + std::max(pairs, topk));
}

// A row as a list for the radix select, of which it needs the keys.
template <typename T>
struct RowScores {
    const T* scores;
    int count;
};

template <class Group, typename T, class F>
__device__ __forceinline__ void for_each(const Group& group, const RowScores<T>& row, const F& f) {
#pragma unroll 1
    for (int base = group.thread; __any_sync(~0u, base < row.count);
         base += Group::kThreads * kLaneCandidates) {
        uint32_t keys[kLaneCandidates];
#pragma unroll
        for (int u = 0; u < kLaneCandidates; ++u) {
            const int i = base + u * Group::kThreads;
            keys[u] = i < row.count ? order_key(static_cast<float>(row.scores[i])) : 0;
        }
        constexpr Candidate kUnused[kLaneCandidates] = {};
        f(keys, kUnused);
    }
}

template <typename T, int kThreads>
struct BracketSelect {
    using Group = ThreadGroup<kThreads>;
    using Tile = float[kTileWords];

    const T* const scores;
    const int length;
    const int topk;
    BracketStorage& s;
    uint32_t* const above;    // a bit a column: in a better bin; in the end: belongs
    uint32_t* const passing;  // a bit a column: in the topk-th's bin or a better one
    uint32_t* const bins;     // two columns a word, as a lane counts them
    int32_t* const chosen;    // in place of these
    const Group group{static_cast<int>(threadIdx.x), 0};
    const int warp = __shfl_sync(~0u, group.warp(), 0);  // known to be the same for all lanes
    const int whole = length / kTileColumns;             // tiles without an end in them
    const int first_tile, end_tile;                      // of this warp

    __device__ BracketSelect(const TopkSelectParams& p, const Row<T>& row, BracketStorage& storage)
        : scores(row.scores + row.begin),
          length(row.length()),
          topk(p.topk),
          s(storage),
          above(s.dynamic),
          passing(above + p.words),
          bins(passing + p.words),
          chosen(reinterpret_cast<int32_t*>(bins)),
          first_tile(tiles() * warp / Group::kWarps),
          end_tile(tiles() * (warp + 1) / Group::kWarps) {}

    __device__ int tiles() const { return (length + kTileColumns - 1) / kTileColumns; }

    // The words that a thread looks after, neighbours; if many, an odd number of them, as the
    // threads of a warp read theirs at the same time.
    struct OwnWords {
        int begin, end;

        __device__ explicit OwnWords(int columns) {
            const int words = (columns + kWordColumns - 1) / kWordColumns;
            int each = (words + kThreads - 1) / kThreads;
            if (each > 3) each |= 1;
            begin = min(each * static_cast<int>(threadIdx.x), words);
            end = min(begin + each, words);
        }
    };

    // What is behind the last column is NaN.
    __device__ void load(Tile& score, int tile) {
        const T* own = scores + tile * kTileColumns + group.lane();
        if (tile < whole) {
#pragma unroll
            for (int j = 0; j < kTileWords; ++j)
                score[j] = static_cast<float>(own[j * kWordColumns]);
        } else {
            const int rest = length - tile * kTileColumns - group.lane();
#pragma unroll
            for (int j = 0; j < kTileWords; ++j)
                score[j] =
                    j * kWordColumns < rest ? static_cast<float>(own[j * kWordColumns]) : NAN;
        }
    }

    // The range of all threads' ranges.
    __device__ ScoreRange of_all(const ScoreRange& range) {
        const uint32_t lowest = __reduce_min_sync(~0u, order_key(range.low));
        const uint32_t highest = __reduce_max_sync(~0u, order_key(range.high));
        if (group.lane() == 0) atomicMin(&s.lowest, lowest), atomicMax(&s.highest, highest);
        group.sync();
        return {score_of(s.lowest), score_of(s.highest)};
    }

    // Counts a tile and keeps its bins.
    __device__ void count(const Tile& score, int tile, const EqualBins<kBins>& equal) {
        const uint32_t histogram =
            shared_address(s.scratch.histogram) - 4 * EqualBins<kBins>::kFirst;
        const int rest = length - tile * kTileColumns - group.lane();
        uint32_t pairs[kTileWords / 2];
        const auto count_all = [&](const auto& is_there) {
#pragma unroll
            for (int j = 0; j < kTileWords; j += 2) {
                const uint32_t one = equal.number(score[j]), two = equal.number(score[j + 1]);
                constexpr uint32_t kNowhere = EqualBins<kBins>::kNowhere;
                shared_add(histogram + (is_there(j) ? one : kNowhere) * 4, 1);
                shared_add(histogram + (is_there(j + 1) ? two : kNowhere) * 4, 1);
                pairs[j / 2] = __byte_perm(one, two, 0x5410);
            }
        };
        if (tile < whole) {
            count_all([](int) { return true; });
        } else {
            count_all([&](int j) { return j * kWordColumns < rest; });
        }
        auto* own = reinterpret_cast<uint4*>(bins + tile * kTilePairs) + group.lane();
        own[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
        own[32] = {pairs[4], pairs[5], pairs[6], pairs[7]};
    }

    // The bits of all columns. What is behind the last column may pass.
    __device__ void walk(uint32_t cut_bin) {
#pragma unroll 1
        for (int tile = first_tile; tile < end_tile; ++tile) {
            const auto* own =
                reinterpret_cast<const uint4*>(bins + tile * kTilePairs) + group.lane();
            auto* is_above = reinterpret_cast<uint4*>(above + tile * kTileWords);
            auto* passes = reinterpret_cast<uint4*>(passing + tile * kTileWords);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const uint4 four = own[32 * half];
                const auto four_words = [&](uint32_t one, uint32_t two,
                                            const auto& holds) -> uint4 {
                    return {__ballot_sync(~0u, holds(one & 0xffff)),
                            __ballot_sync(~0u, holds(one >> 16)),
                            __ballot_sync(~0u, holds(two & 0xffff)),
                            __ballot_sync(~0u, holds(two >> 16))};
                };
                const auto better = [=](uint32_t bin) { return bin > cut_bin; };
                const auto as_good = [=](uint32_t bin) { return bin >= cut_bin; };
                const uint4 words[4] = {
                    four_words(four.x, four.y, better), four_words(four.z, four.w, better),
                    four_words(four.x, four.y, as_good), four_words(four.z, four.w, as_good)};
                if (group.lane() == 0) {
                    is_above[2 * half] = words[0], is_above[2 * half + 1] = words[1];
                    passes[2 * half] = words[2], passes[2 * half + 1] = words[3];
                }
            }
        }
        group.sync();
    }

    __device__ uint32_t inside(int word) const { return passing[word] & ~above[word]; }
    __device__ uint32_t key(int column) const {
        return order_key(static_cast<float>(scores[column]));
    }

    // Calls f(column) for the columns inside of the own words, until one returns false.
    template <class F>
    __device__ void for_each_inside(const F& f) {
        const OwnWords own(length);
#pragma unroll 1
        for (int i = own.begin; i < own.end; ++i) {
#pragma unroll 1
            for (uint32_t word = inside(i); word != 0; word &= word - 1) {
                const int column = i * kWordColumns + __ffs(word) - 1;
                if (column >= length || !f(column)) return;
            }
        }
    }

    // Marks the best `wanted` of the n columns inside; a thread compares one with all.
    __device__ void mark_best(int n, int wanted) {
        static_assert(kMostInside <= kThreads);
        if (group.thread < n) {
            const auto own = s.list[group.thread];
            int better = 0;
#pragma unroll 4
            for (int i = 0; i < n; ++i) {
                const auto other = s.list[i];
                better +=
                    other.key > own.key || (other.key == own.key && other.column < own.column);
            }
            if (better < wanted)
                atomicOr(above + own.column / kWordColumns, 1u << own.column % kWordColumns);
        }
        group.sync();
    }

    // The range of the scores inside.
    __device__ ScoreRange range_inside() {
        if (group.thread == 0) s.forget_range();
        group.sync();
        ScoreRange range;
#pragma unroll 1
        for (int i = warp; i * kWordColumns < length; i += Group::kWarps) {
            const int column = i * kWordColumns + group.lane();
            if (column < length && inside(i) >> group.lane() & 1)
                range.add(static_cast<float>(scores[column]), true);
        }
        return of_all(range);
    }

    // The bits of all columns: above a key, and from it on. For any key, of a NaN too.
    __device__ void walk_keys(uint32_t cut) {
#pragma unroll 1
        for (int i = warp; i * kWordColumns < length; i += Group::kWarps) {
            const int column = i * kWordColumns + group.lane();
            const uint32_t own = column < length ? key(column) : 0;
            const uint32_t is_above = __ballot_sync(~0u, own > cut);
            const uint32_t passes = __ballot_sync(~0u, own >= cut);
            if (group.lane() == 0) above[i] = is_above, passing[i] = passes;
        }
        group.sync();
    }

    // Marks all above a key and of those that equal it the first ones, if these make up the set.
    __device__ bool mark_first(uint32_t key) {
        walk_keys(key);
        const OwnWords own(length);
        int own_above = 0, own_inside = 0, all_above, all_inside;
#pragma unroll 1
        for (int i = own.begin; i < own.end; ++i)
            own_above += __popc(above[i]), own_inside += __popc(inside(i));
        sum_before(group, s.scratch, own_above, all_above);
        group.sync();
        const int before = sum_before(group, s.scratch, own_inside, all_inside);
        group.sync();
        const int wanted = topk - all_above;
        if (wanted < 0 || wanted > all_inside) return false;
        int left = wanted - before;
#pragma unroll 1
        for (int i = own.begin; i < own.end; ++i) {
            uint32_t members = above[i];
#pragma unroll 1
            for (uint32_t word = inside(i); word != 0 && left > 0; --left) {
                members |= word & -word;
                word &= word - 1;
            }
            above[i] = members;
        }
        return true;
    }

    // Marks the members in `above`.
    __device__ void select() {
        Tile score;
        if (first_tile < end_tile) load(score, first_tile);
        clear_histogram(group, s.scratch);
        ScoreRange range;
        if (first_tile < end_tile) {
#pragma unroll
            for (int j = 0; j < kTileWords; ++j) range.add(score[j], true);
        }
        range = of_all(range);
#pragma unroll 1
        for (int turn = 0; turn < kMostTurns && range.low <= range.high; ++turn) {
            const EqualBins<kBins> equal(range.low, range.high);
#pragma unroll 1
            for (int tile = first_tile; tile < end_tile; ++tile) {
                if (turn > 0 || tile > first_tile) load(score, tile);
                count(score, tile, equal);
            }
            group.sync();
            if (warp == 0) {
                const Cut cut = find_bin(ThreadGroup<32>{group.lane(), 0}, s.scratch, topk);
                if (group.lane() == 0) s.cut = cut, s.inside = 0, s.first_inside = length;
            }
            group.sync();
            const Cut cut = s.cut;
            walk(cut.value);
            if (cut.count <= kMostInside) {
                for_each_inside([&](int column) {
                    s.list[atomicAdd(&s.inside, 1)] = {key(column), column};
                    return true;
                });
                group.sync();
                return mark_best(cut.count, cut.wanted);
            }
            for_each_inside([&](int column) {
                atomicMin(&s.first_inside, column);
                return false;
            });
            group.sync();
            if (mark_first(key(s.first_inside))) return;
            walk(cut.value);
            range = range_inside();
            clear_histogram(group, s.scratch);
        }
        mark_first(find_key(group, s.scratch, RowScores<T>{scores, length}, topk).value);
    }

    // Writes the positions of the members, ascending; each thread those of a word from both ends.
    __device__ void write(int32_t* out) {
        const OwnWords own(length);
        int members = 0, all;
#pragma unroll 1
        for (int i = own.begin; i < own.end; ++i) members += __popc(above[i]);
        int32_t* next = chosen + sum_before(group, s.scratch, members, all);
#pragma unroll 1
        for (int i = own.begin; i < own.end; ++i) {
            uint32_t word = above[i];
            const int first = i * kWordColumns;
            int32_t* low = next;
            int32_t* high = next += __popc(word);
#pragma unroll 1
            while (word != 0) {  // the same one twice, if it is the last
                const int bit = 31 - __clz(word);
                *low++ = first + __ffs(word) - 1;
                *--high = first + bit;
                word ^= 1u << bit;
                word &= word - 1;
            }
        }
        group.sync();
        const int vectors = reinterpret_cast<uintptr_t>(out) % 16 == 0 ? topk / 4 : 0;
#pragma unroll 2
        for (int i = group.thread; i < vectors; i += kThreads)
            reinterpret_cast<int4*>(out)[i] = reinterpret_cast<const int4*>(chosen)[i];
#pragma unroll 1
        for (int i = 4 * vectors + group.thread; i < topk; i += kThreads) out[i] = chosen[i];
    }
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads, kBracketThreadsOfSm / kThreads)
    topk_select_bracket_kernel(const TopkSelectParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    auto& s = *reinterpret_cast<BracketStorage*>(shared);
    if (threadIdx.x == 0) s.forget_range();
    wait_for_kernels_before();
    let_next_kernel_start();
    const Row<T> row(p, blockIdx.x);
    if (row.take_all(p.topk, threadIdx.x, kThreads)) return;
    BracketSelect<T, kThreads> select(p, row, s);
    select.select();
    select.write(row.out);
}

}  // namespace dsa
