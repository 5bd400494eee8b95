// What crosses from the launch of topk_select to its kernel.
#pragma once

#include <cstdint>

namespace dsa {

struct TopkSelectParams {
    const void* scores;      // [rows, width], row stride `row_stride` elements
    const int32_t* starts;   // [rows] or null: first column of the row
    const int32_t* lengths;  // [rows] or null: columns of the row
    int32_t* indices;        // [rows, topk]
    int64_t row_stride;
    int32_t rows;
    int32_t width;
    int32_t topk;
    int32_t front;     // of the list: room for topk, a multiple of 4
    int32_t segment;   // candidates that a warp can append between two cuts, a multiple of 4
    int32_t capacity;  // front + a segment for each warp
};

}  // namespace dsa
