// The indexer's scores on the CPU: I[t,s] = k_scale[s] * sum_j w[t,j] ReLU(q[t,j] . k[s]), for
// blocks of consecutive tokens of one sequence.
//
// indexer_logits and indexer_topk both score here, so they see the same bits: a dot product adds
// its products in the order of d, the heads are added in the order of j, whatever the tile, the
// chunk or the thread. Keys are lanes: a tile of kTile keys is turned into floats [D, kTile] once
// and stays in L1 while the rows of the block pass over it; kHeads heads x kVectors vectors of
// partial sums stay in registers (AVX2: 12 of 16), so the inner loop is FMAs at 7 loads per 12.
// Each row's scores are handed over in chunks of kChunk keys: a thread's scratch is about 0.5 MB
// whatever L is.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/cpu.h"
#include "common/e4m3.h"
#include "common/paging.h"
#include "common/sequence_bounds.h"

namespace dsa::DSA_ISA {

// The index keys of one sequence: key(s) is its D codes, nullptr where there is none.
struct PackedKeys {
    const uint8_t* codes;
    const float* scales;
    int64_t stride;
    const uint8_t* key(int64_t s) const { return codes + s * stride; }
    float scale(int64_t s) const { return scales[s]; }
};

struct PagedKeys {
    const uint8_t* cache;
    const int32_t* pages;  // the sequence's row of the page table
    int64_t num_pages, dim;
    const uint8_t* page(int64_t s) const {
        const int64_t page = pages[s / kPageSize];
        if (page < 0 || page >= num_pages) return nullptr;
        return cache + page * kPageSize * (dim + 4);
    }
    const uint8_t* key(int64_t s) const {
        const uint8_t* p = page(s);
        return p ? p + s % kPageSize * dim : nullptr;
    }
    float scale(int64_t s) const {
        float x;
        std::memcpy(&x, page(s) + kPageSize * dim + s % kPageSize * 4, 4);
        return x;
    }
};

// keys_of(s) of a packed and of a paged batch. Offsets, lengths and pages are clamped, never
// trusted.
struct PackedSequences {
    PackedSequences(const Tensor& k, const Tensor& k_scale, const Tensor& cu_seqlens_k)
        : codes(data<uint8_t>(k)),
          scales(data<float>(k_scale)),
          cu(data<int32_t>(cu_seqlens_k)),
          stride(k.stride(0)),
          total(k.sizes()[0]) {}
    int64_t offset(int64_t s) const { return std::clamp<int64_t>(cu[s], 0, total); }
    int64_t num_keys(int64_t s) const { return offset(s + 1) - offset(s); }
    PackedKeys operator()(int64_t s) const {
        return {codes + offset(s) * stride, scales + offset(s), stride};
    }
    const uint8_t* codes;
    const float* scales;
    const int32_t* cu;
    int64_t stride, total;
};

struct PagedSequences {
    PagedSequences(const Tensor& index_cache, const Tensor& page_table, const Tensor& lengths)
        : cache(data<uint8_t>(index_cache)),
          table(data<int32_t>(page_table)),
          lengths(data<int32_t>(lengths)),
          table_stride(page_table.stride(0)),
          capacity(page_table.sizes()[1] * kPageSize),
          num_pages(index_cache.sizes()[0]),
          dim(index_cache.sizes()[1] / kPageSize - 4) {}
    int64_t num_keys(int64_t s) const { return std::clamp<int64_t>(lengths[s], 0, capacity); }
    PagedKeys operator()(int64_t s) const {
        return {cache, table + s * table_stride, num_pages, dim};
    }
    const uint8_t* cache;
    const int32_t *table, *lengths;
    int64_t table_stride, capacity, num_pages, dim;
};

// Tokens [begin, end) of one sequence; the token t sees the first visible(t) keys. A block of
// tokens without a sequence sees none.
struct RowBlock {
    int64_t sequence, begin, end, sequence_end, num_keys, width;
    int64_t visible(int64_t t) const {
        return std::clamp<int64_t>(num_keys - (sequence_end - t) + 1, 0,
                                   std::max<int64_t>(0, std::min(num_keys, width)));
    }
};

// Cuts [0, tokens) into blocks of at most kMaxRows tokens, none of which spans two sequences; fewer
// where that keeps every thread busy.
inline constexpr int64_t kMaxRows = 32;

template <typename Sequences>
std::vector<RowBlock> row_blocks(const Tensor& cu_seqlens_q, int64_t tokens, int64_t width,
                                 const Sequences& keys_of) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t rows = std::clamp<int64_t>(tokens / (4 * threads), 4, kMaxRows);
    const int64_t sequences = cu_seqlens_q.sizes()[0] - 1;
    const int32_t* cu = data<int32_t>(cu_seqlens_q);
    const auto bounds = sequence_bounds(cu_seqlens_q, tokens);
    std::vector<RowBlock> blocks;
    const auto cut = [&](int64_t s, int64_t begin, int64_t end, int64_t num_keys) {
        for (int64_t t = begin; t < end; t += rows)
            blocks.push_back({s, t, std::min(t + rows, end), end, num_keys, width});
    };
    cut(0, 0, bounds.front(), 0);
    for (int64_t s = 0; s < sequences; ++s) {
        const size_t first = blocks.size();
        cut(s, bounds[s], bounds[s + 1], keys_of.num_keys(s));
        for (size_t b = first; b < blocks.size(); ++b) blocks[b].sequence_end = cu[s + 1];
    }
    cut(0, bounds.back(), tokens, 0);
    return blocks;
}

// body(block, scratch of the thread) for every block, the last (longest) first, each thread taking
// the next one when it is free.
template <typename Scratch, typename Body>
void for_each_block(const std::vector<RowBlock>& blocks, const Body& body) {
    std::atomic<int64_t> left = static_cast<int64_t>(blocks.size());
    parallel_ranges(left, 1, [&](int64_t, int64_t) {
        Scratch scratch;
        for (int64_t i = left.fetch_sub(1) - 1; i >= 0; i = left.fetch_sub(1) - 1)
            body(blocks[i], scratch);
    });
}

class IndexerScorer {
  public:
    // Calls consume(t, base, scores, n) with the scores of the keys [base, base + n), in ascending
    // order of base, for each token of the block that sees more than min_visible keys.
    template <typename Keys, typename Consume>
    void score(const Tensor& q, const Tensor& weights, const Keys& keys, const RowBlock& block,
               int64_t min_visible, const Consume& consume) {
        int64_t first = block.begin;  // visible(t) grows with t
        while (first < block.end && block.visible(first) <= min_visible) ++first;
        const int64_t rows = block.end - first, heads = q.sizes()[1], dim = q.sizes()[2];
        if (rows == 0) return;
        const int64_t longest = block.visible(block.end - 1);
        q_.resize(rows * heads * dim);
        for (int64_t r = 0; r < rows; ++r) {
            const uint8_t* codes = data<uint8_t>(q) + (first + r) * q.stride(0);
            for (int64_t i = 0; i < heads * dim; i += kLanes)
                store(&q_[r * heads * dim + i], load_e4m3(codes + i));
        }
        tile_.resize(dim * kTile);
        scores_.resize(rows * kChunk);
        for (int64_t base = 0; base < longest; base += kChunk) {
            const int64_t stop = std::min(longest, base + kChunk);
            for (int64_t s = base; s < stop; s += kTile) {
                load_tile(keys, s, std::min(kTile, longest - s), dim);
                for (int64_t r = 0; r < rows; ++r)
                    if (block.visible(first + r) > s)
                        score_row(&q_[r * heads * dim],
                                  data<float>(weights) + (first + r) * weights.stride(0), heads,
                                  dim, &scores_[r * kChunk + s - base]);
            }
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t n = std::min(block.visible(first + r), stop) - base;
                if (n > 0) consume(first + r, base, &scores_[r * kChunk], n);
            }
        }
    }

  private:
    static constexpr int kVectors = 3;
    static constexpr int kHeads = kLanes == 16 ? 8 : 4;
    static constexpr int64_t kTile = kVectors * kLanes;
    static constexpr int64_t kChunk = 32 * 48;  // a multiple of kTile for 4, 8 and 16 lanes

    // 8 x 8 bytes: three rounds of swaps between words 4, 2, 1 apart.
    static void transpose(uint64_t (&x)[8]) {
        constexpr uint64_t kMask[] = {0x00000000ffffffffu, 0x0000ffff0000ffffu,
                                      0x00ff00ff00ff00ffu};
        for (int round = 0; round < 3; ++round) {
            const int apart = 4 >> round, shift = 32 >> round;
            for (int i = 0; i < 8; ++i) {
                if (i & apart) continue;
                const uint64_t swap = ((x[i] >> shift) ^ x[i + apart]) & kMask[round];
                x[i + apart] ^= swap;
                x[i] ^= swap << shift;
            }
        }
    }

    // tile_[d, j] = key s + j, scale_ and exists_ likewise; zeros past the first n.
    template <typename Keys>
    void load_tile(const Keys& keys, int64_t s, int64_t n, int64_t dim) {
        static constexpr uint8_t kZeros[256] = {};
        const uint8_t* source[kTile];
        for (int64_t j = 0; j < kTile; ++j) {
            const uint8_t* key = j < n ? keys.key(s + j) : nullptr;
            scale_[j] = key ? keys.scale(s + j) : 0.0f;
            exists_[j] = key ? -1 : 0;
            source[j] = key ? key : kZeros;
        }
        for (int64_t d = 0; d < dim; d += 8) {
            uint8_t codes[8 * kTile];
            for (int64_t j = 0; j < kTile; j += 8) {
                uint64_t x[8];
                const int64_t width = std::min<int64_t>(8, kTile - j);
                for (int64_t i = 0; i < 8; ++i)
                    std::memcpy(&x[i], (i < width ? source[j + i] : kZeros) + d, 8);
                transpose(x);
                for (int64_t i = 0; i < 8; ++i) std::memcpy(&codes[i * kTile + j], &x[i], width);
            }
            for (int64_t i = 0; i < 8 * kTile; i += kLanes)
                store(&tile_[d * kTile + i], load_e4m3(codes + i));
        }
    }

    // sum += w[j] ReLU(q[j] . k) for M heads.
    template <int M>
    void add_heads(const float* q, const float* w, int64_t dim, Vec (&sum)[kVectors]) const {
        Vec dot[M][kVectors] = {};
        const float* tile = tile_.data();
        for (int64_t d = 0; d < dim; ++d, tile += kTile) {
            Vec k[kVectors];
            for (int v = 0; v < kVectors; ++v) k[v] = load(tile + v * kLanes);
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < kVectors; ++v) dot[m][v] = q[m * dim + d] * k[v] + dot[m][v];
        }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < kVectors; ++v)
                sum[v] =
                    w[m] * vmax(Vec{}, dot[m][v]) + sum[v];  // vmax keeps the NaN of its second
    }

    void score_row(const float* q, const float* w, int64_t heads, int64_t dim, float* out) const {
        Vec sum[kVectors] = {};
        int64_t j = 0;
        for (; j + kHeads <= heads; j += kHeads) add_heads<kHeads>(q + j * dim, w + j, dim, sum);
        for (; j < heads; ++j) add_heads<1>(q + j * dim, w + j, dim, sum);
        const Vec nothing = splat(-kInf);
        for (int v = 0; v < kVectors; ++v) {
            VecI exists;
            std::memcpy(&exists, exists_ + v * kLanes, sizeof exists);
            const Vec score = sum[v] * load(scale_ + v * kLanes);
            store(out + v * kLanes, exists ? score : nothing);
        }
    }

    std::vector<float> q_, tile_, scores_;
    float scale_[kTile];
    int32_t exists_[kTile];
};

}  // namespace dsa::DSA_ISA
