// Index scores on Hopper's FP8 tensor cores: the part that indexer_logits and indexer_topk share.
//
// A block of threads owns kTokens tokens. Two warpgroups take turns at tiles of 128 keys, which two
// warps of a third load by TMA into a ring a warpgroup. Keys are the rows of the product, the
// (token, head) pairs its columns, in such an order that the columns a lane holds are all heads of
// its own tokens: column 8 j + 2 c + e holds head 2 j + e of the tokens of lane c of a quad.
// Weights stay in registers, ReLU and the weighted sum over heads need no shuffle: two instructions
// a product. (With 64 heads two lanes share a token and add their halves: one shuffle.)
//
// A tile is two products of 64 keys with accumulators of their own: the tensor cores work on one
// while the sums of the other are made. At 16 heads x 64 a product takes them 128 cycles and the
// sums about 180 issue slots on each of four schedulers: bound by the sums. ReLU is a maximum for
// one row of a thread and x + |x|, with the half in the scale, for the other: a maximum issues at
// half rate, and so the two pipes share the work. 128 accumulators and 32 weights a thread: the
// loading warpgroup gives registers to the scorers, 232 each; one block an SM.
#pragma once

#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "indexer_logits/params.h"

namespace dsa {

constexpr int kKeys = 64;  // of a product, and of a page
constexpr int kTileKeys = 2 * kKeys;
constexpr int kRowStep = 8;  // keys from one row of a thread's products to the other
constexpr int kWarpgroups = 2;
constexpr int kScorerRegisters = 232, kLoaderRegisters = 40;  // of 168 at the start
constexpr int kScoreThreads = 128 * kWarpgroups;
constexpr int kIndexerThreads = kScoreThreads + 128;  // one more warpgroup, of which two warps load
constexpr int kRoundKeys = kTileKeys * kWarpgroups;

constexpr int kSyncScorers = 1;  // number of the scorers' named barrier; 0 is the whole block's

// kFew: for sequences with few queries, whose other columns do nothing. There is little to do for
// each key, so more of them are on their way. It changes no bit: a lane owns the same heads.
template <int kHeads_, int kDim_, bool kPaged_, bool kFew>
struct IndexerShape {
    static constexpr int kHeads = kHeads_;
    static constexpr int kDim = kDim_;
    static constexpr bool kPaged = kPaged_;
    static constexpr int kTokens = kHeads > 16 ? 128 / kHeads : kFew ? 4 : 8;
    static constexpr int kColumns = kTokens * kHeads;
    static constexpr int kLaneTokens = kTokens >= 4 ? kTokens / 4 : 1;
    static constexpr int kLanesPerToken = kTokens >= 4 ? 1 : 4 / kTokens;
    static constexpr int kLaneHeads = kHeads / kLanesPerToken;
    static constexpr int kStages = kFew ? 512 / kDim : 3;

    static constexpr int kHalfBytes = kKeys * kDim;  // of a tile

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
    uint8_t keys[kWarpgroups][Shape::kStages][2 * Shape::kHalfBytes];
    uint8_t queries[Shape::kColumns * Shape::kDim];
    // Paged: of each key of a tile, and whether their pages exist.
    alignas(16) float scales[kWarpgroups][Shape::kStages][kTileKeys];
    bool exists[kWarpgroups][Shape::kStages][2];
    uint64_t full[kWarpgroups][Shape::kStages];
    uint64_t empty[kWarpgroups][Shape::kStages];
    int sequence[Shape::kTokens];   // of each token of the block,
    int visible[Shape::kTokens];    // the keys it sees,
    int first_key[Shape::kTokens];  // and where those of its sequence begin
};

// The dynamic shared memory of the block from the first 1024-byte boundary on. (An offset, not a
// cast of the address: the compiler goes on to know that it is shared memory.)
template <class Storage>
__device__ Storage& aligned_storage() {
    extern __shared__ uint8_t dynamic[];
    return *reinterpret_cast<Storage*>(dynamic + (-shared_address(dynamic) & 1023));
}

// The last sequence that begins at or before a token, by a warp: 32 places at a time.
__device__ __forceinline__ int sequence_of(const IndexerScoreParams& p, int token) {
    const int lane = threadIdx.x % 32;
    int low = 0;
    for (int high = p.num_sequences; high - low > 1;) {
        const int step = (high - low + 31) / 32, probe = low + (lane + 1) * step;
        const bool begins = probe < high && p.cu_seqlens_q[probe] <= token;
        low += __popc(__ballot_sync(~0u, begins)) * step;
        high = min(high, low + step);
    }
    return low;
}

// A sequence: its tokens, where its keys begin, and how many there are.
struct Sequence {
    int begin;
    int end;
    int first_key;
    int keys;

    // How many keys a token sees: all up to its own, the last token's key being the last; 0 if it
    // lies outside.
    __device__ int visible(int token, int width) const {
        if (token < begin || end <= token) return 0;
        const int64_t seen = keys - (static_cast<int64_t>(end) - token) + 1;
        return static_cast<int>(max(min(min(seen, int64_t{keys}), int64_t{width}), int64_t{0}));
    }
};

template <bool kPaged>
__device__ __forceinline__ Sequence sequence_at(const IndexerScoreParams& p, int number) {
    if (p.num_sequences == 0) return {0, 0, 0, 0};
    Sequence sequence{p.cu_seqlens_q[number], p.cu_seqlens_q[number + 1], 0, 0};
    if constexpr (kPaged) {
        sequence.keys = min(max(p.key_bounds[number], 0), p.width);
    } else {
        sequence.first_key = min(max(p.key_bounds[number], 0), p.num_keys);
        sequence.keys = min(max(p.key_bounds[number + 1], 0), p.num_keys) - sequence.first_key;
    }
    return sequence;
}

// Sequence, first key and number of visible keys of each token of the block, by one warp each. The
// last tokens' sequence is tried first.
template <class Shape>
__device__ void find_keys(const IndexerScoreParams& p, ScoreStorage<Shape>& s, int first_token) {
    const int own = threadIdx.x / 32, token = first_token + own;
    if (own >= Shape::kTokens) return;
    int number = s.sequence[own];
    Sequence sequence = sequence_at<Shape::kPaged>(p, number);
    if (token < p.tokens && (token < sequence.begin || sequence.end <= token)) {
        number = sequence_of(p, token);
        sequence = sequence_at<Shape::kPaged>(p, number);
    }
    s.sequence[own] = number;
    s.visible[own] = token < p.tokens ? sequence.visible(token, p.width) : 0;
    s.first_key[own] = sequence.first_key;
}

// The tokens of the block that share a sequence with the first pending one.
struct TokenRun {
    uint32_t tokens;  // a bit each
    int sequence;
    int first_key;
    int keys;  // the most that one of them sees

    __device__ int tiles() const { return (keys + kTileKeys - 1) / kTileKeys; }
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
    constexpr int kPieces = Shape::kDim / 16, kAll = Shape::kColumns * kPieces;
    constexpr int kEach = (kAll + kScoreThreads - 1) / kScoreThreads;
    uint4 values[kEach] = {};
    uint8_t* targets[kEach];
#pragma unroll
    for (int n = 0; n < kEach; ++n) {
        const int i = threadIdx.x + n * kScoreThreads, column = i / kPieces, piece = i % kPieces;
        const int quad = column / 2 % 4, own = column / 8 * 2 + column % 2;
        const int token = first_token + Shape::token(quad, own / Shape::kLaneHeads);
        const int head = Shape::first_head(quad) + own % Shape::kLaneHeads;
        if (i < kAll && token < p.tokens)
            values[n] = *reinterpret_cast<const uint4*>(p.q + token * p.q_stride +
                                                        head * Shape::kDim + 16 * piece);
        const int swizzled = piece ^ (Shape::kDim == 128 ? column % 8 : column / 2 % 4);
        targets[n] = s.queries + column * Shape::kDim + 16 * swizzled;
    }
#pragma unroll
    for (int n = 0; n < kEach; ++n)
        if (threadIdx.x + n * kScoreThreads < kAll)
            *reinterpret_cast<uint4*>(targets[n]) = values[n];
    fence_proxy_async();
}

template <class Shape>
__device__ void init_storage(ScoreStorage<Shape>& s) {
    if (threadIdx.x < Shape::kTokens) s.sequence[threadIdx.x] = 0;
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

// Some of a run's keys: numbers [first, last) of tiles that lie `step` tiles apart, counted from
// number `turn` on if first is 0. Warpgroup g takes numbers first + g, first + g + kWarpgroups, ...
struct TileRange {
    int first;
    int last;
    int step = 1;
    int turn = 0;

    // The first key of a tile.
    __device__ int key(int tile) const {
        const int turned = tile + turn;
        return (turned < last ? turned : turned - last) * step * kTileKeys;
    }
};

// The loader's side, a warp for each warpgroup: the tiles of a run into its ring. The lanes read
// page numbers ahead.
template <class Shape>
struct KeyLoader {
    static constexpr int kWindow = 16 * kWarpgroups;  // tiles, of which this warp loads 32 pages
    const int group = (threadIdx.x - kScoreThreads) / 32;
    const int lane = threadIdx.x % 32;
    RingPosition position;

    __device__ void load(const IndexerScoreParams& p, const CUtensorMap& map,
                         ScoreStorage<Shape>& s, const TokenRun& run, TileRange tiles) {
        int next = own_page(p, run, tiles, tiles.first);
        for (int window = tiles.first; window < tiles.last; window += kWindow) {
            const int page = next;
            next = own_page(p, run, tiles, window + kWindow);
            const int end = min(window + kWindow, tiles.last);
            for (int tile = window + group; tile < end; tile += kWarpgroups) {
                int pages[2] = {};
                if constexpr (Shape::kPaged) {
                    pages[0] = __shfl_sync(~0u, page, tile - window - group);
                    pages[1] = __shfl_sync(~0u, page, tile - window - group + 1);
                }
                if (lane == 0) load_tile(p, map, s, run, tiles.key(tile), pages);
                position.advance(Shape::kStages);
            }
        }
    }

    // Lane l's of the window's pages: half l % 2 of this warp's tile l / 2.
    __device__ int own_page(const IndexerScoreParams& p, const TokenRun& run, TileRange tiles,
                            int window) {
        const int tile = window + lane / 2 * kWarpgroups + group;
        const int key = tiles.key(tile) + lane % 2 * kKeys;
        if (!Shape::kPaged || tile >= tiles.last || key >= run.keys) return -1;
        return p.page_table[run.sequence * p.table_stride + key / kKeys];
    }

    __device__ void load_tile(const IndexerScoreParams& p, const CUtensorMap& map,
                              ScoreStorage<Shape>& s, const TokenRun& run, int key,
                              const int (&pages)[2]) {
        uint64_t* full = &s.full[group][position.stage];
        uint8_t* keys = s.keys[group][position.stage];
        mbarrier_wait(&s.empty[group][position.stage], position.parity ^ 1);
        if constexpr (!Shape::kPaged) {
            mbarrier_arrive_expect(full, 2 * Shape::kHalfBytes);
            tma_load(map, full, keys, 0, run.first_key + key);
            return;
        }
        constexpr int kPageFloats = kKeys * (Shape::kDim + 4) / 4, kScaleBytes = kKeys * 4;
        const int halves = key + kKeys < run.keys ? 2 : 1;
        const bool exists[2] = {0 <= pages[0] && pages[0] < p.num_pages,
                                0 <= pages[1] && pages[1] < p.num_pages};
        s.exists[group][position.stage][0] = exists[0];
        s.exists[group][position.stage][1] = exists[1];
        const int scales = exists[0] + (halves == 2 && exists[1]);
        mbarrier_arrive_expect(full, halves * Shape::kHalfBytes + scales * kScaleBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // a page outside the cache is all zeros
            if (half == halves) break;
            tma_load(map, full, keys + half * Shape::kHalfBytes, 0, 0, pages[half]);
            if (exists[half])
                bulk_load(s.scales[group][position.stage] + half * kKeys,
                          p.key_scale + (pages[half] + int64_t{1}) * kPageFloats - kKeys,
                          kScaleBytes, full);
        }
    }
};

// A scorer's side. Each thread scores four keys of a tile, two of each product, for each of its own
// tokens.
template <class Shape>
struct Scorer {
    static constexpr int kOwn = Shape::kLaneTokens;
    using Products = float[Shape::kColumns / 2];

    // Of one product: the scores of keys `key` and `key` + kRowStep for own token a in score[a].
    // Its last key lies before `end`.
    struct Scores {
        int key;
        int end;
        float score[kOwn][2];
    };
    // The scales of those keys, and whether their page exists.
    struct Scales {
        float scale[2];
        bool exists;
    };

    RingPosition position;
    int group, lane, quad, row;
    float weights[kOwn * Shape::kLaneHeads];

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

    // Calls consume(scores) for each product of each tile of this warpgroup.
    template <class Consume>
    __device__ void score(const IndexerScoreParams& p, ScoreStorage<Shape>& s, const TokenRun& run,
                          TileRange tiles, const Consume& consume) {
        Products first, second;
        int key = tiles.key(tiles.first + group) + row;
        Scales ahead[2] = {packed_scales(p, run, key), packed_scales(p, run, key + kKeys)};
        const auto start = [&](Products& products, int product) {
            const uint32_t keys =
                shared_address(s.keys[group][position.stage]) + product * Shape::kHalfBytes;
            const uint32_t queries = shared_address(s.queries);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < Shape::kDim; k += 32)
                wgmma_e4m3(products, matrix_descriptor(keys + k, Shape::kDim),
                           matrix_descriptor(queries + k, Shape::kDim), k > 0);
            wgmma_commit();
        };
        for (int tile = tiles.first + group; tile < tiles.last; tile += kWarpgroups) {
            mbarrier_wait(&s.full[group][position.stage], position.parity);
            start(first, 0);
            start(second, 1);
            const int next = tiles.key(tile + kWarpgroups) + row;
            Scales now[2] = {ahead[0], ahead[1]};
            if constexpr (Shape::kPaged) {
                now[0] = paged_scales(s, 0);
                now[1] = paged_scales(s, 1);
            } else {
                ahead[0] = packed_scales(p, run, next);
                ahead[1] = packed_scales(p, run, next + kKeys);
            }
            wgmma_wait<1>();
            wgmma_pin(first);
            consume(sum(first, now[0], key, 0));
            wgmma_wait<0>();
            wgmma_pin(second);
            release(s);
            consume(sum(second, now[1], key, 1));
            key = next;
        }
    }

    // Gives the tile back to the loader: the products are done, the scales are read.
    __device__ void release(ScoreStorage<Shape>& s) {
        if constexpr (Shape::kPaged) {
            fence_proxy_async();
            __syncwarp();
        }
        if (lane == 0) mbarrier_arrive(&s.empty[group][position.stage]);
        position.advance(Shape::kStages);
    }

    __device__ Scales packed_scales(const IndexerScoreParams& p, const TokenRun& run, int key) {
        const float* scale = p.key_scale + run.first_key + key;
        return {{!Shape::kPaged && key < run.keys ? scale[0] : 0.0f,
                 !Shape::kPaged && key + kRowStep < run.keys ? scale[kRowStep] : 0.0f},
                true};
    }

    __device__ Scales paged_scales(const ScoreStorage<Shape>& s, int product) {
        const int key = row + product * kKeys;
        const float* scale = s.scales[group][position.stage] + key;
        return {{scale[0], scale[kRowStep]}, s.exists[group][position.stage][product]};
    }

    // The weighted sums over heads of one of the products of a tile, whose first own key is `key`.
    __device__ Scores sum(const Products& products, const Scales& scales, int key, int product) {
        Scores result;
        result.key = key + product * kKeys;
        result.end = key - row + (product + 1) * kKeys;
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
            float sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int h = 0; h < Shape::kLaneHeads; ++h) {
                const int i = a * Shape::kLaneHeads + h;
                const float* x = &products[i / 2 * 4 + i % 2];
                sum[0] = fmaf(max_nan(x[0], 0.0f), weights[i], sum[0]);
                sum[1] = fmaf(x[2] + fabsf(x[2]), weights[i], sum[1]);
            }
            result.score[a][0] = scales.scale[0];
            result.score[a][1] = 0.5f * scales.scale[1];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if constexpr (Shape::kLanesPerToken == 2) sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
                result.score[a][r] *= sum[r];
                if (Shape::kPaged && !scales.exists) result.score[a][r] = -INFINITY;
            }
        }
        return result;
    }
};

}  // namespace dsa
