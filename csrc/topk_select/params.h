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
    int32_t front_pieces;  // streamed: of the list, each of the two fronts: room for topk
    int32_t stages;        // streamed: of the ring, in a first pass
};

}  // namespace dsa
