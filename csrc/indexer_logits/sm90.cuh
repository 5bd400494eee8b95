// indexer_logits on Hopper, the kernel: see common/indexer_tile.cuh for how a tile is scored.
//
// The work is a row of rounds, a tile of each ring for a block of tokens: 128 keys of 16 tokens (at
// 16 heads), or with few tokens 256 of 4; block of tokens after block of tokens, and of each the
// keys that its tokens see. Every block of threads counts them all and takes an equal share,
// wherever it begins: sequences of any length, long next to short, leave no SM idle. A run counts
// as three rounds more, for the loading of its queries, which nothing hides. It changes no bit.
//
// Scorers and loaders find their tokens for themselves and meet only at the tiles' mbarriers: the
// first keys of a block of tokens come while the last ones of another are scored. Scores go from
// registers to memory, 32 bytes at a time (8 keys of a token): 2048 x 131072 scores are 1.07 GB,
// 0.25 ms of writing under 0.4 ms of products and 0.5 of sums. The keys, 9 MB at 131072, come from
// L2. Of the loading warpgroup one or two warps load; the others tell what the tokens see. Measured
// on an H200: 0.68 ms at 16 heads x 64; 1244 and 1194 TFLOPS at 32 and 64 heads x 128; 92 us for 64
// requests of 65536 keys, 302 MB: 85% of the rate of a copy, and 8 us until the first tile is
// there.
#pragma once

#include "common/indexer_tile.cuh"
#include "common/warp.cuh"

namespace dsa {

constexpr int kMostTokenBlocks = 2048;  // of a launch
constexpr int kIndexerWarps = kIndexerThreads / 32;
constexpr int kStartRounds = 3;  // what the start of a run costs

// How much there is to do for the blocks of tokens, in the order of these.
struct RoundCounts {
    int up_to[kMostTokenBlocks];  // this block included
    int of_warp[kIndexerWarps];

    __device__ int before(int block) const { return block == 0 ? 0 : up_to[block - 1]; }
};

template <class Shape>
struct alignas(1024) LogitsStorage {
    ScoreStorage<Shape> score;
    RoundCounts rounds;
    int begin, end;  // of this block's share
};

// The rounds of a run.
template <class Shape>
__device__ __forceinline__ int rounds_of(int keys) {
    return (keys + Shape::kRoundKeys - 1) / Shape::kRoundKeys;
}

// Counts the rounds of the blocks of tokens, by all threads; returns all. A lane reads a sequence;
// if it is long, the lanes of the warp share its blocks of tokens.
template <class Shape>
__device__ int count_rounds(const IndexerLogitsParams& p, RoundCounts& rounds) {
    constexpr int kFewBlocks = 2;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const auto add = [&](const Sequence& sequence, int block) {
        const int next = p.first_token + (block + 1) * Shape::kTokens;
        const int last = min(min(next, p.tokens), sequence.end) - 1;
        const int keys = sequence.visible(last, p.width);  // the most
        shared_add(shared_address(rounds.up_to + block),
                   keys > p.unscored ? kStartRounds + rounds_of<Shape>(keys) : 0);
    };
    for (int i = threadIdx.x; i < p.token_blocks; i += kIndexerThreads) rounds.up_to[i] = 0;
    __syncthreads();
    const int first = p.first_token == 0 ? 0 : sequence_of(p, p.first_token);
    for (int number = first + threadIdx.x; __any_sync(~0u, number < p.num_sequences);
         number += kIndexerThreads) {
        Sequence own{};
        if (number < p.num_sequences) own = sequence_at<Shape::kPaged>(p, number);
        const int from = (max(own.begin, p.first_token) - p.first_token) / Shape::kTokens;
        const int to =
            (min(own.end, p.tokens) - p.first_token + Shape::kTokens - 1) / Shape::kTokens;
        const bool is_long = to - from > kFewBlocks;
        for (int block = from; !is_long && block < to; ++block) add(own, block);
        for (uint32_t rest = __ballot_sync(~0u, is_long); rest != 0; rest &= rest - 1) {
            const int source = __ffs(rest) - 1;
            const auto of_source = [&](int value) { return __shfl_sync(~0u, value, source); };
            const Sequence sequence{of_source(own.begin), of_source(own.end), 0,
                                    of_source(own.keys)};
            const int end = of_source(to);
            for (int block = of_source(from) + lane; block < end; block += 32) add(sequence, block);
        }
        if (__any_sync(~0u, own.begin >= p.tokens)) break;
    }
    __syncthreads();
    const int each = (p.token_blocks + kIndexerThreads - 1) / kIndexerThreads;
    const int begin = min(static_cast<int>(threadIdx.x) * each, p.token_blocks),
              end = min(begin + each, p.token_blocks);
    int sum = 0;
    for (int i = begin; i < end; ++i) sum += rounds.up_to[i];
    const int inclusive = sum_up_to(sum);
    if (lane == 31) rounds.of_warp[warp] = inclusive;
    __syncthreads();
    const int of_warp = lane < kIndexerWarps ? rounds.of_warp[lane] : 0;
    int before = __reduce_add_sync(~0u, lane < warp ? of_warp : 0) + inclusive - sum;
    for (int i = begin; i < end; ++i) rounds.up_to[i] = before += rounds.up_to[i];
    __syncthreads();
    return __reduce_add_sync(~0u, of_warp);
}

// An equal share of the rounds.
template <class Shape>
__device__ void take_share(const IndexerLogitsParams& p, LogitsStorage<Shape>& s) {
    const int64_t total = count_rounds<Shape>(p, s.rounds);
    if (threadIdx.x == 0) {
        s.begin = static_cast<int>(total * blockIdx.x / gridDim.x);
        s.end = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x);
    }
    __syncthreads();
}

// The block of tokens that holds the first round of the share.
template <class Shape>
__device__ int first_token_block(const LogitsStorage<Shape>& s, int token_blocks) {
    int low = 0;
    for (int high = token_blocks; low < high;) {
        const int middle = (low + high) / 2;
        if (s.rounds.up_to[middle] <= s.begin) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// The tiles of a run that belong to the share, if its rounds begin at number `first`.
template <class Shape>
__device__ TileRange tiles_of_share(const LogitsStorage<Shape>& s, const TokenRun& run, int first) {
    const int rounds = rounds_of<Shape>(run.keys);
    const int from = min(max(s.begin - first, 0), rounds);
    const int to = min(max(s.end - first, 0), rounds);
    return {from * Shape::kRings, min(to * Shape::kRings, run.tiles())};
}

// -inf into `count` places, by a warp; in between in vectors of four.
__device__ __forceinline__ void fill_unseen(float* out, int64_t count) {
    const int lane = threadIdx.x % 32;
    const int64_t to_boundary = (-reinterpret_cast<uintptr_t>(out) % 16) / sizeof(float);
    const int64_t head = min(to_boundary, count), vectors = (count - head) / 4;
    if (lane < head) out[lane] = -INFINITY;
    auto* four = reinterpret_cast<float4*>(out + head);
#pragma unroll 1
    for (int64_t i = lane; i < vectors; i += 32)
        four[i] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
    if (const int64_t i = head + 4 * vectors + lane; i < count) out[i] = -INFINITY;
}

// How many keys each token sees, a lane a token; or -inf for the keys that it does not see, a warp
// a token. By `warps` warps of each block.
template <class Shape>
__device__ void tell_visible(const IndexerLogitsParams& p, int warp, int warps) {
    const int lane = threadIdx.x % 32, rows = p.tokens - p.first_token;
    const auto visible = [&](int row) {
        const int token = p.first_token + row;
        return sequence_at<Shape::kPaged>(p, sequence_of(p, token)).visible(token, p.width);
    };
    int row = blockIdx.x * warps + warp, step = gridDim.x * warps;
    if (p.visible == nullptr) {
        for (; row < rows; row += step) {
            const int seen = visible(row);
            fill_unseen(p.out + row * p.out_stride + seen, p.width - seen);
        }
    } else {
        for (row = row * 32 + lane; row < rows; row += step * 32) p.visible[row] = visible(row);
    }
}

template <class Shape>
__global__ void __launch_bounds__(kIndexerThreads, 1)
    indexer_logits_kernel(const __grid_constant__ KeyMaps maps,
                          const __grid_constant__ IndexerLogitsParams p) {
    auto& s = aligned_storage<LogitsStorage<Shape>>();
    if (threadIdx.x == kScoreThreads) prefetch_tensor_map(maps.keys), look_up_page(p.out);
    init_storage(s.score);
    wait_for_kernels_before();
    take_share(p, s);

    // Calls work(run, tiles, block) for all runs of the share, by whole warps, each at its own
    // pace; start(block) before the first one of each block of tokens.
    LaneToken own;
    const auto for_each_run = [&](const auto& start, const auto& work) {
        for (int block = first_token_block(s, p.token_blocks);
             block < p.token_blocks && s.rounds.before(block) < s.end; ++block) {
            if (s.rounds.up_to[block] == s.rounds.before(block)) continue;
            const int first_token = p.first_token + block * Shape::kTokens;
            own.find<Shape>(p, first_token);
            uint32_t scored = __ballot_sync(~0u, own.visible > p.unscored);
            if (scored == 0) continue;
            start(block);
            for (int first = s.rounds.before(block); scored != 0;) {
                const TokenRun run(own, scored);
                scored &= ~run.tokens;
                first += kStartRounds;
                const TileRange tiles = tiles_of_share(s, run, first);
                first += rounds_of<Shape>(run.keys);
                if (tiles.first < tiles.last) work(run, tiles, block);
            }
        }
    };
    if (threadIdx.x >= kScoreThreads) {
        give_registers_back<kLoaderRegisters>();
        const int warp = threadIdx.x / 32 - kScoreThreads / 32;
        if (warp >= Shape::kRings)
            return tell_visible<Shape>(p, warp - Shape::kRings, 4 - Shape::kRings);
        KeyLoader<Shape> loader;
        for_each_run([](int) {}, [&](const TokenRun& run, TileRange tiles,
                                     int) { loader.load(p, maps, s.score, run, tiles); });
    } else {
        take_registers<kScorerRegisters>();
        Scorer<Shape> scorer;
        const auto meet = [] { named_barrier_sync(kSyncScorers, kScoreThreads); };
        const auto start = [&](int block) {
            const int first_token = p.first_token + block * Shape::kTokens;
            scorer.load_weights(p, first_token);
            load_queries(p, s.score, first_token, meet);  // the last ones are done with
            meet();
        };
        for_each_run(start, [&](const TokenRun& run, TileRange tiles, int block) {
            constexpr uint32_t kAll = (1u << Shape::kGroupTokens) - 1;
            if ((run.tokens >> scorer.token_base() & kAll) == 0) return scorer.skip(s.score, tiles);
            scorer.begin(maps, run);
            int seen[Shape::kLaneTokens];
            float* row[Shape::kLaneTokens];
#pragma unroll
            for (int a = 0; a < Shape::kLaneTokens; ++a) {
                const int token = scorer.token(a);
                const bool mine =
                    run.tokens >> token & 1 && scorer.quad % Shape::kLanesPerToken == 0;
                const int visible = __shfl_sync(~0u, own.visible, token);
                seen[a] = mine ? visible : 0;
                row[a] = p.out + (int64_t{block} * Shape::kTokens + token) * p.out_stride;
                keep_address(row[a]);
            }
            constexpr int kAtOnce = Shape::kFew ? 2 : kTilesAtOnce;
            scorer.template score<kAtOnce>(s.score, tiles, [&](const auto& scores) {
#pragma unroll
                for (int a = 0; a < Shape::kLaneTokens; ++a)
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        global_store(row[a] + scores.key + kRowStep * r, scores.score[a][r],
                                     scores.key + kRowStep * r < seen[a]);
            });
        });
    }
}

}  // namespace dsa
