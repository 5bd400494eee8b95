// Index scores on Hopper's FP8 tensor cores: the part that indexer_logits and indexer_topk share.
//
// Two warpgroups score tiles of 128 keys, which warps of a third load by TMA, scales and all, into
// a ring. Keys are the rows of the product, the (token, head) pairs its columns, in such an order
// that the columns a lane holds are all heads of its own tokens: column 8 j + 2 c + e holds head
// 2 j + e of the tokens of lane c of a quad. Weights stay in registers, ReLU and the weighted sum
// over heads need no shuffle: two instructions a product. (With 64 heads two lanes share a token
// and add their halves: one shuffle.)
//
// A tile is two products of 64 keys with accumulators of their own: the tensor cores work on one
// while the sums of the other are made, from tile to tile for four tiles. (Not further: ptxas waits
// for all products at the end of a loop's body if their sums are read in the next.) 128
// accumulators and 32 weights a thread: the loading warpgroup gives registers to the scorers, 232
// each; one block an SM.
//
// Who scores what is the shape's `Division`. Where there are many tokens and nothing but scores,
// each warpgroup has tokens of its own and both take every tile: keys come from L2 half as often,
// whose rate bounds the products otherwise, with 17 KB for every 512 cycles of the tensor cores.
#pragma once

#include "common/indexer_tokens.cuh"
#include "common/ptx.cuh"
#include "common/ring.cuh"
#include "indexer_logits/params.h"

namespace dsa {

constexpr int kRowStep = 8;  // keys from one row of a thread's products to the other
constexpr int kWarpgroups = 2;
constexpr int kScorerRegisters = 232, kLoaderRegisters = 40;  // of 168 at the start
constexpr int kScoreThreads = 128 * kWarpgroups;
constexpr int kIndexerThreads = kScoreThreads + 128;  // and a warpgroup, a warp of it for a ring

// Scales of a tile as loaded: a load begins on 16 bytes, up to three floats early.
constexpr int kLoadedScales = kTileKeys + 4, kScaleStride = 160;
constexpr int kTilesAtOnce = 4;  // in one stream of products

constexpr int kSyncScorers = 1;  // number of the scorers' named barrier; 0 is the whole block's

enum class Division {
    kByKeys,       // both warpgroups have the same tokens and take turns at the tiles
    kByKeysAhead,  // the same, and the queries of the next block are loaded meanwhile
    kFewTokens,    // the same, for sequences with few queries: there is little to do for each key,
                   // so more of them are on their way
    kByTokens,     // each warpgroup has its own tokens and takes every tile
};

// What a block scores at a time. No division changes a bit: a lane owns the same heads in all.
template <int kHeads_, int kDim_, bool kPaged_, Division kDivision>
struct IndexerShape {
    static constexpr int kHeads = kHeads_;
    static constexpr int kDim = kDim_;
    static constexpr bool kPaged = kPaged_;
    static constexpr bool kFew = kDivision == Division::kFewTokens;
    static constexpr int kTokenGroups = kDivision == Division::kByTokens ? kWarpgroups : 1;
    static constexpr int kRings = kWarpgroups / kTokenGroups;  // warpgroups that take turns
    static constexpr int kQueryBuffers = kDivision == Division::kByKeysAhead ? 2 : 1;

    static constexpr int kGroupTokens = kHeads > 16 ? 128 / kHeads : kFew ? 4 : 8;
    static constexpr int kTokens = kGroupTokens * kTokenGroups;  // of the block
    static constexpr int kColumns = kGroupTokens * kHeads;
    static constexpr int kLaneTokens = kGroupTokens >= 4 ? kGroupTokens / 4 : 1;
    static constexpr int kLanesPerToken = kGroupTokens >= 4 ? 1 : 4 / kGroupTokens;
    static constexpr int kLaneHeads = kHeads / kLanesPerToken;
    static constexpr int kStages = kFew ? 512 / kDim : 6 / kRings;
    static constexpr int kRoundKeys = kTileKeys * kRings;

    static constexpr int kHalfBytes = kKeys * kDim;  // of a tile

    // Of lane `quad` of a quad: its tokens are token(quad, 0) ... of its warpgroup, its heads begin
    // at first_head(quad).
    static __device__ int token(int quad, int own) {
        return kGroupTokens >= 4 ? quad * kLaneTokens + own : quad / kLanesPerToken;
    }
    static __device__ int first_head(int quad) { return quad % kLanesPerToken * kLaneHeads; }
};

// The part of shared memory that scoring needs; aligned to 1024 bytes for the swizzle.
template <class Shape>
struct alignas(1024) ScoreStorage {
    uint8_t keys[Shape::kRings][Shape::kStages][2 * Shape::kHalfBytes];
    uint8_t queries[Shape::kTokenGroups * Shape::kQueryBuffers][Shape::kColumns * Shape::kDim];
    alignas(128) float scales[Shape::kRings][Shape::kStages][kScaleStride];
    bool exists[Shape::kRings][Shape::kStages][2];  // paged: whether the pages of a tile do
    uint64_t full[Shape::kRings][Shape::kStages];
    uint64_t empty[Shape::kRings][Shape::kStages];
};

// Where the keys come from.
struct KeyMaps {
    CUtensorMap keys;    // packed: [L, D]; paged: [pages, 64, D], e4m3
    CUtensorMap scales;  // packed: [L] from scale_offset on
    int scale_offset;

    // Where the scales of a sequence's first key lie.
    __device__ int first_scale(int first_key) const { return scale_offset + first_key; }
};

// The dynamic shared memory of the block from the first 1024-byte boundary on. (An offset, not a
// cast of the address: the compiler goes on to know that it is shared memory.)
template <class Storage>
__device__ Storage& aligned_storage() {
    extern __shared__ uint8_t dynamic[];
    return *reinterpret_cast<Storage*>(dynamic + (-shared_address(dynamic) & 1023));
}

// Piece i of the 16-byte pieces of a block's queries: whose it is, where it begins among that
// token's bytes, and where it belongs in shared memory, column by column.
template <class Shape>
struct QueryPiece {
    static constexpr int kOfColumn = Shape::kDim / 16;
    static constexpr int kAll = Shape::kColumns * Shape::kTokenGroups * kOfColumn;
    int token;  // of the block
    int source;
    int target;

    __device__ explicit QueryPiece(uint32_t i) {
        const int column = i / kOfColumn, piece = i % kOfColumn;
        const int quad = column / 2 % 4, own = column % Shape::kColumns / 8 * 2 + column % 2;
        token = column / Shape::kColumns * Shape::kGroupTokens +
                Shape::token(quad, own / Shape::kLaneHeads);
        source = (Shape::first_head(quad) + own % Shape::kLaneHeads) * Shape::kDim + 16 * piece;
        const int swizzled = piece ^ (Shape::kDim == 128 ? column % 8 : column / 2 % 4);
        target = column * Shape::kDim + 16 * swizzled;
    }
};

// The queries of the block into shared memory, column by column; zeros for tokens past the end. By
// all scorers, who meet before the first product reads them; when meet() returns, with the first of
// the loads on their way, what was there is no longer needed.
template <class Shape, class Meet>
__device__ void load_queries(const IndexerScoreParams& p, ScoreStorage<Shape>& s, int first_token,
                             const Meet& meet) {
    constexpr int kAll = QueryPiece<Shape>::kAll, kInFlight = 4;
#pragma unroll 1
    for (int round = 0; round < kAll; round += kInFlight * kScoreThreads) {
        uint32_t begin = round + threadIdx.x;
        keep_address(begin);  // what follows from it is not held from block to block
        uint4 values[kInFlight] = {};
        uint8_t* targets[kInFlight];
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {
            const uint32_t i = begin + n * kScoreThreads;
            const QueryPiece<Shape> piece(i);
            const int token = first_token + piece.token;
            if (i < kAll && token < p.tokens)
                values[n] =
                    *reinterpret_cast<const uint4*>(p.q + token * p.q_stride + piece.source);
            targets[n] = s.queries[0] + piece.target;
        }
        if (round == 0) meet();
#pragma unroll
        for (int n = 0; n < kInFlight; ++n)
            if (begin + n * kScoreThreads < kAll) *reinterpret_cast<uint4*>(targets[n]) = values[n];
    }
    fence_proxy_async();
}

template <class Shape>
__device__ void init_storage(ScoreStorage<Shape>& s) {
    constexpr int kReaders = 4 * Shape::kTokenGroups;  // warps, one lane of each
    if (threadIdx.x == 0) {
        for (int ring = 0; ring < Shape::kRings; ++ring)
            for (int stage = 0; stage < Shape::kStages; ++stage) {
                mbarrier_init(&s.full[ring][stage], 1);
                mbarrier_init(&s.empty[ring][stage], kReaders);
            }
        fence_mbarrier_init();
    }
    __syncthreads();
}

// Some of a run's keys: numbers [first, last) of tiles that lie `step` tiles apart. Ring r carries
// numbers first + r, first + r + kRings, ...
struct TileRange {
    int first;
    int last;
    int step = 1;

    // The first key of a tile.
    __device__ int key(int tile) const { return tile * step * kTileKeys; }
};

// Starts to load a tile of packed keys, from number `key` of the run on, into a stage that is
// empty.
template <class Shape>
__device__ __forceinline__ void load_packed(const KeyMaps& maps, ScoreStorage<Shape>& s, int ring,
                                            int stage, const TokenRun& run, int key) {
    uint64_t* full = &s.full[ring][stage];
    mbarrier_arrive_expect(full, 2 * Shape::kHalfBytes + 4 * kLoadedScales);
    tma_load(maps.keys, full, s.keys[ring][stage], 0, run.first_key + key);
    tma_load(maps.scales, full, s.scales[ring][stage],
             (maps.first_scale(run.first_key) & ~3) + key);
}

// Asks L2 for all packed keys, if they are few enough to stay there, by a warp of each block: the
// first tokens of all blocks want the same keys at the same time, and wait for memory one tile
// after the other.
template <class Shape>
__device__ __forceinline__ void prefetch_keys(const IndexerScoreParams& p, const KeyMaps& maps) {
    constexpr int kMostBytes = 16 << 20;
    if (p.num_keys > kMostBytes / Shape::kDim) return;
    const int step = gridDim.x * 32;
    for (int tile = threadIdx.x % 32 * gridDim.x + blockIdx.x; tile * kTileKeys < p.num_keys;
         tile += step)
        prefetch_into_l2(maps.keys, 0, tile * kTileKeys);
}

// The loader's side, a warp for each ring: the tiles of a run. The lanes read page numbers ahead.
template <class Shape>
struct KeyLoader {
    static constexpr int kWindow = 16 * Shape::kRings;  // tiles, of which this warp loads 32 pages
    const int ring = (threadIdx.x - kScoreThreads) / 32;
    const int lane = threadIdx.x % 32;
    RingPosition position;

    __device__ void load(const IndexerScoreParams& p, const KeyMaps& maps, ScoreStorage<Shape>& s,
                         const TokenRun& run, TileRange tiles) {
        int next = own_page(p, run, tiles, tiles.first);
        for (int window = tiles.first; window < tiles.last; window += kWindow) {
            const int page = next;
            next = own_page(p, run, tiles, window + kWindow);
            const int end = min(window + kWindow, tiles.last);
            for (int tile = window + ring; tile < end; tile += Shape::kRings) {
                int pages[2] = {};
                if constexpr (Shape::kPaged) {
                    const int own = 2 * (tile - window - ring) / Shape::kRings;
                    pages[0] = __shfl_sync(~0u, page, own);
                    pages[1] = __shfl_sync(~0u, page, own + 1);
                }
                if (lane == 0) load_tile(p, maps, s, run, tiles.key(tile), pages);
                position.advance(Shape::kStages);
            }
        }
    }

    // Lane l's of the window's pages: half l % 2 of this warp's tile l / 2.
    __device__ int own_page(const IndexerScoreParams& p, const TokenRun& run, TileRange tiles,
                            int window) {
        const int tile = window + lane / 2 * Shape::kRings + ring;
        const int key = tiles.key(tile) + lane % 2 * kKeys;
        if (!Shape::kPaged || tile >= tiles.last || key >= run.keys) return -1;
        return p.page_table[run.sequence * p.table_stride + key / kKeys];
    }

    __device__ void load_tile(const IndexerScoreParams& p, const KeyMaps& maps,
                              ScoreStorage<Shape>& s, const TokenRun& run, int key,
                              const int (&pages)[2]) {
        uint64_t* full = &s.full[ring][position.stage];
        uint8_t* keys = s.keys[ring][position.stage];
        float* scales = s.scales[ring][position.stage];
        constexpr int kScaleBytes = kKeys * 4;
        mbarrier_wait(&s.empty[ring][position.stage], position.parity ^ 1);
        if constexpr (!Shape::kPaged) return load_packed(maps, s, ring, position.stage, run, key);
        constexpr int kPageFloats = kKeys * (Shape::kDim + 4) / 4;
        const int halves = key + kKeys < run.keys ? 2 : 1;
        const bool exists[2] = {0 <= pages[0] && pages[0] < p.num_pages,
                                0 <= pages[1] && pages[1] < p.num_pages};
        s.exists[ring][position.stage][0] = exists[0];
        s.exists[ring][position.stage][1] = exists[1];
        const int there = exists[0] + (halves == 2 && exists[1]);
        mbarrier_arrive_expect(full, halves * Shape::kHalfBytes + there * kScaleBytes);
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // a page outside the cache is all zeros
            if (half == halves) break;
            tma_load(maps.keys, full, keys + half * Shape::kHalfBytes, 0, 0, pages[half],
                     Shape::kFew);
            if (exists[half])
                bulk_load(scales + half * kKeys,
                          p.key_scale + (pages[half] + int64_t{1}) * kPageFloats - kKeys,
                          kScaleBytes, full, Shape::kFew);
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
    struct Scores {
        int key;
        float score[kOwn][2];
    };
    // The scales of those keys, and whether their page exists.
    struct Scales {
        float scale[2];
        bool exists;
    };

    // Known to be the same for all lanes: what follows from it is computed once for them.
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int group = warp / 4;
    const int ring = Shape::kRings == 1 ? 0 : group;
    const int lane = threadIdx.x % 32;
    const int quad = threadIdx.x % 4;
    const int row = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    RingPosition position;
    int own_scale = row;  // place of the first own key's among those of a tile
    int buffer = 0;       // of the block's queries, if there are several
    float weights[kOwn * Shape::kLaneHeads];

    // What follows is about the keys of this run.
    __device__ void begin(const KeyMaps& maps, const TokenRun& run) {
        if constexpr (!Shape::kPaged) own_scale = row + maps.first_scale(run.first_key) % 4;
    }

    // In the block: this warpgroup's first token, and own token a.
    __device__ int token_base() const {
        return Shape::kTokenGroups == 1 ? 0 : group * Shape::kGroupTokens;
    }
    __device__ int token(int a) const { return token_base() + Shape::token(quad, a); }

    // Of weight_of(token of the block, head).
    template <class WeightOf>
    __device__ void set_weights(const WeightOf& weight_of) {
#pragma unroll
        for (int i = 0; i < kOwn * Shape::kLaneHeads; ++i)
            weights[i] = weight_of(token(i / Shape::kLaneHeads),
                                   Shape::first_head(quad) + i % Shape::kLaneHeads);
    }
    __device__ void load_weights(const IndexerScoreParams& p, int first_token) {
        set_weights([&](int token, int head) {
            const int t = first_token + token;
            return t < p.tokens ? p.weights[t * p.weight_stride + head] : 0.0f;
        });
    }

    // Calls consume(scores) for each product of each tile of this warpgroup's ring, kAtOnce tiles
    // at a time where there are so many.
    template <int kAtOnce, class Consume>
    __device__ void score(ScoreStorage<Shape>& s, TileRange tiles, const Consume& consume) {
        const int last = __shfl_sync(~0u, tiles.last, 0);
        int tile = __shfl_sync(~0u, tiles.first, 0) + ring;
        for (; tile + (kAtOnce - 1) * Shape::kRings < last; tile += kAtOnce * Shape::kRings)
            score_tiles<kAtOnce>(s, tiles, tile, consume);
        if constexpr (kAtOnce > 1)
            for (; tile < last; tile += Shape::kRings) score_tiles<1>(s, tiles, tile, consume);
    }

    // The same for kTiles tiles. The first product of each but the first is on its way while the
    // sums of the tile before are made.
    template <int kTiles, class Consume>
    __device__ __forceinline__ void score_tiles(ScoreStorage<Shape>& s, TileRange tiles, int tile,
                                                const Consume& consume) {
        Products first, second;
        const auto start = [&](Products& products, int product) {
            const uint64_t keys = matrix_descriptor(
                shared_address(s.keys[ring][position.stage]) + product * Shape::kHalfBytes,
                Shape::kDim);
            const int own = Shape::kQueryBuffers > 1 ? buffer : Shape::kTokenGroups > 1 ? group : 0;
            const uint64_t queries = matrix_descriptor(shared_address(s.queries[own]), Shape::kDim);
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < Shape::kDim; k += 32)
                wgmma_e4m3(products, keys + k / 16, queries + k / 16, k > 0);
            wgmma_commit();
        };
        const auto wait_for_tile = [&] {
            mbarrier_wait(&s.full[ring][position.stage], position.parity);
        };
        wait_for_tile();
        start(first, 0);
        start(second, 1);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
            const int key = tiles.key(tile + t * Shape::kRings) + row;
            const int stage = position.stage;
            const Scales first_scales = scales_of(s, stage, 0);
            wgmma_wait<1>();
            wgmma_pin(first);
            consume(sum(first, first_scales, key, 0));
            position.advance(Shape::kStages);
            if (t + 1 < kTiles) {
                wait_for_tile();
                start(first, 0);
                wgmma_wait<1>();
            } else {
                wgmma_wait<0>();
            }
            wgmma_pin(second);
            const Scales second_scales = scales_of(s, stage, 1);
            fence_proxy_async();  // they are read
            __syncwarp();
            if (lane == 0) mbarrier_arrive(&s.empty[ring][stage]);
            consume(sum(second, second_scales, key, 1));
            if (t + 1 < kTiles) start(second, 1);
        }
    }

    // Gives tiles back that this warpgroup has no tokens for.
    __device__ void skip(ScoreStorage<Shape>& s, TileRange tiles) {
        for (int tile = tiles.first + ring; tile < tiles.last; tile += Shape::kRings) {
            mbarrier_wait(&s.full[ring][position.stage], position.parity);
            if (lane == 0) mbarrier_arrive(&s.empty[ring][position.stage]);
            position.advance(Shape::kStages);
        }
    }

    __device__ Scales scales_of(const ScoreStorage<Shape>& s, int stage, int product) {
        const float* scale = s.scales[ring][stage] + own_scale + product * kKeys;
        return {{scale[0], scale[kRowStep]}, s.exists[ring][stage][product]};
    }

    // The weighted sums over heads of one of the products of a tile, whose first own key is `key`.
    __device__ Scores sum(const Products& products, const Scales& scales, int key, int product) {
        Scores result;
        result.key = key + product * kKeys;
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
            float sum[2] = {0.0f, 0.0f};
#pragma unroll
            for (int h = 0; h < Shape::kLaneHeads; ++h) {
                const int i = a * Shape::kLaneHeads + h;
                const float* x = &products[i / 2 * 4 + i % 2];
                sum[0] = fmaf(max_nan(x[0], 0.0f), weights[i], sum[0]);
                sum[1] = fmaf(max_nan(x[2], 0.0f), weights[i], sum[1]);
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if constexpr (Shape::kLanesPerToken == 2) sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
                result.score[a][r] = scales.scale[r] * sum[r];
                if (Shape::kPaged && !scales.exists) result.score[a][r] = -INFINITY;
            }
            wgmma_pin(result.score[a]);  // all sums side by side, not each where it is used
        }
        return result;
    }
};

}  // namespace dsa
