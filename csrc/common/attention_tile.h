// The small matrix product that the attention kernels of the CPU are made of, its panels, and the
// online softmax between two of them.
//
// C[M, N] (+)= A[M, K] B[K, N] in float. A is read element by element with any two strides, so it
// may be a transposed view; B and C are rows of vectors: N a multiple of kLanes, M one of
// kTileRows. A register tile of 4 rows x 3 vectors (12 accumulators) takes 7 loads for 12 FMAs;
// where N is a single vector, 8 rows x 1.
#pragma once

#include "common/simd.h"

namespace dsa::DSA_ISA {

inline constexpr int kTileRows = 4;

struct View {  // a matrix of floats by strides
    const float* data;
    int64_t row, column;
};

template <int R, int V>
inline void gemm_register_tile(int64_t k, View a, const float* b, int64_t ldb, float* c,
                               int64_t ldc, bool accumulate) {
    Vec sum[R][V] = {};  // added to C at the end: sums of blocks round less than one long chain
    const float* column = a.data;
    for (int64_t i = 0; i < k; ++i, b += ldb, column += a.column) {
        Vec x[V];
        for (int v = 0; v < V; ++v) x[v] = load(b + v * kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec y = broadcast(column[r * a.row]);
            for (int v = 0; v < V; ++v) sum[r][v] = y * x[v] + sum[r][v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            float* to = c + r * ldc + v * kLanes;
            store(to, accumulate ? load(to) + sum[r][v] : sum[r][v]);
        }
}

template <int V>
inline void gemm_columns(int64_t m, int64_t k, View a, const float* b, int64_t ldb, float* c,
                         int64_t ldc, bool accumulate) {
    int64_t r = 0;
    if constexpr (V == 1) {
        for (; r + 8 <= m; r += 8)
            gemm_register_tile<8, V>(k, {a.data + r * a.row, a.row, a.column}, b, ldb, c + r * ldc,
                                     ldc, accumulate);
    }
    for (; r < m; r += kTileRows)
        gemm_register_tile<kTileRows, V>(k, {a.data + r * a.row, a.row, a.column}, b, ldb,
                                         c + r * ldc, ldc, accumulate);
}

inline void gemm_tile(int64_t m, int64_t n, int64_t k, View a, const float* b, int64_t ldb,
                      float* c, int64_t ldc, bool accumulate) {
    int64_t j = 0;
    for (; j + 3 * kLanes <= n; j += 3 * kLanes)
        gemm_columns<3>(m, k, a, b + j, ldb, c + j, ldc, accumulate);
    if (j + 2 * kLanes <= n) {
        gemm_columns<2>(m, k, a, b + j, ldb, c + j, ldc, accumulate);
    } else if (j < n) {
        gemm_columns<1>(m, k, a, b + j, ldb, c + j, ldc, accumulate);
    }
}

// One step of the online softmax of kLanes columns: the scores [count, n] become numerators, `out`
// [dim, n] what it is under the new maximum. All point at the first of the columns.
inline void online_softmax(float* scores, int64_t count, int64_t n, float* highest, float* total,
                           float* out, int64_t dim) {
    const Vec before = load(highest);
    Vec now = before, sum{};
    for (int64_t j = 0; j < count; ++j) now = vmax(now, load(scores + j * n));
    const Vec shift = now == splat(-kInf) ? Vec{} : now;
    for (int64_t j = 0; j < count; ++j) {
        const Vec p = exp_or_nan(load(scores + j * n) - shift);
        store(scores + j * n, p);
        sum = sum + p;
    }
    const Vec alpha = vexp(before - shift);
    store(highest, now);
    store(total, load(total) * alpha + sum);
    for (int64_t d = 0; d < dim; ++d) store(out + d * n, load(out + d * n) * alpha);
}

}  // namespace dsa::DSA_ISA
