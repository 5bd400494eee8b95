// indexer_topk on Hopper where no token sees more keys than a list has room for scores (14848 at 16
// heads): all its scores are kept, and it is selected from them (rows.cuh).
//
// Scoring is bound by the sums over heads, selection by latency. Done in turn by the same warps
// they took 16.9 ms for 64 sequences of 2048 to 14333 tokens (H200, 16 heads x 64); here seven
// warps do nothing but select, a token at a time, while the scorers are at the next tokens: 11.3 to
// 12.1, 31% of the limit, FP8 products. For 16 heads and more: with fewer, scores are made so fast
// that eight warps which do both in turn are sooner done (sm90.cuh).
//
// Scorers count what they score, four instructions a score: in 512 bins a token, from four
// deviations below the mean of its first 128 scores to four above. (Not over their range, which a
// single score far from all others would stretch.) So a row that is complete is read once.
//
// Queries and weights of the next block of tokens are loaded meanwhile. The scores of a run of
// tokens are written behind those of the last one, in a ring for each token of the block: where two
// runs do not fit, scorers wait in between until the selectors have read the last one, which they
// have before they rank the last few columns and write the set.
//
// One warp loads keys, a lane for each ring, and takes the next tokens from a counter before the
// scorers are done with the last, so that no one waits for it. Scorers have 184 registers, the
// others 72: no spills. At mbarriers between them scorers and selectors arrive each for itself, as
// racecheck does not see that a `__syncwarp` before lane 0 orders the others, too.
//
// Scorers wait a tenth of their time for selectors, as rows of more than half the room leave none
// for the next run, and eight rows are two turns for seven; but shorter waits brought nothing
// (docs/LOG.md). Suspected: issue slots, 58% of them used, and power: where calls follow each
// other, the clock falls at 700 W; the fastest call of twenty takes 10.7.
#pragma once

#include "indexer_topk/rows.cuh"

namespace dsa {

constexpr int kSelectors = 7;  // warps
constexpr int kSelectThreads = 32 * kSelectors;
constexpr int kKeptThreads = kScoreThreads + kSelectThreads + 32;
constexpr int kKeptScorerRegisters = 184, kHelperRegisters = 72;  // of 128 at the start
constexpr int kKeptAtOnce = 2;   // tiles in one stream of products: less code than four
constexpr int kBlocksAhead = 2;  // of tokens, told by the loader and not yet done with

// A block of tokens, as the loader tells the scorers, with its queries in shared memory.
template <class Shape>
struct TokenBlock {
    int first_token;  // negative: there are no more
    uint32_t scored;  // a bit for each token that sees more keys than topk
    LaneToken tokens[Shape::kTokens];
    alignas(16) float weights[Shape::kTokens][Shape::kHeads];
};

// A run whose scores are written, as the scorers tell the selectors.
template <int kTokens>
struct KeptRun {
    uint32_t tokens;  // a bit each; none: there are no more runs
    int first_token;  // of the block
    int start;        // of its rows in their rings
    int visible[kTokens];
};

// A set that is marked and not yet written; words = 0: none.
struct MarkedSet {
    uint32_t better[kMostKeptWords];
    int words;
    int32_t* out;
};

// What a selector needs.
template <int kDim>
struct SelectorStorage {
    MarkedSet sets[2];  // of rows in turn
    uint32_t passing[kMostKeptWords];
    union {  // in a walk, and outside of one
        alignas(16) uint32_t stages[StagedWalk<kDim>::kWords];
        SelectScratch scratch;
    };
};

// How many scores of a token's row lie in which bin.
template <int kDim>
struct RowCounts {
    static constexpr int kCount = kDim == 64 ? 512 : 256;
    using Bins = EqualBins<kCount>;

    alignas(16) uint32_t counts[kCount + 4];  // the first one behind them is for kNowhere
    float2 range;                             // of the bins
};

template <class Shape>
struct alignas(1024) KeptStorage {
    static_assert(Shape::kQueryBuffers == kBlocksAhead);
    ScoreStorage<Shape> score;
    SelectorStorage<Shape::kDim> selectors[kSelectors];
    TokenBlock<Shape> block[kBlocksAhead];
    KeptRun<Shape::kTokens> run[2];                    // of even and odd numbers, as the next two
    RowCounts<Shape::kDim> counts[2][Shape::kTokens];  // between runs zeros
    float2 moments[2][Shape::kTokens][4];              // of first scores: their sum, and of squares
    RowCounts<Shape::kDim> nowhere;                    // of tokens that take no part
    uint64_t told[kBlocksAhead], done[kBlocksAhead];   // a block; the scorers with it
    uint64_t scored[2], read[2];                       // a run; the selectors with its rows
};

// The scorers' side of the runs.
template <class Shape>
struct RunScorer {
    const IndexerTopkParams& p;
    KeptStorage<Shape>& s;
    Scorer<Shape> scorer;
    int number = 0;             // of the next run
    int oldest = 0;             // that has not been waited for
    int start = 0, length = 0;  // of the last one, in the rings of its rows

    // Until the selectors have read all runs before this one.
    __device__ void wait_for(int run) {
        for (; oldest < run; ++oldest) mbarrier_wait(&s.read[oldest % 2], oldest / 2 % 2);
    }

    __device__ void tell(const TokenBlock<Shape>& block, uint32_t tokens) {
        auto& run = s.run[number % 2];
        if (scorer.warp == 0) {
            if (scorer.lane == 0)
                run.tokens = tokens, run.first_token = block.first_token, run.start = start;
            if (scorer.lane < Shape::kTokens)
                run.visible[scorer.lane] = block.tokens[scorer.lane].visible;
        }
        mbarrier_arrive(&s.scored[number % 2]);
        ++number;
    }

    using Bins = typename RowCounts<Shape::kDim>::Bins;

    // Where the scores of the own tokens go.
    struct OwnRows {
        float* first;  // of the first one; the others follow
        Bins bins[Shape::kLaneTokens];
        uint32_t counts[Shape::kLaneTokens];  // address of what would be number 0
    };
    using Scores = typename Scorer<Shape>::Scores;

    // Lays the bins of a run's rows around the scores of its first tile. Of those that a lane made
    // it brings the sum and that of squares, for each own token. By all scorers.
    __device__ void lay_bins(const OwnTokens<Shape>& own, OwnRows& rows,
                             float2 (&sums)[Shape::kLaneTokens]) {
        auto& moments = s.moments[number % 2];
        if (scorer.ring == 0) {
#pragma unroll
            for (int a = 0; a < Shape::kLaneTokens; ++a) {
#pragma unroll
                for (int lanes = 4; lanes < 32; lanes *= 2) {
                    sums[a].x += __shfl_xor_sync(~0u, sums[a].x, lanes);
                    sums[a].y += __shfl_xor_sync(~0u, sums[a].y, lanes);
                }
                if (scorer.lane < 4 && own.seen[a] > 0)
                    moments[own.first + a][scorer.warp] = sums[a];
            }
        }
        named_barrier_sync(kSyncScorers, kScoreThreads);
#pragma unroll
        for (int a = 0; a < Shape::kLaneTokens; ++a) {
            const bool takes_part = own.seen[a] > 0;
            const int t = takes_part ? own.first + a : 0;
            float mean = 0.0f, square = 0.0f;
#pragma unroll
            for (int warp = 0; warp < 4; ++warp)
                mean += moments[t][warp].x, square += moments[t][warp].y;
            const float share = 1.0f / min(max(own.seen[a], 1), kTileKeys);
            mean *= share, square *= share;
            const float spread = 4.0f * sqrtf(fmaxf(square - mean * mean, 0.0f));
            auto& row = takes_part ? s.counts[number % 2][t] : s.nowhere;
            if (threadIdx.x < 4 && takes_part) row.range = {mean - spread, mean + spread};
            rows.bins[a] = {mean - spread, mean + spread};
            rows.counts[a] = shared_address(row.counts) - 4 * Bins::kFirst;
        }
    }

    // Stores the scores of a product and counts them. The first ones are not counted, as there are
    // no bins yet: selectors do that. Only the last ones may be of keys that not all tokens see.
    enum class Keys { kFirst, kSeenByAll, kLast };
    template <Keys kKeys>
    __device__ void put(const OwnTokens<Shape>& own, const OwnRows& rows, const Scores& scores) {
        constexpr bool kWhole = kKeys == Keys::kSeenByAll;
        const int row_step = 2 * p.capacity;
        int place = start + scores.key;
        if (place >= p.room) place -= p.room;
#pragma unroll
        for (int a = 0; a < Shape::kLaneTokens; ++a)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const bool seen = (kWhole ? 0 : scores.key + kRowStep * r) < own.seen[a];
                global_store(rows.first + (place + a * row_step) + kRowStep * r, scores.score[a][r],
                             seen);
                if (kKeys == Keys::kFirst) continue;
                uint32_t bin = rows.bins[a].number(scores.score[a][r]);
                if (!kWhole && !seen) bin = Bins::kNowhere;
                shared_add(rows.counts[a] + 4 * bin, 1);
            }
    }

    __device__ void keep(const TokenBlock<Shape>& block, const TokenRun& run) {
        constexpr int kRings = Shape::kRings, kStep = kKeptAtOnce * kRings;
        const OwnTokens<Shape> own(block.tokens, scorer.quad, run.tokens);
        const int tiles = run.tiles(), free = (p.room - length) / kTileKeys;
        start += length;
        if (start >= p.room) start -= p.room;
        length = (run.keys + kWholeColumns - 1) / kWholeColumns * kWholeColumns;
        wait_for(number - 1);
        if (min(kRings, tiles) > free) wait_for(number);
        OwnRows rows;
        rows.first = row_of<Shape>(p, own.first);
        keep_address(rows.first);
        float2 sums[Shape::kLaneTokens] = {};
        scorer.template score<1>(s.score, {0, min(kRings, tiles)}, [&](const Scores& scores) {
            put<Keys::kFirst>(own, rows, scores);
#pragma unroll
            for (int a = 0; a < Shape::kLaneTokens; ++a)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const bool seen = scores.key + kRowStep * r < own.seen[a];
                    const float score = seen ? scores.score[a][r] : 0.0f;
                    sums[a].x += score, sums[a].y = fmaf(score, score, sums[a].y);
                }
        });
        lay_bins(own, rows, sums);
        // Tiles that all tokens see as a whole, as far as there is room; then the others.
        const bool takes_part = run.tokens >> scorer.lane & 1;
        const int visible = block.tokens[scorer.lane % Shape::kTokens].visible;
        const int fewest = __reduce_min_sync(~0u, takes_part ? visible : INT_MAX);
        const int whole = max(fewest / Shape::kRoundKeys, 1) * kRings;
        TileRange part{kRings, kRings + max(free - kRings, 0) / kStep * kStep};
        if (free >= whole) part.last = whole;
#pragma unroll 1
        while (part.first < whole) {
            scorer.template score<kKeptAtOnce>(s.score, part, [&](const Scores& scores) {
                put<Keys::kSeenByAll>(own, rows, scores);
            });
            if (part.last < whole) wait_for(number);
            part = {part.last, whole};
        }
        if (tiles > free) wait_for(number);
        scorer.template score<1>(s.score, {whole, tiles}, [&](const Scores& scores) {
            put<Keys::kLast>(own, rows, scores);
        });
        tell(block, run.tokens);
    }

    __device__ void go(const KeyMaps& maps) {
        for (int n = 0;; ++n) {
            const int slot = n % kBlocksAhead;
            const auto& block = s.block[slot];
            mbarrier_wait(&s.told[slot], n / kBlocksAhead % 2);
            if (block.first_token < 0) {
                wait_for(number);
                return tell(block, 0);
            }
            uint32_t scored = block.scored;
            take_all_keys<Shape>(p, block.first_token, scored,
                                 [&](int t) { return block.tokens[t].visible; });
            fence_proxy_async();  // the copied queries, before products read them
            scorer.buffer = __shfl_sync(~0u, slot, 0);
            scorer.set_weights([&](int token, int head) { return block.weights[token][head]; });
            while (scored != 0) {
                const TokenRun run(block.tokens[scorer.lane % Shape::kTokens], scored);
                scored &= ~run.tokens;
                scorer.begin(maps, run);
                keep(block, run);
            }
            mbarrier_arrive(&s.done[slot]);
        }
    }
};

// A selector's side: every kSelectors-th token of all runs. A set is written after the next row is
// read, if that is there already: scorers wait for reading alone.
template <class Shape>
__device__ void select_kept(const IndexerTopkParams& p, KeptStorage<Shape>& s, uint32_t selector) {
    constexpr uint32_t kRun = 64;  // a place: the run's number times this, and the token's
    static_assert(Shape::kTokens + kSelectors <= kRun);
    auto& own = s.selectors[selector];
    uint32_t place = selector, turn = 0;
    if (threadIdx.x % 32 == 0) own.sets[0].words = own.sets[1].words = 0;
    __syncwarp();
#pragma unroll 1
    while (true) {
        const bool is_pending = own.sets[turn ^ 1].words != 0;
        const uint32_t number = place / kRun;
        const auto& run = s.run[number % 2];
        uint64_t* scored = &s.scored[number % 2];
        const uint32_t parity = number / 2 % 2;
        if (!is_pending || __all_sync(~0u, mbarrier_is_over(scored, parity))) {
            mbarrier_wait(scored, parity);
            uint32_t left = run.tokens;
            const uint32_t count = __popc(left);
            if (count == 0 && !is_pending) return;
            const auto advance = [&](uint32_t places) {
                place += places;
                const uint32_t count = __popc(s.run[place / kRun % 2].tokens);  // not held
                if (place % kRun < count) return;
                mbarrier_arrive(&s.read[place / kRun % 2]);
                place += kRun - count;
            };
            if (place % kRun < count) {
                for (uint32_t i = place % kRun; i > 0; --i) left &= left - 1;
                const int t = __ffs(left) - 1;
                keep_address(selector), keep_address(turn);  // what follows is not held for longer
                const KeptRow row{row_of<Shape>(p, t), p.room, run.start, run.visible[t]};
                MarkedSet& set = own.sets[turn];
                if (threadIdx.x % 32 == 0) {
                    set.words = (row.length + 31) / 32;
                    set.out = indices_of(p, run.first_token + t);
                }
                __syncwarp();
                auto& counts = s.counts[number % 2][t];
                const typename RowCounts<Shape::kDim>::Bins bins(counts.range.x, counts.range.y);
                mark_set<Shape::kDim>(
                    row, bins, counts.counts, {set.better, own.passing, set.words}, own.stages,
                    own.scratch, p.topk,
                    [&] { count_first<Shape::kRoundKeys>(row, bins, counts.counts); },
                    [&] { advance(kSelectors); });
            } else if (count > 0) {  // none in this run
                advance(0);
                continue;
            }
        }
        turn ^= 1;
        MarkedSet& last = own.sets[turn];
        // Lane 0 wrote it, perhaps a moment ago.
        const int words = __shfl_sync(~0u, threadIdx.x % 32 == 0 ? last.words : 0, 0);
        if (words == 0) continue;
        write_bits(last.better, words, own.scratch, last.out);
        if (threadIdx.x % 32 == 0) last.words = 0;
        __syncwarp();
    }
}

// The loader: takes blocks of tokens, the last ones first, and loads the keys of their runs.
template <class Shape>
struct BlockLoader {
    const IndexerTopkParams& p;
    KeptStorage<Shape>& s;
    const int lane = threadIdx.x % 32;
    RingPosition position;      // of a lane for each ring
    LaneToken token;            // of the block taken last
    int taken = 0, loaded = 0;  // blocks

    // Takes a block and tells the scorers.
    __device__ void take() {
        const int slot = taken % kBlocksAhead;
        auto& block = s.block[slot];
        mbarrier_wait(&s.done[slot], taken / kBlocksAhead % 2 ^ 1);
        ++taken;
        int number = 0;
        if (lane == 0) number = p.token_blocks - 1 - atomicAdd(p.next_block, 1);
        const int first_token = __shfl_sync(~0u, number, 0) * Shape::kTokens;
        const int64_t own = first_token + lane;
        const bool there = lane < Shape::kTokens && 0 <= own && own < p.tokens;
        token.find<Shape>(p, first_token);
        const uint32_t scored = __ballot_sync(~0u, there && token.visible > p.topk);
        if (lane < Shape::kTokens) block.tokens[lane] = token;
        if (lane == 0) block.first_token = first_token, block.scored = scored;
        if (scored != 0) copy_queries(first_token, s.score.queries[slot], block);
        copy_async_arrive(&s.told[slot]);
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&s.told[slot]);
    }

    // Starts to copy a block's queries and weights; of tokens past the end any.
    __device__ void copy_queries(int first_token, uint8_t* queries, TokenBlock<Shape>& block) {
        const auto existing = [&](int t) -> int64_t { return min(first_token + t, p.tokens - 1); };
#pragma unroll 4
        for (int i = lane; i < QueryPiece<Shape>::kAll; i += 32) {
            const QueryPiece<Shape> piece(i);
            copy_async(queries + piece.target,
                       p.q + existing(piece.token) * p.q_stride + piece.source);
        }
        for (int i = lane; i < Shape::kTokens * Shape::kHeads; i += 32) {
            const int t = i / Shape::kHeads, head = i % Shape::kHeads;
            copy_word_async(&block.weights[t][head],
                            p.weights + existing(t) * p.weight_stride + head);
        }
    }

    // Each ring is filled as it empties, one not waiting for the other.
    __device__ void fill(const KeyMaps& maps, const TokenRun& run, TileRange tiles) {
        const int ring = lane;
        for (int tile = tiles.first + ring; ring < Shape::kRings && tile < tiles.last;) {
            if (!mbarrier_is_over(&s.score.empty[ring][position.stage], position.parity ^ 1))
                continue;
            load_packed(maps, s.score, ring, position.stage, run, tiles.key(tile));
            position.advance(Shape::kStages);
            tile += Shape::kRings;
        }
        __syncwarp();
    }

    __device__ void go(const KeyMaps& maps) {
        take();
        for (;; ++loaded) {
            const auto& block = s.block[loaded % kBlocksAhead];
            if (block.first_token < 0) return;
            const LaneToken own = block.tokens[lane % Shape::kTokens];
            for (uint32_t scored = block.scored; scored != 0;) {
                const TokenRun run(own, scored);
                scored &= ~run.tokens;
                const int first = min(Shape::kRings * Shape::kStages, run.tiles());
                fill(maps, run, {0, first});
                if (taken == loaded + 1) take();  // now there is time
                fill(maps, run, {first, run.tiles()});
            }
            if (taken == loaded + 1) take();
        }
    }
};

template <class Shape>
__global__ void __launch_bounds__(kKeptThreads, 1)
    indexer_topk_kept_kernel(const __grid_constant__ KeyMaps maps, const IndexerTopkParams p) {
    auto& s = aligned_storage<KeptStorage<Shape>>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < kBlocksAhead; ++i) {
            mbarrier_init(&s.told[i], 33);  // its lanes' copies, and what it wrote
            mbarrier_init(&s.done[i], kScoreThreads);
        }
        for (int i = 0; i < 2; ++i) {
            mbarrier_init(&s.scored[i], kScoreThreads);
            mbarrier_init(&s.read[i], kSelectThreads);
        }
    }
    for (int i = threadIdx.x / 32; i < 2 * Shape::kTokens; i += kKeptThreads / 32)
        clear_counts<RowCounts<Shape::kDim>::kCount>(this_warp(), s.counts[i % 2][i / 2].counts);
    init_storage(s.score);
    if (threadIdx.x < kScoreThreads) {
        take_registers<kKeptScorerRegisters>();
        RunScorer<Shape>{p, s}.go(maps);
    } else {
        give_registers_back<kHelperRegisters>();
        const int selector = threadIdx.x / 32 - kScoreWarps;
        if (selector == 0) prefetch_keys<Shape>(p, maps);
        if (selector < kSelectors) {
            select_kept(p, s, selector);
        } else {
            BlockLoader<Shape>{p, s}.go(maps);
        }
    }
}

}  // namespace dsa
