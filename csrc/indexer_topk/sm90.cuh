// indexer_topk on Hopper, the kernel: scores (common/indexer_tile.cuh) that never reach memory, and
// the selection of common/candidates.cuh.
//
// A block of threads owns 8 tokens (at 16 heads) and walks all their keys. A score that beats its
// token's bound is appended to the token's list of candidates, which lies in L2; every warp has a
// segment of its own in each list, so an append is a ballot and a store, without atomics. Every few
// tiles the scorers meet and look at the fullest segment: the smallest remaining room says how many
// tiles they may go on before they must meet again, so nothing overflows, whatever the scores. When
// the room is gone, warpgroup g cuts the lists of tokens g and g + 4 to the best `topk`, and the
// bound rises to the last of them. For scores in random order that happens after 4096, 12 K, 37 K,
// 110 K, ... keys. After the last key the same cut gives the set, and a bitmap its ascending order.
//
// Blocks take the next 8 tokens from a counter, the last tokens first: those of one sequence see
// the most keys. Workspace: 132 blocks x 8 lists x 7.4 K candidates of 8 bytes, 60 MB. Shared
// memory at 16 x 64: rings 48 KB, queries 8 KB, and for each warpgroup a list's keys and bins, 4 x
// 34 KB.
#pragma once

#include "common/candidates.cuh"
#include "common/indexer_tile.cuh"
#include "indexer_topk/params.h"

namespace dsa {

constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kWarpKeys = 32;     // of a tile: the most that a warp appends to a list
constexpr int kFewestRounds = 2;  // tiles a warpgroup that are worth going on for without a cut

template <class Shape>
struct alignas(1024) TopkStorage {
    ScoreStorage<Shape> score;
    uint32_t bitmap[kWarpgroups][kBitmapWords];
    SelectScratch scratch[kWarpgroups];
    int appended[2][kScoreWarps]
                [Shape::kTokens];  // in turn, so that one can be read while the next fills
    int front[Shape::kTokens];     // candidates before the segments
    float bound[Shape::kTokens];
    int block;
    alignas(16) uint32_t lists[];  // [kWarpgroups][capacity]: keys of the list that is cut
};

// Cuts the list of token t, by one warpgroup; `last`: and writes the set instead of keeping it.
template <class Shape>
__device__ void cut_list(const IndexerTopkParams& p, TopkStorage<Shape>& s, int first_token, int t,
                         int turn, bool last) {
    const int g = threadIdx.x / 128;
    const ThreadGroup<128> group{static_cast<int>(threadIdx.x % 128), kSyncWarpgroup + g};
    uint32_t* list = s.lists + g * p.capacity;
    const int64_t offset = (static_cast<int64_t>(blockIdx.x) * Shape::kTokens + t) * p.capacity;
    uint32_t* keys = p.keys + offset;
    int32_t* positions = p.positions + offset;

    const int front = s.front[t];
    for (int i = (front > 0 ? 0 : p.front) + 4 * group.thread; i < p.capacity; i += 4 * 128)
        copy_async(list + i, keys + i);
    copy_async_wait();
    group.sync();
    for (int i = front + group.thread; i < p.front; i += 128) list[i] = 0;
    int total = front;
    for (int w = 0; w < kScoreWarps; ++w) {
        const int appended = s.appended[turn][w][t];
        uint32_t* segment = list + p.front + w * p.segment;
        for (int i = appended + group.thread; i < p.segment; i += 128) segment[i] = 0;
        total += appended;
    }
    group.sync();
    Threshold threshold{0, INT_MAX};
    if (total >= p.topk)
        threshold = find_threshold(group, s.scratch[g], p.capacity, list, positions, p.topk);
    if (last) {
        int32_t* row = p.indices + static_cast<int64_t>(first_token + t) * p.topk;
        write_ascending(group, s.scratch[g], p.capacity, list, threshold, positions,
                        s.score.visible[t], s.bitmap[g], row);
    } else {
        keep(group, s.scratch[g], p.capacity, list, threshold, keys, positions);
        if (group.thread == 0) {
            s.front[t] = min(total, p.topk);
            if (total >= p.topk) s.bound[t] = score_of(threshold.key);
        }
    }
}

// Appends what passes to the lists of this lane's tokens.
template <class Shape>
struct Appender {
    static constexpr int kOwn = Shape::kLaneTokens;
    int count[kOwn];  // in this warp's segment
    int seen[kOwn];   // keys of the token; 0 if it is not of this run, or another lane's
    float bound[kOwn];
    uint32_t* keys;  // this warp's segment in the list of the first own token
    int64_t to_positions;

    __device__ void operator()(const IndexerTopkParams& p,
                               const typename Scorer<Shape>::Scores& scores) {
        const uint32_t quad_lanes = 0x11111111u << (threadIdx.x % 4),
                       below = (1u << (threadIdx.x % 32)) - 1;
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
            const bool first = scores.key < seen[a] && passes(scores.score[a][0], bound[a]);
            const bool second = scores.key + 8 < seen[a] && passes(scores.score[a][1], bound[a]);
            const uint32_t firsts = __ballot_sync(~0u, first) & quad_lanes;
            const uint32_t seconds = __ballot_sync(~0u, second) & quad_lanes;
            uint32_t* end = keys + a * p.capacity + count[a];
            if (first) append(p, end + __popc(firsts & below), scores.score[a][0], scores.key);
            if (second)
                append(p, end + __popc(firsts) + __popc(seconds & below), scores.score[a][1],
                       scores.key + 8);
            count[a] += __popc(firsts) + __popc(seconds);
        }
    }

    __device__ void append(const IndexerTopkParams& p, uint32_t* at, float score, int key) {
        *at = order_key(score);
        reinterpret_cast<int32_t*>(at)[to_positions] = key;
    }
};

// All keys of a run: the scorers' side.
template <class Shape>
__device__ void select_run(const IndexerTopkParams& p, TopkStorage<Shape>& s, Scorer<Shape>& scorer,
                           const TokenRun& run, int first_token) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x < Shape::kTokens) s.front[threadIdx.x] = 0, s.bound[threadIdx.x] = NAN;
    Appender<Shape> appender;
    appender.to_positions = p.positions - reinterpret_cast<int32_t*>(p.keys);
    const int own = Shape::token(scorer.quad, 0);
    appender.keys = p.keys +
                    (static_cast<int64_t>(blockIdx.x) * Shape::kTokens + own) * p.capacity +
                    p.front + warp * p.segment;
#pragma unroll
    for (int a = 0; a < Shape::kLaneTokens; ++a) {
        const bool mine = run.tokens >> (own + a) & 1 && scorer.quad % Shape::kLanesPerToken == 0;
        appender.seen[a] = mine ? s.score.visible[own + a] : 0;
        appender.bound[a] = NAN;
        appender.count[a] = 0;
    }
    const int tiles = (run.keys + kTileKeys - 1) / kTileKeys,
              rounds = (tiles + kWarpgroups - 1) / kWarpgroups;
    int turn = 0;
    for (int done = 0, fullest = 0; done < rounds;) {
        const int first = done * kWarpgroups + scorer.group;
        done = min(rounds, done + (p.segment - fullest) / kWarpKeys);
        scorer.score(p, s.score, run, first, min(done * kWarpgroups, tiles),
                     [&](const auto& scores) { appender(p, scores); });
        turn ^= 1;
        if (scorer.lane < 4 && scorer.quad % Shape::kLanesPerToken == 0) {
#pragma unroll
            for (int a = 0; a < Shape::kLaneTokens; ++a)
                s.appended[turn][warp][own + a] = appender.count[a];
        }
        named_barrier_sync(kSyncScorers, kScoreThreads);
        fullest = 0;
        const int* appended = &s.appended[turn][0][0];
#pragma unroll
        for (int i = scorer.lane; i < kScoreWarps * Shape::kTokens; i += 32)
            fullest = max(fullest, appended[i]);
        fullest = __reduce_max_sync(~0u, fullest);
        const bool last = done == rounds;
        if (!last && p.segment - fullest >= kFewestRounds * kWarpKeys) continue;

        for (int t = scorer.group; t < Shape::kTokens; t += kWarpgroups)
            if (run.tokens >> t & 1) cut_list(p, s, first_token, t, turn, last);
        named_barrier_sync(kSyncScorers, kScoreThreads);
        fullest = 0;
#pragma unroll
        for (int a = 0; a < Shape::kLaneTokens; ++a) {
            appender.count[a] = 0;
            appender.bound[a] = s.bound[own + a];
        }
    }
}

template <class Shape>
__global__ void __launch_bounds__(kIndexerThreads, 1)
    indexer_topk_kernel(const __grid_constant__ CUtensorMap map, const IndexerTopkParams p) {
    extern __shared__ uint8_t dynamic[];
    auto& s = *reinterpret_cast<TopkStorage<Shape>*>((reinterpret_cast<uintptr_t>(dynamic) + 1023) &
                                                     ~uintptr_t{1023});
    init_barriers(s.score);

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
            while (scored != 0 && threadIdx.x == kScoreThreads) {
                const TokenRun run = next_run(s.score, scored);
                scored &= ~run.tokens;
                loader.load(p, map, s.score, run, 0, (run.keys + kTileKeys - 1) / kTileKeys);
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
