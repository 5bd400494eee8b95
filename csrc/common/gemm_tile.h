// Register-tiled GEMM on the CPU for ragged groups of rows: what grouped_gemm and moe_mlp share.
//
// A `GemmTile` computes one tile C [m <= kTileRows, n <= kTileCols] in fp32 on one thread, in three
// forms:
//   nt   A [m, k], B [n, k]: k is contiguous in both. kDotRows x kDotCols accumulators, vectors
//        along k; nothing is transposed. Few rows read a plain B straight from memory, so decoding
//        streams the bf16 weights once.
//   nn   A [m, k], B [k, n]: kOuterRows x 2 vectors of accumulators, A broadcast.
//   tn   A [k, m], B [k, n]: the same micro-kernel with A's strides exchanged (weight gradients).
// Operands are widened to fp32 panels in L2 (A, 192 KB) and L1/L2 (B) as they are needed; a row of
// an operand is any pointer, so gathers cost nothing. With AVX512-BF16 the nt form of two bf16
// operands widens nothing: A is copied to a panel, B read where it is.
//
// Every element is summed in blocks of a fixed depth, in order, whatever m, n and the number of
// threads are: the same row gives the same bits in any batch.
#pragma once

#include <atomic>
#include <memory>
#include <type_traits>

#include "common/bf16_dot.h"
#include "common/cpu.h"
#include "common/sequence_bounds.h"
#include "common/simd.h"

namespace dsa::DSA_ISA {

inline constexpr int64_t kTileRows = 96, kTileCols = 64;
inline constexpr int64_t kDotDepth = 512, kOuterDepth = 256;
inline constexpr int64_t kBf16Depth = 2 * kDotDepth;  // the same panel
// 3 x 4 (12 + 3 + 1 of 16 registers) and 6 x 16, or twice the rows with 32 registers.
inline constexpr int kDotRows = kLanes == 16 ? 6 : 3, kDotCols = 4;
inline constexpr int kOuterRows = kLanes == 16 ? 12 : 6, kOuterCols = 2 * kLanes;

// An operand is rows of contiguous elements: load(row, first, n, dst) widens n of them and fills up
// with zeros to a multiple of kLanes. `Plain` ones, bf16 or fp32 in memory, also give the address
// of a row: at(row), null for a row of zeros.
template <typename T, typename At>
struct Plain {
    using Element = T;
    At at;
    void load(int64_t row, int64_t first, int64_t n, float* dst) const {
        const T* p = at(row);
        if (p != nullptr) widen(p + first, n, dst);
        std::fill(dst + (p == nullptr ? 0 : n), dst + round_up(n, kLanes), 0.0f);
    }
};
template <typename T, typename At>
Plain<T, At> plain(const At& at) {
    return {at};
}

template <typename Operand>
concept HasAddress = requires(const Operand& b) { b.at(0); };

// out[r][c] += sum over k of a[r][k] * b[c][k]; k a multiple of kLanes.
template <int R, int C, typename B>
inline void dot_tile(const float* a, int64_t lda, const B* const* b, int64_t k, float* out,
                     int64_t ldo) {
    Vec sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = Vec{};
    for (int64_t i = 0; i < k; i += kLanes) {
        Vec x[R];
        for (int r = 0; r < R; ++r) x[r] = load(a + r * lda + i);
        for (int c = 0; c < C; ++c) {
            const Vec y = load(b[c] + i);
            for (int r = 0; r < R; ++r) sum[r][c] = x[r] * y + sum[r][c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out[r * ldo + c] += reduce_add(sum[r][c]);
}

// out[r][0, kOuterCols) += sum over k of a[r * row + k * step] * b[k][0, kOuterCols).
template <int R>
inline void outer_tile(const float* a, int64_t row, int64_t step, const float* b, int64_t k,
                       float* out, int64_t ldo) {
    Vec sum[R][2];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) sum[r][v] = load(out + r * ldo + v * kLanes);
    for (int64_t i = 0; i < k; ++i) {
        const Vec y0 = load(b + i * kOuterCols), y1 = load(b + i * kOuterCols + kLanes);
        for (int r = 0; r < R; ++r) {
            const Vec x = splat(a[r * row + i * step]);
            sum[r][0] = x * y0 + sum[r][0];
            sum[r][1] = x * y1 + sum[r][1];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < 2; ++v) store(out + r * ldo + v * kLanes, sum[r][v]);
}

// f.template operator()<R>() with R = rows, 1 <= rows <= Max.
template <int Max, typename F>
inline void with_rows(int64_t rows, const F& f) {
    if constexpr (Max > 1) {
        if (rows < Max) return with_rows<Max - 1>(rows, f);
    }
    f.template operator()<Max>();
}

class GemmTile {
  public:
    GemmTile()
        : a_(new float[kTileRows * kDotDepth]),
          b_(new float[kTileCols * kOuterDepth]),
          c_(new float[kTileRows * kTileCols]) {}

    // Row i of the result: kTileCols floats, of which n are meant.
    float* row(int64_t i) const { return c_.get() + i * kTileCols; }

    template <typename A, typename B>
    void nt(int64_t m, int64_t n, int64_t k, const A& a, const B& b) {
        clear(m);
#if defined(__AVX512BF16__)
        if constexpr (HasAddress<A> && HasAddress<B>) {
            using Element = typename A::Element;
            if constexpr (std::is_same_v<Element, bf16>) return nt_bf16(m, n, k, a, b);
        }
#endif
        const int64_t lda_all = round_up(k, kLanes);
        if (m * lda_all <= kTileRows * kDotDepth) {  // few rows: all of A at once, B in long runs
            for (int64_t i = 0; i < m; ++i) a.load(i, 0, k, a_.get() + i * lda_all);
            for (int64_t j = 0; j < n; j += kDotCols)
                for (int64_t k0 = 0; k0 < k; k0 += kDotDepth)
                    dot_columns(m, j, std::min<int64_t>(kDotCols, n - j), k0,
                                std::min(kDotDepth, k - k0), a_.get() + k0, lda_all, b);
            return;
        }
        for (int64_t k0 = 0; k0 < k; k0 += kDotDepth) {
            const int64_t depth = std::min(kDotDepth, k - k0);
            for (int64_t i = 0; i < m; ++i) a.load(i, k0, depth, a_.get() + i * kDotDepth);
            for (int64_t j = 0; j < n; j += kDotCols)
                dot_columns(m, j, std::min<int64_t>(kDotCols, n - j), k0, depth, a_.get(),
                            kDotDepth, b);
        }
    }

    template <typename A, typename B>
    void nn(int64_t m, int64_t n, int64_t k, const A& a, const B& b) {
        clear(m);
        for (int64_t k0 = 0; k0 < k; k0 += kOuterDepth) {
            const int64_t depth = std::min(kOuterDepth, k - k0);
            for (int64_t i = 0; i < m; ++i) a.load(i, k0, depth, a_.get() + i * kOuterDepth);
            load_panels(n, k0, depth, b);
            outer_columns(m, n, depth, kOuterDepth, 1);
        }
    }

    template <typename A, typename B>
    void tn(int64_t m, int64_t n, int64_t k, const A& a, const B& b) {
        clear(m);
        for (int64_t k0 = 0; k0 < k; k0 += kOuterDepth) {
            const int64_t depth = std::min(kOuterDepth, k - k0);
            for (int64_t i = 0; i < depth; ++i) a.load(k0 + i, 0, m, a_.get() + i * kTileRows);
            load_panels(n, k0, depth, b);
            outer_columns(m, n, depth, 1, kTileRows);
        }
    }

  private:
#if defined(__AVX512BF16__)
    template <typename A, typename B>
    void nt_bf16(int64_t m, int64_t n, int64_t k, const A& a, const B& b) {
        bf16* panel = reinterpret_cast<bf16*>(a_.get());
        for (int64_t k0 = 0; k0 < k; k0 += kBf16Depth) {
            const int64_t depth = std::min(kBf16Depth, k - k0);
            for (int64_t i = 0; i < m; ++i) {
                const bf16* row = a.at(i);
                if (row == nullptr) {
                    std::fill_n(panel + i * kBf16Depth, depth, bf16{0});
                } else {
                    std::copy_n(row + k0, depth, panel + i * kBf16Depth);
                }
            }
            for (int64_t i = 0; i < m; i += kDotRows)
                for (int64_t j = 0; j < n; j += kDotCols)
                    with_rows<kDotRows>(std::min<int64_t>(kDotRows, m - i), [&]<int R>() {
                        with_rows<kDotCols>(std::min<int64_t>(kDotCols, n - j), [&]<int C>() {
                            const bf16* columns[C];
                            for (int c = 0; c < C; ++c) columns[c] = b.at(j + c) + k0;
                            bf16_dot_tile<R, C>(panel + i * kBf16Depth, kBf16Depth, columns, depth,
                                                row(i) + j, kTileCols);
                        });
                    });
        }
    }
#endif

    void clear(int64_t m) { std::fill_n(c_.get(), m * kTileCols, 0.0f); }

    template <typename B>
    void dot_columns(int64_t m, int64_t j, int64_t columns, int64_t k0, int64_t depth,
                     const float* a, int64_t lda, const B& b) {
        if constexpr (HasAddress<B>) {
            if (m <= 2 * kDotRows && depth % kLanes == 0 && columns == kDotCols) {
                const typename B::Element* pointers[kDotCols];
                for (int c = 0; c < kDotCols; ++c) pointers[c] = b.at(j + c) + k0;
                return dot_rows<kDotCols>(m, j, a, lda, pointers, depth);
            }
        }
        const float* pointers[kDotCols];
        for (int64_t c = 0; c < columns; ++c) {
            b.load(j + c, k0, depth, b_.get() + c * kDotDepth);
            pointers[c] = b_.get() + c * kDotDepth;
        }
        with_rows<kDotCols>(columns, [&]<int C>() {
            dot_rows<C>(m, j, a, lda, pointers, round_up(depth, kLanes));
        });
    }

    template <int C, typename B>
    void dot_rows(int64_t m, int64_t j, const float* a, int64_t lda, const B* const* b,
                  int64_t depth) {
        for (int64_t i = 0; i < m; i += kDotRows)
            with_rows<kDotRows>(std::min<int64_t>(kDotRows, m - i), [&]<int R>() {
                dot_tile<R, C>(a + i * lda, lda, b, depth, row(i) + j, kTileCols);
            });
    }

    // b_ [n / kOuterCols][depth][kOuterCols] = B[k0 + i][0, n), columns beyond n undefined.
    template <typename B>
    void load_panels(int64_t n, int64_t k0, int64_t depth, const B& b) {
        for (int64_t i = 0; i < depth; ++i)
            for (int64_t j = 0; j < n; j += kOuterCols)
                b.load(k0 + i, j, std::min<int64_t>(kOuterCols, n - j),
                       b_.get() + j * kOuterDepth + i * kOuterCols);
    }

    void outer_columns(int64_t m, int64_t n, int64_t depth, int64_t a_row, int64_t a_step) {
        for (int64_t j = 0; j < n; j += kOuterCols)
            for (int64_t i = 0; i < m; i += kOuterRows)
                with_rows<kOuterRows>(std::min<int64_t>(kOuterRows, m - i), [&]<int R>() {
                    outer_tile<R>(a_.get() + i * a_row, a_row, a_step, b_.get() + j * kOuterDepth,
                                  depth, row(i) + j, kTileCols);
                });
    }

    std::unique_ptr<float[]> a_, b_, c_;
};

// The rows of each expert: [begin(e), end(e)).
class Groups {
  public:
    Groups(const Tensor& offsets, int64_t rows) : bounds_(sequence_bounds(offsets, rows)) {}
    int64_t size() const { return static_cast<int64_t>(bounds_.size()) - 1; }
    int64_t begin(int64_t e) const { return bounds_[e]; }
    int64_t end(int64_t e) const { return bounds_[e + 1]; }

  private:
    std::vector<int64_t> bounds_;
};

// body(tile, i) for i in [0, n): each thread takes the next i and keeps one GemmTile.
template <typename Body>
void for_each_tile(int64_t n, const Body& body) {
    std::atomic<int64_t> next{0};
    parallel(std::min<int64_t>(n, torch::stable::get_num_threads()), 1, [&](int64_t) {
        GemmTile tile;
        for (int64_t i; (i = next.fetch_add(1)) < n;) body(tile, i);
    });
}

// body(tile, expert, first row, rows, first column) for every tile of at most kTileRows rows and
// `columns` columns; the tiles that share columns of B follow one another.
template <typename Body>
void for_each_row_tile(const Groups& groups, int64_t width, int64_t columns, const Body& body) {
    struct Task {
        int64_t expert, first_row, rows, first_column;
    };
    std::vector<Task> tasks;
    for (int64_t e = 0; e < groups.size(); ++e)
        for (int64_t column = 0; column < width; column += columns)
            for (int64_t row = groups.begin(e); row < groups.end(e); row += kTileRows)
                tasks.push_back({e, row, std::min(kTileRows, groups.end(e) - row), column});
    for_each_tile(tasks.size(), [&](GemmTile& tile, int64_t i) {
        const Task& t = tasks[i];
        body(tile, t.expert, t.first_row, t.rows, t.first_column);
    });
}

// out[e] [height, width] = sum over the rows r of expert e of left(r)^T right(r); left and right
// give the address of a row, or null for a row of zeros. An expert without rows gets zeros.
template <typename T, typename Left, typename Right>
void grouped_wgrad(const Groups& groups, int64_t height, int64_t width, const Left& left,
                   const Right& right, T* out) {
    const int64_t down = (height + kTileRows - 1) / kTileRows;
    const int64_t across = (width + kTileCols - 1) / kTileCols;
    for_each_tile(groups.size() * down * across, [&](GemmTile& tile, int64_t task) {
        const int64_t e = task / (down * across), first = groups.begin(e);
        const int64_t i0 = task / across % down * kTileRows, j0 = task % across * kTileCols;
        const int64_t m = std::min(kTileRows, height - i0), n = std::min(kTileCols, width - j0);
        const auto shifted = [first](const auto& rows, int64_t column) {
            return plain<T>([&rows, first, column](int64_t i) {
                const T* p = rows(first + i);
                return p == nullptr ? p : p + column;
            });
        };
        tile.tn(m, n, groups.end(e) - first, shifted(left, i0), shifted(right, j0));
        for (int64_t i = 0; i < m; ++i) {
            T* row = out + (e * height + i0 + i) * width + j0;
            for (int64_t j = 0; j < n; ++j) from_float(tile.row(i)[j], row + j);
        }
    });
}

}  // namespace dsa::DSA_ISA
