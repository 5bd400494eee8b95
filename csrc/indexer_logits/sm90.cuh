// indexer_logits on Hopper, the kernel: see common/indexer_tile.cuh for how a tile is scored.
//
// A block owns 8 tokens (at 16 heads) and key_rounds x 256 keys. Scores go from registers to
// memory, 32 bytes at a time (8 keys of a token): 2048 x 131072 scores are 1.07 GB, 0.25 ms of
// writing under 0.4 ms of products and sums. Blocks of the same tokens run side by side, so that
// the keys, 8 MB at 131072, come from L2. Decode has few tokens and many keys: key_rounds shrinks
// until the blocks fill the GPU; it changes no bit. Measured on an H200: 0.81 ms at 16 heads x 64,
// 59% of the issue slots; 1030 and 1054 TFLOPS at 32 and 64 heads x 128; 91 us for 64 requests of
// 65536 keys, 302 MB: 85% of the rate of a copy, and 8 us until the first tile is there.
#pragma once

#include "common/indexer_tile.cuh"

namespace dsa {

// -inf for those of keys [begin, end) that a token does not see, by all scorers.
template <class Shape>
__device__ void fill_unseen(const IndexerLogitsParams& p, const ScoreStorage<Shape>& s, float* out,
                            int first_token, int64_t begin, int64_t end) {
    for (int t = 0; t < Shape::kTokens && first_token + t < p.tokens; ++t, out += p.out_stride) {
        const int64_t unseen = max(int64_t{s.visible[t]}, begin);
        for (int64_t key = unseen + threadIdx.x; key < min(end, int64_t{p.width});
             key += kScoreThreads)
            out[key] = -INFINITY;
    }
}

template <class Shape>
__global__ void __launch_bounds__(kIndexerThreads, 1)
    indexer_logits_kernel(const __grid_constant__ CUtensorMap map, const IndexerLogitsParams p) {
    auto& s = aligned_storage<ScoreStorage<Shape>>();
    const int first_token = p.first_token + blockIdx.x / p.key_blocks * Shape::kTokens;
    const int key_block = blockIdx.x % p.key_blocks;
    const int first_tile = key_block * p.key_rounds * kWarpgroups;
    const int end_tile = first_tile + p.key_rounds * kWarpgroups;
    init_barriers(s);
    wait_for_kernels_before();
    find_keys(p, s, first_token);
    __syncthreads();

    uint32_t scored = 0;
#pragma unroll
    for (int t = 0; t < Shape::kTokens; ++t)
        if (s.visible[t] > max(first_tile * kTileKeys, p.unscored)) scored |= 1u << t;
    const auto tiles = [&](const TokenRun& run) {
        return TileRange{first_tile, min(end_tile, run.tiles())};
    };
    if (threadIdx.x >= kScoreThreads) {
        give_registers_back<kLoaderRegisters>();
        if (threadIdx.x < kScoreThreads + 32 * kWarpgroups) {
            KeyLoader<Shape> loader;
            while (scored != 0) {
                const TokenRun run = next_run(s, scored);
                scored &= ~run.tokens;
                loader.load(p, map, s, run, tiles(run));
            }
        }
    } else {
        take_registers<kScorerRegisters>();
        float* out = p.out + (first_token - p.first_token) * p.out_stride;
        if (p.visible == nullptr) {
            fill_unseen(p, s, out, first_token, int64_t{first_tile} * kTileKeys,
                        int64_t{end_tile} * kTileKeys);
        } else if (key_block == 0) {
            for (int t = threadIdx.x; t < Shape::kTokens && first_token + t < p.tokens;
                 t += kScoreThreads)
                p.visible[first_token - p.first_token + t] = s.visible[t];
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
                row[a] = out + token * p.out_stride;
            }
            scorer.score(p, s, run, tiles(run), [&](const auto& scores) {
#pragma unroll
                for (int a = 0; a < Shape::kLaneTokens; ++a)
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        if (scores.key + kRowStep * r < seen[a])
                            row[a][scores.key + kRowStep * r] = scores.score[a][r];
            });
        }
    }
}

}  // namespace dsa
