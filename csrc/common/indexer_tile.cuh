// Index scores on Hopper's FP8 tensor cores: the part that indexer_logits and indexer_topk share.
//
// A block of threads owns kTokens tokens. Four warpgroups take turns at tiles of 64 keys, which one
// thread of a fifth loads by TMA into a ring a warpgroup. Keys are the rows of the product, the
// (token, head) pairs its columns, in such an order that the columns a lane holds are all heads of
// its own tokens: column 8 j + 2 c + e holds head 2 j + e of the tokens of lane c of a quad.
// Weights stay in registers, ReLU and the weighted sum over heads need no shuffle: two instructions
// a product. (With 64 heads two lanes share a token and add their halves: one shuffle.) While one
// warpgroup waits for its product the three others do their sums: nothing else hides the tensor
// cores' latency.
//
// 64 accumulators and 32 weights a thread: the loading warpgroup gives registers to the scorers,
// 112 each; one block an SM. At 16 heads x 64 a tile takes the tensor cores 128 cycles and the sums
// 4 x 170 issue slots on four schedulers: bound by the sums.
#pragma once

#include "common/ptx.cuh"
#include "indexer_logits/params.h"

namespace dsa {

constexpr int kKeys = 64;  // of a tile, and of a page
constexpr int kWarpgroups = 3;
constexpr int kScoreThreads = 128 * kWarpgroups;
constexpr int kIndexerThreads =
    kScoreThreads + 128;  // one more warpgroup, of which one thread loads
constexpr int kScorerRegisters = 160, kLoaderRegisters = 32;  // of 128 at the start
constexpr int kRoundKeys = kKeys * kWarpgroups;

constexpr int kSyncScorers = 1;  // numbers of named barriers; 0 is the whole block's
constexpr int kSyncWarpgroup = 2;

template <int kHeads_, int kDim_, bool kPaged_>
struct IndexerShape {
    static constexpr int kHeads = kHeads_;
    static constexpr int kDim = kDim_;
    static constexpr bool kPaged = kPaged_;
    static constexpr int kTokens = kHeads <= 16 ? 8 : 128 / kHeads;
    static constexpr int kColumns = kTokens * kHeads;
    static constexpr int kLaneTokens = kTokens >= 4 ? kTokens / 4 : 1;
    static constexpr int kLanesPerToken = kTokens >= 4 ? 1 : 4 / kTokens;
    static constexpr int kLaneHeads = kHeads / kLanesPerToken;
    static constexpr int kStages = kDim == 64 ? 3 : 2;
    static constexpr int kTileBytes = kKeys * kDim;

    // Of lane `quad` of a quad: its tokens are token(quad, 0) ..., its heads begin at
    // first_head(quad).
    static __device__ int token(int quad, int own) {
        return kTokens >= 4 ? quad * kLaneTokens + own : quad / kLanesPerToken;
    }
    static __device__ int first_head(int quad) { return quad % kLanesPerToken * kLaneHeads; }
};

// The part of shared memory that scoring needs; aligned to 1024 bytes for the swizzle.
template <class Shape>
struct alignas(1024) ScoreStorage {
    uint8_t keys[kWarpgroups][Shape::kStages][Shape::kTileBytes];
    uint8_t queries[Shape::kColumns * Shape::kDim];
    uint64_t full[kWarpgroups][Shape::kStages];
    uint64_t empty[kWarpgroups][Shape::kStages];
    int sequence[Shape::kTokens];   // of each token of the block,
    int visible[Shape::kTokens];    // the keys it sees,
    int first_key[Shape::kTokens];  // and where those of its sequence begin
};

// Sequence, first key and number of visible keys of each token of the block; 0 keys if it belongs
// to no sequence.
template <class Shape>
__device__ void find_keys(const IndexerScoreParams& p, ScoreStorage<Shape>& s, int first_token) {
    if (threadIdx.x >= Shape::kTokens) return;
    const int token = first_token + threadIdx.x;
    int low = 0, visible = 0, first = 0;
    if (token < p.tokens) {
        for (int high = p.num_sequences; high - low > 1;) {
            const int middle = (low + high) / 2;
            (p.cu_seqlens_q[middle] <= token ? low : high) = middle;
        }
        const int begin = p.cu_seqlens_q[low], end = p.cu_seqlens_q[low + 1];
        int64_t keys;
        if constexpr (Shape::kPaged) {
            keys = min(max(p.key_bounds[low], 0), p.width);
        } else {
            first = min(max(p.key_bounds[low], 0), p.num_keys);
            keys = min(max(p.key_bounds[low + 1], 0), p.num_keys) - first;
        }
        const int64_t seen = keys - (static_cast<int64_t>(end) - token) + 1;
        if (begin <= token && token < end)
            visible = static_cast<int>(max(min(min(seen, keys), int64_t{p.width}), int64_t{0}));
    }
    s.sequence[threadIdx.x] = low;
    s.visible[threadIdx.x] = visible;
    s.first_key[threadIdx.x] = first;
}

// The tokens of the block that share a sequence with the first pending one.
struct TokenRun {
    uint32_t tokens;  // a bit each
    int sequence;
    int first_key;
    int keys;  // the most that one of them sees
};

template <class Shape>
__device__ TokenRun next_run(const ScoreStorage<Shape>& s, uint32_t pending) {
    const int first = __ffs(pending) - 1;
    TokenRun run{0, s.sequence[first], s.first_key[first], 0};
#pragma unroll
    for (int t = 0; t < Shape::kTokens; ++t) {
        if (pending >> t & 1 && s.sequence[t] == run.sequence) {
            run.tokens |= 1u << t;
            run.keys = max(run.keys, s.visible[t]);
        }
    }
    return run;
}

// The queries of the block into shared memory, column by column; zeros for tokens past the end. By
// all scorers, who meet before the first product reads them.
template <class Shape>
__device__ void load_queries(const IndexerScoreParams& p, ScoreStorage<Shape>& s, int first_token) {
    constexpr int kPieces = Shape::kDim / 16;
    for (int i = threadIdx.x; i < Shape::kColumns * kPieces; i += kScoreThreads) {
        const int column = i / kPieces, piece = i % kPieces;
        const int quad = column / 2 % 4, own = column / 8 * 2 + column % 2;
        const int token = first_token + Shape::token(quad, own / Shape::kLaneHeads);
        const int head = Shape::first_head(quad) + own % Shape::kLaneHeads;
        uint4 value = {0, 0, 0, 0};
        if (token < p.tokens)
            value = *reinterpret_cast<const uint4*>(p.q + token * p.q_stride + head * Shape::kDim +
                                                    16 * piece);
        const int swizzled = piece ^ (Shape::kDim == 128 ? column % 8 : column / 2 % 4);
        *reinterpret_cast<uint4*>(s.queries + column * Shape::kDim + 16 * swizzled) = value;
    }
    fence_proxy_async();
}

template <class Shape>
__device__ void init_barriers(ScoreStorage<Shape>& s) {
    if (threadIdx.x == 0) {
        for (int g = 0; g < kWarpgroups; ++g)
            for (int stage = 0; stage < Shape::kStages; ++stage) {
                mbarrier_init(&s.full[g][stage], 1);
                mbarrier_init(&s.empty[g][stage], 4);  // one lane of each warp
            }
        fence_mbarrier_init();
    }
    __syncthreads();
}

// Where a warpgroup is in its ring, as its scorers and the loader count it alike.
template <int kStages>
struct RingPosition {
    int stage = 0;
    uint32_t parity = 0;

    __device__ void advance() {
        if (++stage == kStages) stage = 0, parity ^= 1;
    }
};

// The loader's side: tiles [first, last) of a run, tile i into the ring of warpgroup i % 4. By one
// thread.
template <class Shape>
struct KeyLoader {
    RingPosition<Shape::kStages> positions[kWarpgroups];

    __device__ void load(const IndexerScoreParams& p, const CUtensorMap& map,
                         ScoreStorage<Shape>& s, const TokenRun& run, int first, int last) {
        for (int round = first; round < last; round += kWarpgroups) {
#pragma unroll
            for (int g = 0; g < kWarpgroups; ++g) {
                if (round + g >= last) break;
                RingPosition<Shape::kStages>& at = positions[g];
                uint64_t* full = &s.full[g][at.stage];
                mbarrier_wait(&s.empty[g][at.stage], at.parity ^ 1);
                mbarrier_arrive_expect(full, Shape::kTileBytes);
                if constexpr (Shape::kPaged) {  // a page outside the cache is all zeros
                    const int page = p.page_table[run.sequence * p.table_stride + round + g];
                    tma_load(map, full, s.keys[g][at.stage], 0, 0, page);
                } else {
                    tma_load(map, full, s.keys[g][at.stage], 0,
                             run.first_key + (round + g) * kKeys);
                }
                at.advance();
            }
        }
    }
};

// A scorer's side. Each thread scores two keys, those of its rows, for each of its own tokens.
template <class Shape>
struct Scorer {
    static constexpr int kOwn = Shape::kLaneTokens;

    // Scores of a tile: of keys key[0] and key[1] for own token a in score[a].
    struct Scores {
        int key[2];
        float score[kOwn][2];
    };

    RingPosition<Shape::kStages> position;
    int group, lane, quad, row;
    float weights[kOwn * Shape::kLaneHeads];
    float next_scale[2];
    bool next_exists;

    __device__ Scorer()
        : group(threadIdx.x / 128),
          lane(threadIdx.x % 32),
          quad(threadIdx.x % 4),
          row(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4) {}

    __device__ void load_weights(const IndexerScoreParams& p, int first_token) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
            const int token = first_token + Shape::token(quad, a);
#pragma unroll
            for (int h = 0; h < Shape::kLaneHeads; ++h)
                weights[a * Shape::kLaneHeads + h] =
                    token < p.tokens
                        ? p.weights[token * p.weight_stride + Shape::first_head(quad) + h]
                        : 0.0f;
        }
    }

    // The scales of the keys of a tile, a tile ahead of their use.
    __device__ void load_scales(const IndexerScoreParams& p, const TokenRun& run, int tile) {
        const int key = tile * kKeys + row;
        next_exists = true;
        int64_t first = int64_t{run.first_key} + key;
        if constexpr (Shape::kPaged) {
            const int page =
                key < run.keys ? p.page_table[run.sequence * p.table_stride + tile] : -1;
            next_exists = 0 <= page && page < p.num_pages;
            constexpr int kPageFloats = kKeys * (Shape::kDim + 4) / 4;
            first = int64_t{page} * kPageFloats + kKeys * Shape::kDim / 4 + row;
        }
        next_scale[0] = next_exists && key < run.keys ? p.key_scale[first] : 0.0f;
        next_scale[1] = next_exists && key + 8 < run.keys ? p.key_scale[first + 8] : 0.0f;
    }

    // Tiles first, first + 4, ... below last, all of this warpgroup; load_scales(first) comes
    // before.
    template <class Consume>
    __device__ void score(const IndexerScoreParams& p, ScoreStorage<Shape>& s, const TokenRun& run,
                          int first, int last, Consume consume) {
        for (int tile = first; tile < last; tile += kWarpgroups) {
            float product[Shape::kColumns / 2];
            mbarrier_wait(&s.full[group][position.stage], position.parity);
            const uint32_t keys = shared_address(s.keys[group][position.stage]);
            const uint32_t queries = shared_address(s.queries);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < Shape::kDim; k += 32)
                wgmma_e4m3(product, matrix_descriptor(keys + k, Shape::kDim),
                           matrix_descriptor(queries + k, Shape::kDim), k > 0);
            wgmma_commit();
            const float scale[2] = {next_scale[0], next_scale[1]};
            const bool exists = next_exists;
            load_scales(p, run, tile + kWarpgroups);
            wgmma_wait<0>();
            wgmma_pin(product);
            if (lane == 0) mbarrier_arrive(&s.empty[group][position.stage]);
            position.advance();

            Scores scores;
            scores.key[0] = tile * kKeys + row;
            scores.key[1] = scores.key[0] + 8;
#pragma unroll
            for (int a = 0; a < kOwn; ++a) {
                float sum[2] = {0.0f, 0.0f};
#pragma unroll
                for (int h = 0; h < Shape::kLaneHeads; ++h) {
                    const int i = a * Shape::kLaneHeads + h;
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        sum[r] = fmaf(max_nan(product[i / 2 * 4 + 2 * r + i % 2], 0.0f), weights[i],
                                      sum[r]);
                }
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if constexpr (Shape::kLanesPerToken == 2)
                        sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
                    scores.score[a][r] = sum[r] * scale[r];
                    if (Shape::kPaged && !exists) scores.score[a][r] = -INFINITY;
                }
            }
            consume(scores);
        }
    }
};

}  // namespace dsa
