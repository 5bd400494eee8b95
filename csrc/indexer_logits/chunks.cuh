// Tokens in chunks, each with as many as have room for their scores at a time.
//
// A matrix of scores has room for few tokens if one of many sequences is long, and most of it stays
// empty. So rows follow each other without gaps, and how many tokens are a chunk is known on the
// GPU alone: a kernel of one block counts the rounds of all blocks of tokens, as indexer_logits
// does, and deals them out in order. The host launches as many chunks as there may be; the last
// ones are empty.
#pragma once

#include "indexer_logits/launch.h"
#include "indexer_logits/sm90.cuh"

namespace dsa {

constexpr int kMostPlannedBlocks = 32768;  // of tokens
static_assert(16 * kMostTokenBlocks <= kMostChunkRows);
static_assert(kMostTokenBlocks == 2 * 32 * 32);  // how a chunk's last block is looked for

template <class Shape>
__global__ void __launch_bounds__(kIndexerThreads, 1) plan_chunks_kernel(const ChunkPlanParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    auto& rounds = *reinterpret_cast<RoundCounts<kMostPlannedBlocks>*>(shared);
    wait_for_kernels_before();
    const int total = count_rounds<Shape>(p, p.token_blocks, p.unscored, p.block_rounds, rounds);
    if (threadIdx.x >= 32) return;
    const int each = p.room - p.most_rounds, chunks = max((total + each - 1) / each, 1);
    const int room = min((total + chunks - 1) / chunks + p.most_rounds, p.room);
    const int lane = threadIdx.x;
    int block = 0;
    for (int chunk = 0; chunk < p.most_chunks; ++chunk) {
        if (lane == 0) p.chunks[chunk] = min(p.first_token + block * Shape::kTokens, p.tokens);
        const int end = rounds.before(block) + room;
        int next = block;
        for (const int step : {kMostTokenBlocks / 32, kMostTokenBlocks / 1024, 1}) {
            const int last = next + (lane + 1) * step - 1;
            const bool fits = last < p.token_blocks && rounds.up_to[last] <= end;
            next += step * __popc(__ballot_sync(~0u, fits));
        }
        block = max(next, min(block + 1, p.token_blocks));
    }
    if (lane == 0) p.chunks[p.most_chunks] = p.tokens;
}

}  // namespace dsa
