// What the forward and the backward of varlen_attention share on the CPU: sequences, their tiles,
// and the moves between packed tensors and float scratch.
//
// A "row" is one (token, head of the KV group) pair: the queries of a group share its keys, so a
// tile of `tokens` tokens has tokens * group rows.
#pragma once

#include "common/attention_tile.h"
#include "common/cpu.h"
#include "common/sequence_bounds.h"

namespace dsa::DSA_ISA {

inline constexpr int64_t kTileLanes = 96;  // columns of a tile: two panels of 3 vectors in AVX-512
inline constexpr int64_t kBlock = 64;      // rows of the blocks a tile meets

struct Tile {
    int64_t sequence, begin, count;  // begin: relative to the sequence
};

// Tiles of at most `size` tokens. Heavy and light ones (first and last of a causal sequence)
// alternate, since threads take equal contiguous shares.
inline std::vector<Tile> tiles_of(const std::vector<int64_t>& bounds, int64_t size) {
    std::vector<Tile> tiles, ordered;
    for (size_t s = 0; s + 1 < bounds.size(); ++s) {
        const int64_t length = bounds[s + 1] - bounds[s];
        for (int64_t begin = 0; begin < length; begin += size)
            tiles.push_back({int64_t(s), begin, std::min(size, length - begin)});
    }
    ordered.reserve(tiles.size());
    for (size_t i = 0, j = tiles.size(); i < j;) {
        ordered.push_back(tiles[i++]);
        if (i < j) ordered.push_back(tiles[--j]);
    }
    return ordered;
}

// Which keys a query sees: key j of its sequence is visible to token u where j <= u + offset.
struct Mask {
    bool causal;
    int64_t offset;  // Lk - Lq
    int64_t length;  // Lk

    int64_t keys_of(int64_t u) const {
        return causal ? std::clamp<int64_t>(u + offset + 1, 0, length) : length;
    }
    int64_t first_token_of(int64_t key) const {
        return causal ? std::max<int64_t>(key - offset, 0) : 0;
    }
};

// rows [tokens * group, D] of one KV group, in float; `padded` rows in all, the rest 0.
template <typename T>
inline void load_rows(const T* x, int64_t token_stride, int64_t tokens, int64_t group, int64_t dim,
                      int64_t padded, float* out) {
    for (int64_t t = 0; t < tokens; ++t)
        widen(x + t * token_stride, group * dim, out + t * group * dim);
    std::fill(out + tokens * group * dim, out + padded * dim, 0.0f);
}

// The same transposed, [D, padded], times scale.
template <typename T>
inline void load_columns(const T* x, int64_t token_stride, int64_t tokens, int64_t group,
                         int64_t dim, int64_t padded, float scale, float* out) {
    for (int64_t d = 0; d < dim; ++d)
        std::fill(out + d * padded + tokens * group, out + (d + 1) * padded, 0.0f);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < group; ++h) {
            const T* row = x + t * token_stride + h * dim;
            float* column = out + t * group + h;
            for (int64_t d = 0; d < dim; ++d) column[d * padded] = to_float(row[d]) * scale;
        }
}

// Stores the columns [D, padded] as rows, each times its factor.
template <typename T>
inline void store_columns(const float* columns, int64_t padded, const float* factor, int64_t tokens,
                          int64_t group, int64_t dim, T* out, int64_t token_stride) {
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t h = 0; h < group; ++h) {
            const int64_t c = t * group + h;
            T* row = out + t * token_stride + h * dim;
            for (int64_t d = 0; d < dim; ++d)
                from_float(columns[d * padded + c] * factor[c], row + d);
        }
}

// 0, 1, 2, ... in the lanes
inline VecI lane_numbers() {
    VecI v{};
    for (int i = 0; i < kLanes; ++i) v[i] = i;
    return v;
}

}  // namespace dsa::DSA_ISA
