// indexer_logits on Hopper, the kernel: see common/indexer_tile.cuh for how a tile is scored.
//
// A block owns 8 tokens (at 16 heads) and key_rounds x 256 keys. Scores go from registers to
// memory, 32 bytes at a time (8 keys of a token): 2048 x 131072 scores are 1.07 GB, 0.25 ms of
// writing under 0.4 ms of products and sums. Blocks of the same tokens run side by side, so that
// the keys, 8 MB at 131072, come from L2. Decode has few tokens and many keys: key_rounds shrinks
// until the blocks fill the GPU; it changes no bit. Measured on an
// H200: 0.82 ms at 16 heads x 64, 59% of the issue slots; 1000 TFLOPS at 32 and 64 heads x 128.
#pragma once

#include "common/indexer_tile.cuh"

namespace dsa {

template <class Shape>
__global__ void __launch_bounds__(kIndexerThreads, 1)
    indexer_logits_kernel(const __grid_constant__ CUtensorMap map, const IndexerLogitsParams p) {
    auto& s = aligned_storage<ScoreStorage<Shape>>();
    const int first_token = blockIdx.x / p.key_blocks * Shape::kTokens;
    const int key_block = blockIdx.x % p.key_blocks;
    const int first_tile = key_block * p.key_rounds * kWarpgroups;
    const int end_tile = first_tile + p.key_rounds * kWarpgroups;
    init_barriers(s);
    find_keys(p, s, first_token);
    __syncthreads();

    uint32_t scored = 0;
#pragma unroll
    for (int t = 0; t < Shape::kTokens; ++t)
        if (s.visible[t] > first_tile * kTileKeys) scored |= 1u << t;
    const auto tiles = [&](const TokenRun& run) {
        return TileRange{first_tile, min(end_tile, run.tiles())};
    };
    if (threadIdx.x >= kScoreThreads) {
        give_registers_back<kLoaderRegisters>();
        if (threadIdx.x == kScoreThreads) {
            KeyLoader<Shape> loader;
            while (scored != 0) {
                const TokenRun run = next_run(s, scored);
                scored &= ~run.tokens;
                loader.load(p, map, s, run, tiles(run));
            }
        }
    } else {
        take_registers<kScorerRegisters>();
        const int64_t end = min(int64_t{end_tile} * kTileKeys, int64_t{p.width});
        for (int t = 0; t < Shape::kTokens && first_token + t < p.tokens; ++t) {
            float* row = p.out + (first_token + t) * p.out_stride;
            const int64_t unseen = max(s.visible[t], first_tile * kTileKeys);
            for (int64_t key = unseen + threadIdx.x; key < end; key += kScoreThreads)
                row[key] = -INFINITY;
        }
        if (scored == 0) return;
        load_queries(p, s, first_token);
        Scorer<Shape> scorer;
        scorer.load_weights(p, first_token);
        named_barrier_sync(kSyncScorers, kScoreThreads);
        while (scored != 0) {
            const TokenRun run = next_run(s, scored);
            scored &= ~run.tokens;
            int seen[Shape::kLaneTokens];
            float* row[Shape::kLaneTokens];
#pragma unroll
            for (int a = 0; a < Shape::kLaneTokens; ++a) {
                const int token = Shape::token(scorer.quad, a);
                const bool mine =
                    run.tokens >> token & 1 && scorer.quad % Shape::kLanesPerToken == 0;
                seen[a] = mine ? s.visible[token] : 0;
                row[a] = p.out + (first_token + token) * p.out_stride;
            }
            scorer.score(p, s, run, tiles(run), [&](const auto& scores) {
#pragma unroll
                for (int a = 0; a < Shape::kLaneTokens; ++a)
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        if (scores.key + 8 * r < seen[a])
                            row[a][scores.key + 8 * r] = scores.score[a][r];
            });
        }
    }
}

}  // namespace dsa
