// topk_select of a row of up to 32768 columns by one block, which holds two bits a column.
//
// Three walks over the row, of which L2 serves what the ones before have read: a score a thread,
// for their range; all of them, counted in 1024 equal bins over that range, which says between
// which two scores the topk-th lies; and once more, for two bits a column: whether its score lies
// above this bracket, so that it belongs, and whether it lies above the bracket's lower end. Some
// tens of columns lie inside, and are compared with each other. At the end every thread writes the
// positions of its bits, in order: no sort.
//
// No bracket has to be good. If too many columns lie inside, they may mostly be equal: one of them
// is tried as the topk-th. If it is not, their range is the next one to be counted. If that does
// not help either, or infinities or NaN are in the way, the radix select of common/candidates.cuh
// finds the topk-th.
//
// A walk takes 16 times 32 columns a warp: 16 loads on their way, and 6.8 instructions for 32
// columns, to count them or for their bits (two comparisons, two votes, a share of two stores). A
// row of 8192 takes 7900 instructions of a warp. Bound by latency (ncu, 2048 rows of 8192 from
// memory): 43% of the issue slots, 44% of a block's time in the first and second read of memory, 18
// in the last walk, 10 in writing. Measured on an H200: 75 us for 4096 rows of 8192, of which
// reading is 39; 233 for 4096 of 32768, of which reading is 134.
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
constexpr int kMostInside = 128;           // columns that are compared with each other
constexpr int kMostBrackets = 3;           // before the radix select
constexpr int kBracketThreadsOfSm = 1280;  // 48 registers each

struct BracketStorage {
    SelectScratch scratch;
    ScoreRange range[16];  // of each warp
    int bin;
    int above;         // columns above the bracket
    int inside;        // and inside:
    int first_inside;  // the first of them,
    alignas(16) Candidate candidates[kMostInside];
    alignas(16) uint32_t dynamic[];  // two bits a column, positions of the members
};

// The shared memory for rows of `width` columns; words of a bit a column.
inline int bracket_words(int width) {
    return (width + kTileColumns - 1) / kTileColumns * kTileWords;
}
inline int bracket_bytes(int width, int topk) {
    return sizeof(BracketStorage) + sizeof(uint32_t) * (2 * bracket_words(width) + topk);
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
    // Where the topk-th score lies: from `low` to `high`.
    struct Bracket {
        float low, high;

        __device__ bool is_above(float score) const { return score > high; }  // not a NaN
        __device__ bool passes(float score) const { return score >= low; }
    };

    const T* const scores;
    const int length;
    const int topk;
    BracketStorage& s;
    uint32_t* const above;    // a bit a column: above the bracket; in the end: belongs
    uint32_t* const passing;  // a bit a column: above the bracket's lower end
    int32_t* const chosen;
    const Group group{static_cast<int>(threadIdx.x), 0};
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // known to be the same for all lanes

    __device__ BracketSelect(const TopkSelectParams& p, const Row<T>& row, BracketStorage& storage)
        : scores(row.scores + row.begin),
          length(row.length()),
          topk(p.topk),
          s(storage),
          above(s.dynamic),
          passing(above + p.words),
          chosen(reinterpret_cast<int32_t*>(passing + p.words)) {}

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

    // Calls f(tile, score, columns) for all tiles, each warp its own; what is behind the last
    // column is NaN.
    template <class F>
    __device__ void for_each_tile(const F& f) {
        const int whole = length / kTileColumns, rest = length % kTileColumns;
        const T* own = scores + group.lane();
        Tile score;
        int tile = warp;
#pragma unroll 1
        for (; tile < whole; tile += Group::kWarps) {
#pragma unroll
            for (int j = 0; j < kTileWords; ++j)
                score[j] = static_cast<float>(own[tile * kTileColumns + j * kWordColumns]);
            f(tile, score, kTileColumns);
        }
        if (tile == whole && rest > 0) {
#pragma unroll
            for (int j = 0; j < kTileWords; ++j)
                score[j] = j * kWordColumns + group.lane() < rest
                               ? static_cast<float>(own[tile * kTileColumns + j * kWordColumns])
                               : NAN;
            f(tile, score, rest);
        }
        group.sync();
    }

    // The range of some scores, one a thread.
    __device__ ScoreRange find_range() {
        const int step = max(length / kThreads, 1), column = group.thread * step;
        ScoreRange range;
        range.add(column < length ? static_cast<float>(scores[column]) : NAN, true);
        return of_all(range);
    }

    // The range of all threads' ranges.
    __device__ ScoreRange of_all(ScoreRange range) {
        range.add_lanes();
        if (group.lane() == 0) s.range[warp] = range;
        group.sync();
        range = s.range[group.lane() % Group::kWarps];
        range.add_lanes();
        return range;
    }

    __device__ Bracket find_bracket(const ScoreRange& range) {
        const EqualBins bins(range.low, range.high);
        const uint32_t histogram = shared_address(s.scratch.histogram) - 4 * EqualBins::kFirst;
        clear_histogram(group, s.scratch);
        for_each_tile([&](int, const Tile& score, int columns) {
#pragma unroll
            for (int j = 0; j < kTileWords; ++j)
                shared_add(histogram + bins.number(score[j]) * 4, 1,
                           j * kWordColumns + group.lane() < columns);
        });
        if (warp == 0) {
            const ThreadGroup<32> lanes{group.lane(), 0};
            const int bin = find_bin(lanes, s.scratch, topk).value;
            if (group.lane() == 0) s.bin = bin, s.above = s.inside = 0, s.first_inside = length;
        }
        group.sync();
        const int bin = s.bin;
        return {bin == 0 ? -INFINITY : bins.lower(bin),
                bin == kBins - 1 ? INFINITY : bins.upper(bin)};
    }

    // The bits of all columns.
    __device__ void walk(const Bracket& bracket) {
        for_each_tile([&](int tile, const Tile& score, int) {
#pragma unroll
            for (int j = 0; j < kTileWords; j += 4) {
                const auto four_words = [&](const auto& holds) -> uint4 {
                    const auto word = [&](int i) { return __ballot_sync(~0u, holds(score[i])); };
                    return {word(j), word(j + 1), word(j + 2), word(j + 3)};
                };
                const int at = tile * kTileWords + j;
                const uint4 is_above = four_words([&](float x) { return bracket.is_above(x); });
                const uint4 passes = four_words([&](float x) { return bracket.passes(x); });
                if (group.lane() == 0) {
                    *reinterpret_cast<uint4*>(above + at) = is_above;
                    *reinterpret_cast<uint4*>(passing + at) = passes;
                }
            }
        });
    }

    // How many columns of the own words lie above the bracket, and inside.
    __device__ __forceinline__ void count_own(const OwnWords& own, int& own_above,
                                              int& own_inside) {
        own_above = 0, own_inside = 0;
#pragma unroll 1
        for (int i = own.begin; i < own.end; ++i) {
            own_above += __popc(above[i]);
            own_inside += __popc(passing[i] & ~above[i]);
        }
    }

    // Counts the bits, and lists the columns inside, if there is room.
    __device__ void list_inside() {
        const OwnWords own(length);
        int own_above, own_inside;
        count_own(own, own_above, own_inside);
        own_above = __reduce_add_sync(~0u, own_above);
        if (group.lane() == 0) atomicAdd(&s.above, own_above);
        if (own_inside > 0) {
            int at = atomicAdd(&s.inside, own_inside);
            if (at + own_inside > kMostInside) {
                for (int i = own.begin; i < own.end; ++i) {
                    const uint32_t word = passing[i] & ~above[i];
                    if (word == 0) continue;
                    atomicMin(&s.first_inside, i * kWordColumns + __ffs(word) - 1);
                    break;
                }
            } else {
#pragma unroll 1
                for (int i = own.begin; i < own.end; ++i) {
#pragma unroll 1
                    for (uint32_t word = passing[i] & ~above[i]; word != 0; word &= word - 1) {
                        const int column = i * kWordColumns + __ffs(word) - 1;
                        s.candidates[at++] = {static_cast<float>(scores[column]), column};
                    }
                }
            }
        }
        group.sync();
    }

    // Marks the best `wanted` of the n columns inside; a warp compares one with all.
    __device__ void mark_best(int n, int wanted) {
        const auto mark = [&](int column) {
            atomicOr(above + column / kWordColumns, 1u << column % kWordColumns);
        };
        for (int i = warp; i < n; i += Group::kWarps) {
            const Candidate own = s.candidates[i];
            int better = 0;
            for (int j = group.lane(); __any_sync(~0u, j < n); j += 32) {
                const Candidate other = s.candidates[j % kMostInside];
                const bool is_better = other.score > own.score ||
                                       (other.score == own.score && other.position < own.position);
                better += __popc(__ballot_sync(~0u, j < n && is_better));
            }
            if (group.lane() == 0 && better < wanted) mark(own.position);
        }
        group.sync();
    }

    // The range of the scores inside, of which there are some.
    __device__ ScoreRange range_inside(const Bracket& bracket) {
        ScoreRange range;
        for_each_tile([&](int, const Tile& score, int) {
#pragma unroll
            for (int j = 0; j < kTileWords; ++j) {
                const bool inside = bracket.passes(score[j]) && !bracket.is_above(score[j]);
                range.low = inside ? fminf(range.low, score[j]) : range.low;
                range.high = inside ? fmaxf(range.high, score[j]) : range.high;
            }
        });
        return of_all(range);
    }

    // The bits of all columns: above a key, and from it on. For any key, of a NaN too.
    __device__ void walk_keys(uint32_t cut) {
#pragma unroll 1
        for (int i = warp; i * kWordColumns < length; i += Group::kWarps) {
            const int column = i * kWordColumns + group.lane();
            const uint32_t key =
                column < length ? order_key(static_cast<float>(scores[column])) : 0;
            const uint32_t is_above = __ballot_sync(~0u, key > cut);
            const uint32_t passes = __ballot_sync(~0u, key >= cut);
            if (group.lane() == 0) above[i] = is_above, passing[i] = passes;
        }
        group.sync();
    }

    // Marks all above a key and of those that equal it the first ones, if these make up the set.
    __device__ bool mark_first(uint32_t key) {
        walk_keys(key);
        const OwnWords own(length);
        int own_above, own_inside, all_above, all_inside;
        count_own(own, own_above, own_inside);
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
            for (uint32_t word = passing[i] & ~members; word != 0 && left > 0; --left) {
                members |= word & -word;
                word &= word - 1;
            }
            above[i] = members;
        }
        return true;
    }

    // Marks the members in `above`.
    __device__ void select() {
        ScoreRange range = find_range();
#pragma unroll 1
        for (int turn = 0; turn < kMostBrackets; ++turn) {
            const Bracket bracket = find_bracket(range);
            walk(bracket);
            list_inside();
            const int wanted = topk - s.above, n = s.inside;
            if (wanted <= 0 || n < wanted) break;
            if (n <= kMostInside) return mark_best(n, wanted);
            if (mark_first(order_key(static_cast<float>(scores[s.first_inside])))) return;
            range = range_inside(bracket);
            if (range.high - range.low == INFINITY) break;
        }
        mark_first(find_key(group, s.scratch, RowScores<T>{scores, length}, topk).value);
    }

    // Writes the positions of the members, ascending; each thread begins with its last one.
    __device__ void write(int32_t* out) {
        const OwnWords own(length);
        int members = 0, all;
#pragma unroll 1
        for (int i = own.begin; i < own.end; ++i) members += __popc(above[i]);
        int32_t* next = chosen + sum_before(group, s.scratch, members, all) + members;
#pragma unroll 1
        for (int i = own.end - 1; i >= own.begin; --i) {
            uint32_t word = above[i];
            const int first = i * kWordColumns;
#pragma unroll 1
            while (word != 0) {
                const int bit = 31 - __clz(word);
                *--next = first + bit;
                word ^= 1u << bit;
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
    wait_for_kernels_before();
    let_next_kernel_start();
    const int rows = p.chunk ? p.chunk[1] - p.chunk[0] : p.rows;
#pragma unroll 1
    for (int number = blockIdx.x; number < rows; number += gridDim.x) {
        const Row<T> row(p, number);
        if (row.take_all(p.topk, threadIdx.x, kThreads)) continue;
        BracketSelect<T, kThreads> select(p, row, s);
        select.select();
        select.write(row.out);
        __syncthreads();
    }
}

}  // namespace dsa
