// What both kernels of topk_select start from: which columns a row has, and rows that hold at most
// topk.
#pragma once

#include <cstdint>

#include "topk_select/params.h"

namespace dsa {

template <typename T>
struct Row {
    const T* scores;  // the 16-byte boundary at or before the first column
    int begin;        // its columns are [begin, end), counted from there
    int end;
    int32_t* out;

    __device__ Row(const TopkSelectParams& p, int row) {
        const int start = p.starts ? min(max(p.starts[row], 0), p.width) : 0;
        const int most = p.width - start;
        const int length = p.lengths ? min(max(p.lengths[row], 0), most) : most;
        const T* first = static_cast<const T*>(p.scores) + row * p.row_stride + start;
        begin = reinterpret_cast<uintptr_t>(first) % 16 / sizeof(T);
        end = begin + length;
        scores = first - begin;
        out = p.indices + static_cast<int64_t>(row) * p.topk;
    }

    __device__ int length() const { return end - begin; }

    // All columns are the set if there are at most topk; by `threads` threads.
    __device__ bool take_all(int topk, int thread, int threads) const {
        if (length() > topk) return false;
#pragma unroll 1
        for (int i = thread; i < topk; i += threads) out[i] = i < length() ? i : -1;
        return true;
    }
};

}  // namespace dsa
