// What crosses from the launch of topk_select to its kernels.
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
    int32_t words;  // of the bracket kernel: a bit a column
    // Of the streamed kernel:
    int32_t piece;         // candidates in a piece of the list
    int32_t front_pieces;  // in each of the two fronts: room for topk
    int32_t first_front;   // its number
    int32_t stages;        // of the ring in a first pass
};

}  // namespace dsa
