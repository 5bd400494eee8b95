// indexer_topk on Hopper, the kernel: scores (common/indexer_tile.cuh) that never reach memory, and
// the selection of lists.cuh.
//
// A block of threads owns 8 tokens (at 16 heads) and walks all their keys. A score that beats its
// token's bound is appended to the token's list of candidates, which lies in L2; every thread has a
// segment of its own in the lists of its tokens, so an append is a comparison and two predicated
// instructions, a store and a count: no ballot, no atomics, no branch. The bounds are guesses from
// a sample of the keys, 1024 to 4096 in tiles spread over the sequence, whose scores stay in shared
// memory: at 131072 keys and topk = 2048 about 3500 to 3900 pass. After the last key each warp
// selects from a list, which it reads twice where it lies: 1024 equal bins between the bound and
// the best of the sample leave one bin open, a few candidates that the warp compares; all better
// ones are marked in a bitmap, which writes the set in order.
//
// Tokens whose list has fewer than topk candidates, or more than it holds, walk their keys again
// with certain bounds: now the scorers meet every few tiles, the room left in the fullest segment
// says how many tiles are safe, and full lists are cut to their best topk.
//
// Blocks take the next 8 tokens from a counter, the last tokens first: those of one sequence see
// the most keys. Workspace: 132 blocks x 8 lists x 7.4 K candidates of 8 bytes, 60 MB.
// Measured on an H200 at 16 heads x 64: 0.32 ms for 2048 tokens at the end of 32768 keys, 1.20 for
// 131072, where the products alone are 0.41; 34.4 ms for all of 131072. A block takes 3.6 us for
// each 1024 keys, bound by instructions (449 a warp and tile, 397 of them for scores), and 42 us
// whatever their number, for the sample and the lists.
#pragma once

#include "common/indexer_tile.cuh"
#include "indexer_topk/lists.cuh"
#include "indexer_topk/params.h"

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
        if (all.last < 2 * tiles) return;
        // Blocks that start together do not ask for the same tiles together, nor for tiles a power
        // of two apart. (The first has brought no time, the second was not measured apart.)
        const int turn = static_cast<int>(blockIdx.x) % tiles;
        sample = {0, tiles, (all.last / tiles - 1) | 1, turn};
    }
};

// Of the tokens that a lane scores: which take part, and how many keys they see.
template <class Shape>
struct OwnTokens {
    static constexpr int kOwn = Shape::kLaneTokens;
    int first;
    int seen[kOwn];  // 0 if the token takes no part, or is another lane's

    __device__ OwnTokens(const TopkStorage<Shape>& s, int quad, uint32_t tokens)
        : first(Shape::token(quad, 0)) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
            const bool mine = tokens >> (first + a) & 1 && quad % Shape::kLanesPerToken == 0;
            seen[a] = mine ? s.score.visible[first + a] : 0;
        }
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
        : own(s, quad, tokens), column(&s.sample[own.first][0][threadIdx.x / 4]) {}

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
    int count[kOwn] = {};  // in this thread's segment, those that found no room included
    float bound[kOwn];
    int room;            // of the segment
    int whole;           // keys that all tokens of the block see
    Candidate* segment;  // this thread's, in the list of the first own token

    __device__ Appender(const IndexerTopkParams& p, const TopkStorage<Shape>& s, int quad,
                        uint32_t tokens, const Segments& segments)
        : own(s, quad, tokens), room(segments.room) {
        segment = list_of<Shape>(p, own.first) + segments.begin + threadIdx.x / 4;
#pragma unroll
        for (int a = 0; a < kOwn; ++a) bound[a] = s.bound[own.first + a];
        whole = Shape::kLanesPerToken == 1 ? INT_MAX : 0;
        for (int t = 0; t < Shape::kTokens; ++t)
            whole = min(whole, tokens >> t & 1 ? s.score.visible[t] : 0);
    }

    __device__ void operator()(const IndexerTopkParams& p,
                               const typename Scorer<Shape>::Scores& scores) {
        if (scores.end <= whole) {
            append<true>(p, scores);
        } else {
            append<false>(p, scores);
        }
    }

    template <bool kWhole>
    __device__ void append(const IndexerTopkParams& p,
                           const typename Scorer<Shape>::Scores& scores) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float score = scores.score[a][r];
                const int key = scores.key + kRowStep * r;
                const bool pass = passes(score, bound[a]) && (kWhole || key < own.seen[a]);
                global_store(segment + a * p.capacity + min(count[a], room) * kSegments, score, key,
                             pass);
                count[a] += pass;
            }
        }
    }
};

// All keys of a run: the scorers' side.
template <class Shape>
__device__ void select_run(const IndexerTopkParams& p, TopkStorage<Shape>& s, Scorer<Shape>& scorer,
                           const TokenRun& run, int first_token) {
    const RunPlan<Shape> plan(run);
    const auto meet = [] { named_barrier_sync(kSyncScorers, kScoreThreads); };
    const auto forget_bounds = [&] {
        if (threadIdx.x < Shape::kTokens) s.front[threadIdx.x] = 0, s.bound[threadIdx.x] = NAN;
        meet();
    };
    const int list = threadIdx.x / 32;  // this warp's
    uint32_t tokens = run.tokens;
    const auto settles = [&] { return list < Shape::kTokens && (tokens >> list & 1) != 0; };
    if (threadIdx.x == 0) s.again = 0;
    forget_bounds();
    if (plan.sample.last > 0) {
        Sampler<Shape> sampler(s, scorer.quad, tokens);
        scorer.score(p, s.score, run, plan.sample, [&](const auto& scores) { sampler(scores); });
        report(s, scorer.quad, sampler.count);
        meet();
        if (settles()) guess_bound(p, s, list);
        meet();
    }
    bool certain = false;
    TileRange tiles = plan.all;
    Appender<Shape> appender(p, s, scorer.quad, tokens, Segments(p, false));
    while (true) {
        scorer.score(p, s.score, run, tiles, [&](const auto& scores) { appender(p, scores); });
        report(s, scorer.quad, appender.count);
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
            if (settles()) settle_list(p, s, list, first_token, certain, last);
            if (last && certain) break;
            if (last) {
                __syncthreads();  // with the loader
                tokens = s.again;
                if (tokens == 0) return;
                certain = true;
                meet();
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
    indexer_topk_kernel(const __grid_constant__ CUtensorMap map, const IndexerTopkParams p) {
    auto& s = aligned_storage<TopkStorage<Shape>>();
    init_storage(s.score);

    // The next tokens, for the whole block of threads; false if there are none. Bit t of `scored`:
    // token t sees more keys than topk.
    const auto next_tokens = [&](int& first_token, uint32_t& scored) {
        __syncthreads();  // the last ones are done with
        if (threadIdx.x == 0) s.block = p.token_blocks - 1 - atomicAdd(p.next_block, 1);
        __syncthreads();
        if (s.block < 0) return false;
        first_token = s.block * Shape::kTokens;
        find_keys(p, s.score, first_token);
        __syncthreads();
        scored = 0;
        for (int t = 0; t < Shape::kTokens; ++t)
            if (s.score.visible[t] > p.topk) scored |= 1u << t;
        return true;
    };

    int first_token;
    uint32_t scored;
    if (threadIdx.x >= kScoreThreads) {
        give_registers_back<kLoaderRegisters>();
        KeyLoader<Shape> loader;
        while (next_tokens(first_token, scored)) {
            while (scored != 0) {
                const TokenRun run = next_run(s.score, scored);
                scored &= ~run.tokens;
                const RunPlan<Shape> plan(run);
                const bool loads = threadIdx.x < kScoreThreads + 32 * kWarpgroups;
                if (loads) {
                    loader.load(p, map, s.score, run, plan.sample);
                    loader.load(p, map, s.score, run, plan.all);
                }
                __syncthreads();  // with the scorers, who know now
                if (loads && s.again) loader.load(p, map, s.score, run, plan.all);
            }
        }
    } else {
        take_registers<kScorerRegisters>();
        Scorer<Shape> scorer;
        while (next_tokens(first_token, scored)) {
            for (int t = 0; t < Shape::kTokens && first_token + t < p.tokens; ++t) {
                if (scored >> t & 1) continue;
                int32_t* row = p.indices + static_cast<int64_t>(first_token + t) * p.topk;
                const int visible = s.score.visible[t];
                for (int i = threadIdx.x; i < p.topk; i += kScoreThreads)
                    row[i] = i < visible ? i : -1;
            }
            if (scored == 0) continue;
            load_queries(p, s.score, first_token);
            scorer.load_weights(p, first_token);
            named_barrier_sync(kSyncScorers, kScoreThreads);
            while (scored != 0) {
                const TokenRun run = next_run(s.score, scored);
                scored &= ~run.tokens;
                select_run(p, s, scorer, run, first_token);
            }
        }
    }
}

}  // namespace dsa
