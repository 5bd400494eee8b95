// indexer_topk on Hopper where tokens see many keys: scores (common/indexer_tile.cuh) that never
// reach memory, and the selection of lists.cuh. (kept.cuh is for short sequences alone.)
//
// A block of threads owns 8 tokens (at 16 heads) and walks all their keys. A score that beats its
// token's bound is appended to the token's list of candidates, which lies in L2; every thread has a
// segment of its own in the lists of its tokens, so an append is two comparisons, a predicated
// store and a predicated addition: no ballot, no atomics, no branch. The bounds are guesses from a
// sample of the keys, 1024 to 4096 in tiles spread over the sequence, whose scores stay in shared
// memory: at 131072 keys and topk = 2048 about 3500 to 3900 pass. After the last key each warp
// selects from a list, which it reads twice, ahead through shared memory that is free by then: 1024
// equal bins between the bound and the best of the sample leave one bin open, a few candidates that
// the warp compares; all better ones are marked in a bitmap, which writes the set in order.
//
// Tokens whose list has fewer than topk candidates, or more than it holds, walk their keys again
// with certain bounds: now the scorers meet every few tiles, the room left in the fullest segment
// says how many tiles are safe, and full lists are cut to their best topk.
//
// Where a token sees so few keys that the room of its list holds all its scores (14848 at 16
// heads), these are kept instead and it is selected from them: rows.cuh.
//
// Blocks take the next 8 tokens from a counter, the last tokens first: those of one sequence see
// the most keys. Scorers and loaders, a warp each for two rings, meet at mbarriers only: what they
// tell each other is the next block of tokens and which of a run's come again. Workspace: 132
// blocks x 8 lists x 7.4 K candidates of 8 bytes, 60 MB.
//
// Measured on an H200 at 16 heads x 64: 0.30 ms for 2048 tokens at the end of 32768 keys, 0.87 for
// 131072, where the products alone are 0.41; 30 ms for all of 131072. A block takes 3.0 us for
// each 1024 keys, bound by the sums over heads (361 instructions a warp and tile, 256 of them ReLU
// and sums), and about 51 us whatever their number, for the start, the sample and the lists.
#pragma once

#include "common/indexer_tile.cuh"
#include "indexer_topk/lists.cuh"
#include "indexer_topk/params.h"
#include "indexer_topk/rows.cuh"

namespace dsa {

constexpr int kThreadKeys = 4;    // of a tile: the most that a thread appends to a list
constexpr int kFewestRounds = 2;  // tiles a warpgroup that are worth going on for without a cut
constexpr int kFewestSampled = 8, kMostSampled = 32;  // tiles

// How the keys of a run are walked.
template <class Shape>
struct RunPlan {
    TileRange sample;  // empty: no guess
    TileRange all;

    __device__ explicit RunPlan(const TokenRun& run) : sample{0, 0}, all{0, run.tiles()} {
        constexpr int kRoom = TopkStorage<Shape>::kSampled / kTileKeys;
        const int tiles = min(min(max(all.last / 32, kFewestSampled), kMostSampled), kRoom);
        if (all.last >= 2 * tiles) sample = {0, tiles, all.last / tiles};
    }
};

// How many a thread appended to the segments of its own tokens.
template <class Shape>
__device__ void report(TopkStorage<Shape>& s, int quad, const int (&count)[Shape::kLaneTokens]) {
    if (quad % Shape::kLanesPerToken != 0) return;
#pragma unroll
    for (int a = 0; a < Shape::kLaneTokens; ++a)
        s.appended[Shape::token(quad, a)][threadIdx.x / 4] = count[a];
}

// Keeps every score of a sample.
template <class Shape>
struct Sampler {
    OwnTokens<Shape> own;
    float* column;  // this thread's, of the first own token
    int count[Shape::kLaneTokens] = {};

    __device__ Sampler(TopkStorage<Shape>& s, int quad, uint32_t tokens)
        : own(s.tokens, quad, tokens), column(&s.sample[own.first][0][threadIdx.x / 4]) {}

    __device__ void operator()(const typename Scorer<Shape>::Scores& scores) {
#pragma unroll
        for (int a = 0; a < Shape::kLaneTokens; ++a) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (scores.key + kRowStep * r >= own.seen[a]) continue;
                column[a * TopkStorage<Shape>::kSampled + count[a]++ * kSegments] =
                    scores.score[a][r];
            }
        }
    }
};

// Appends what passes to the lists of this lane's tokens.
template <class Shape>
struct Appender {
    static constexpr int kOwn = Shape::kLaneTokens;
    OwnTokens<Shape> own;
    float bound[kOwn];
    int room;  // of a segment
    // Of this thread's segments, in the workspace: the next entry, and the one after the first that
    // finds no room.
    uint32_t next[kOwn], end[kOwn];

    __device__ Appender(const IndexerTopkParams& p, const TopkStorage<Shape>& s, int quad,
                        uint32_t tokens, const Segments& segments)
        : own(s.tokens, quad, tokens), room(segments.room) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
            bound[a] = s.bound[own.first + a];
            next[a] = list_begin<Shape>(p, own.first + a) + segments.begin + threadIdx.x / 4;
            end[a] = next[a] + (room + 1) * kSegments;
        }
    }

    __device__ void operator()(const IndexerTopkParams& p,
                               const typename Scorer<Shape>::Scores& scores) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int key = scores.key + kRowStep * r;
                const bool pass = key < own.seen[a] && passes(scores.score[a][r], bound[a]);
                global_store(p.candidates + next[a], scores.score[a][r], key, pass);
                if (pass) next[a] += kSegments;
            }
            next[a] = min(next[a], end[a]);
        }
    }

    // How many were appended, one of those that found no room included.
    __device__ void report(TopkStorage<Shape>& s, int quad) const {
        int count[kOwn];
#pragma unroll
        for (int a = 0; a < kOwn; ++a) count[a] = room + 1 - (end[a] - next[a]) / kSegments;
        dsa::report(s, quad, count);
    }
};

// Whether all scores of a run are kept, as there is room for them.
__device__ __forceinline__ bool are_kept(const IndexerTopkParams& p, const TokenRun& run) {
    return run.keys <= p.room;
}

// All keys of a run whose scores are kept: the scorers' side.
template <class Shape>
__device__ void keep_and_select(const IndexerTopkParams& p, TopkStorage<Shape>& s,
                                Scorer<Shape>& scorer, const TokenRun& run, int first_token) {
    const OwnTokens<Shape> own(s.tokens, scorer.quad, run.tokens);
    float* row[Shape::kLaneTokens];
#pragma unroll
    for (int a = 0; a < Shape::kLaneTokens; ++a) {
        row[a] = row_of<Shape>(p, own.first + a);
        keep_address(row[a]);
    }
    scorer.template score<kTilesAtOnce>(s.score, {0, run.tiles()}, [&](const auto& scores) {
#pragma unroll
        for (int a = 0; a < Shape::kLaneTokens; ++a)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                global_store(row[a] + scores.key + kRowStep * r, scores.score[a][r],
                             scores.key + kRowStep * r < own.seen[a]);
    });
    named_barrier_sync(kSyncScorers, kScoreThreads);
    const int t = scorer.warp;
    if (t < Shape::kTokens && run.tokens >> t & 1) {
        const KeptRow own_row{row_of<Shape>(p, t), p.room, 0, s.tokens[t].visible};
        select_row<Shape::kDim>(own_row, s.scratch[t], s.bitmap[t], p.topk,
                                indices_of(p, first_token + t));
    }
    named_barrier_sync(kSyncScorers, kScoreThreads);
}

// All keys of a run of which candidates are listed.
template <class Shape>
__device__ void select_run(const IndexerTopkParams& p, TopkStorage<Shape>& s, Scorer<Shape>& scorer,
                           const TokenRun& run, int first_token, uint32_t* again) {
    const RunPlan<Shape> plan(run);
    const auto meet = [] { named_barrier_sync(kSyncScorers, kScoreThreads); };
    const int list = scorer.warp;
    const auto forget_bounds = [&] {
        if (scorer.lane == 0 && list < Shape::kTokens) s.front[list] = 0, s.bound[list] = NAN;
        meet();
    };
    uint32_t tokens = run.tokens;
    const auto settles = [&] { return list < Shape::kTokens && (tokens >> list & 1) != 0; };
    if (scorer.warp == 0 && scorer.lane == 0) *again = 0;
    forget_bounds();
    if (plan.sample.last > 0) {
        Sampler<Shape> sampler(s, scorer.quad, tokens);
        scorer.template score<1>(s.score, plan.sample,
                                 [&](const auto& scores) { sampler(scores); });
        report(s, scorer.quad, sampler.count);
        meet();
        if (settles()) guess_bound(p, s, list);
        meet();
    }
    bool certain = false;
    TileRange tiles = plan.all;
    Appender<Shape> appender(p, s, scorer.quad, tokens, Segments(p, false));
    while (true) {
        scorer.template score<kTilesAtOnce>(s.score, tiles,
                                            [&](const auto& scores) { appender(p, scores); });
        appender.report(s, scorer.quad);
        meet();
        const bool last = tiles.last == plan.all.last;
        int rounds = 0;  // tiles a warpgroup that a certain pass can go on for
        if (certain) {
            int fullest = 0;
            for (int i = scorer.lane; i < kSegments * Shape::kTokens; i += 32)
                fullest = max(fullest, (&s.appended[0][0])[i]);
            rounds = (appender.room - __reduce_max_sync(~0u, fullest)) / kThreadKeys;
        }
        if (last || rounds < kFewestRounds) {
            if (settles()) settle_list(p, s, list, first_token, certain, last, again);
            if (last && certain) break;
            if (last) {
                meet();
                if (scorer.warp == 0 && scorer.lane == 0) mbarrier_arrive(&s.settled);
                tokens = *again;
                if (tokens == 0) return;
                certain = true;
                forget_bounds();
                tiles = {0, 0};
            } else {
                meet();
            }
            appender = Appender<Shape>(p, s, scorer.quad, tokens, Segments(p, true));
            rounds = appender.room / kThreadKeys;
        } else {
            meet();  // before the counts are written again
        }
        tiles = {tiles.last, min(tiles.last + rounds * kWarpgroups, plan.all.last)};
    }
    meet();
}

template <class Shape>
__global__ void __launch_bounds__(kIndexerThreads, 1)
    indexer_topk_kernel(const __grid_constant__ KeyMaps maps, const IndexerTopkParams p) {
    auto& s = aligned_storage<TopkStorage<Shape>>();
    if (threadIdx.x == 0) {
        mbarrier_init(&s.told, 1);
        mbarrier_init(&s.heard, Shape::kRings);
        mbarrier_init(&s.settled, 1);
    }
    init_storage(s.score);

    LaneToken own;
    // Bit t: token t of the block sees more keys than topk.
    const auto scored_tokens = [&](int block) {
        own = {};
        own.find<Shape>(p, block * Shape::kTokens);
        return __ballot_sync(~0u, own.visible > p.topk);
    };
    uint32_t block_parity = 0, run_parity = 0;  // of the next ones
    if (threadIdx.x >= kScoreThreads) {
        give_registers_back<kLoaderRegisters>();
        KeyLoader<Shape> loader;
        if (loader.ring == Shape::kRings) prefetch_keys<Shape>(p, maps);
        if (loader.ring >= Shape::kRings) return;
        while (true) {
            mbarrier_wait(&s.told, block_parity);
            const int block = s.block;
            __syncwarp();
            if (loader.lane == 0) mbarrier_arrive(&s.heard);
            if (block < 0) return;
            block_parity ^= 1;
            for (uint32_t scored = scored_tokens(block); scored != 0;) {
                const TokenRun run(own, scored);
                scored &= ~run.tokens;
                const RunPlan<Shape> plan(run);
                if (are_kept(p, run)) {
                    loader.load(p, maps, s.score, run, plan.all);
                    continue;
                }
#pragma unroll 1
                for (int pass = 0; pass < 3; ++pass) {
                    if (pass == 2) {
                        mbarrier_wait(&s.settled, run_parity);
                        if (s.again[run_parity] == 0) break;
                    }
                    loader.load(p, maps, s.score, run, pass == 0 ? plan.sample : plan.all);
                }
                run_parity ^= 1;
            }
        }
    } else {
        take_registers<kScorerRegisters>();
        Scorer<Shape> scorer;
        while (true) {
            named_barrier_sync(kSyncScorers, kScoreThreads);  // the last tokens are done with
            if (scorer.warp == 0 && scorer.lane == 0) {
                mbarrier_wait(&s.heard, block_parity ^ 1);
                s.block = p.token_blocks - 1 - atomicAdd(p.next_block, 1);
                mbarrier_arrive(&s.told);
            }
            named_barrier_sync(kSyncScorers, kScoreThreads);
            const int block = s.block, first_token = block * Shape::kTokens;
            if (block < 0) return;
            block_parity ^= 1;
            uint32_t scored = scored_tokens(block);
            take_all_keys<Shape>(p, first_token, scored,
                                 [&](int t) { return __shfl_sync(~0u, own.visible, t); });
            if (scored == 0) continue;
            if (scorer.lane == scorer.warp && scorer.warp < Shape::kTokens)
                s.tokens[scorer.warp] = own;
            load_queries(p, s.score, first_token, [] {});
            scorer.load_weights(p, first_token);
            named_barrier_sync(kSyncScorers, kScoreThreads);
            while (scored != 0) {
                const TokenRun run(s.tokens[scorer.lane % Shape::kTokens], scored);
                scored &= ~run.tokens;
                scorer.begin(maps, run);
                if (are_kept(p, run)) {
                    keep_and_select(p, s, scorer, run, first_token);
                } else {
                    select_run(p, s, scorer, run, first_token, &s.again[run_parity]);
                    run_parity ^= 1;
                }
            }
        }
    }
}

}  // namespace dsa
