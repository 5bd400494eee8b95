// What crosses from the launches of the indexer's scores to their kernels.
#pragma once

#include <cstdint>

namespace dsa {

struct IndexerScoreParams {
    const uint8_t* q;             // [T, H, D] e4m3, token stride `q_stride` bytes
    const float* weights;         // [T, H], row stride `weight_stride`
    const float* key_scale;       // packed: [L]; paged: the cache seen as floats
    const int32_t* cu_seqlens_q;  // [S + 1]
    const int32_t* key_bounds;    // packed: cu_seqlens_k [S + 1]; paged: lengths [S]
    const int32_t* page_table;    // paged: [S, P], row stride `table_stride`
    int64_t q_stride;
    int64_t weight_stride;
    int64_t table_stride;
    int32_t first_token;  // tokens [first_token, tokens) are scored
    int32_t tokens;
    int32_t num_sequences;
    int32_t num_keys;   // packed: L
    int32_t num_pages;  // paged: of the cache
    int32_t width;      // keys beyond it are not visible
};

struct IndexerLogitsParams : IndexerScoreParams {
    float* out;  // [tokens, width], row stride `out_stride`, from first_token on
    int64_t out_stride;
    int32_t* visible;      // null: -inf behind the last visible key; or [tokens]: their number, for
    int32_t unscored;      // which rows of at most so many are left out
    int32_t token_blocks;  // of the launch
};

}  // namespace dsa
