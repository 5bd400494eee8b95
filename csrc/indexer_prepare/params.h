// What crosses from the launch of indexer_prepare to its kernel.
#pragma once

#include <cstdint>

namespace dsa {

struct NormWeight {  // [Di], float or bfloat16
    const void* data;
    bool is_float;
};

struct IndexerPrepareParams {
    const void* q;     // [T, H, Di]; strides, here and below, in bytes
    const void* k;     // [T, Di]
    const void* gate;  // [T, H]
    NormWeight q_weight, k_weight, k_bias;
    const float* cos;  // [T, Di / 2]
    const float* sin;  // [T, Di / 2]
    uint8_t* q_codes;  // [T, H, Di]
    float* weights;    // [T, H]
    uint8_t* k_codes;  // [T, Di]
    float* k_scale;    // [T]
    uint8_t* cache;    // null, or pages of 64 * Di bytes and 64 scales, `page_stride` bytes apart
    const int64_t* slots;  // [T]
    int64_t cache_slots;
    int64_t page_stride;
    int64_t q_stride, q_head_stride, k_stride, gate_stride, cos_stride, sin_stride;
    uint32_t tokens;
    uint32_t heads;
    uint32_t queries;  // tokens * heads
    uint32_t block_queries;
    uint32_t query_blocks;  // of the grid; the rest are of keys
    uint32_t token_factor;  // query i is of token i * token_factor >> token_shift
    int32_t token_shift;
    float eps;
};

}  // namespace dsa
