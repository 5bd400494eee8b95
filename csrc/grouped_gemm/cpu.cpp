// grouped_gemm and its weight gradient on the CPU: one task per expert, 64 columns and 96 rows, in
// fp32 register tiles (common/gemm_tile.h).
//
// The block-scaled FP8 form widens both operands with their scales applied and takes the same path:
// fp32 holds every scaled e4m3 value to one rounding.
#include "common/gemm_tile.h"

namespace dsa::DSA_ISA {
namespace {

// Rows of no expert: [0, begin of the first) and [end of the last, rows).
template <typename T>
void clear_outside(const Groups& groups, int64_t rows, int64_t width, T* out) {
    const int64_t first = groups.begin(0), last = groups.end(groups.size() - 1);
    std::memset(out, 0, first * width * sizeof(T));
    std::memset(out + last * width, 0, (rows - last) * width * sizeof(T));
}

template <typename T>
void store_tile(const GemmTile& tile, int64_t rows, int64_t n, T* out, int64_t width) {
    for (int64_t i = 0; i < rows; ++i) narrow(tile.row(i), n, out + i * width);
}

template <typename T>
Tensor gemm(const Tensor& a, const Tensor& b, const Tensor& offsets) {
    const int64_t rows = a.sizes()[0], k = a.sizes()[1], width = b.sizes()[1];
    const int64_t lda = a.stride(0);
    const int64_t b_expert = b.stride(0), b_n = b.stride(1), b_k = b.stride(2);
    const bool k_inner = k <= 1 || b_k == 1;
    const Groups groups(offsets, rows);
    Tensor out = empty_like_device(a, {rows, width}, a.scalar_type());
    clear_outside(groups, rows, width, mutable_data<T>(out));
    for_each_row_tile(
        groups, width, kTileCols,
        [&](GemmTile& tile, int64_t e, int64_t row, int64_t m, int64_t column) {
            const int64_t n = std::min(kTileCols, width - column);
            const T* a_rows = data<T>(a) + row * lda;
            const T* expert = data<T>(b) + e * b_expert + column * b_n;
            const auto left = plain<T>([=](int64_t i) { return a_rows + i * lda; });
            if (k_inner) {
                tile.nt(m, n, k, left, plain<T>([=](int64_t j) { return expert + j * b_n; }));
            } else {
                tile.nn(m, n, k, left, plain<T>([=](int64_t i) { return expert + i * b_k; }));
            }
            store_tile(tile, m, n, mutable_data<T>(out) + row * width + column, width);
        });
    return out;
}

template <typename T>
Tensor wgrad(const Tensor& dc, const Tensor& a, const Tensor& offsets) {
    const Groups groups(offsets, a.sizes()[0]);
    const int64_t height = dc.sizes()[1], width = a.sizes()[1];
    Tensor out = empty_like_device(a, {groups.size(), height, width}, a.scalar_type());
    const auto rows_of = [](const Tensor& x) {
        return [p = data<T>(x), stride = x.stride(0)](int64_t r) { return p + r * stride; };
    };
    grouped_wgrad<T>(groups, height, width, rows_of(dc), rows_of(a), mutable_data<T>(out));
    return out;
}

// e4m3 -> fp32: sign, 4 bits of exponent (bias 7), 3 bits of fraction; 0x7f is NaN, no infinity.
struct Fp8Table {
    float value[256];
    Fp8Table() {
        for (int bits = 0; bits < 256; ++bits) {
            const int exponent = bits >> 3 & 15, fraction = bits & 7;
            float x = exponent == 0 ? std::ldexp(float(fraction), -9)
                                    : std::ldexp(float(8 + fraction), exponent - 10);
            if (exponent == 15 && fraction == 7) x = std::numeric_limits<float>::quiet_NaN();
            value[bits] = bits & 128 ? -x : x;
        }
    }
};

// Rows of e4m3 with one fp32 scale per 128 elements: row r starts at bytes + r * stride, its scales
// at scales(r).
template <typename Scales>
struct Fp8Rows {
    const Fp8Table& table;
    const uint8_t* bytes;
    int64_t stride;
    Scales scales;
    void load(int64_t row, int64_t first, int64_t n, float* dst) const {
        const uint8_t* p = bytes + row * stride + first;
        const float* scale = scales(row);
        for (int64_t i = 0; i < n; ++i) dst[i] = table.value[p[i]] * scale[(first + i) / 128];
    }
};
template <typename Scales>
Fp8Rows(const Fp8Table&, const uint8_t*, int64_t, Scales) -> Fp8Rows<Scales>;

Tensor gemm_fp8(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                const Tensor& offsets) {
    const int64_t rows = a.sizes()[0], k = a.sizes()[1], width = b.sizes()[1];
    const int64_t k_blocks = k / 128, n_blocks = width / 128;
    const Fp8Table table;
    const Groups groups(offsets, rows);
    Tensor out = empty_like_device(a, {rows, width}, ScalarType::BFloat16);
    clear_outside(groups, rows, width, mutable_data<bf16>(out));
    for_each_row_tile(
        groups, width, kTileCols,
        [&](GemmTile& tile, int64_t e, int64_t row, int64_t m, int64_t column) {
            const int64_t n = std::min(kTileCols, width - column);
            const float* row_scales = data<float>(a_scale) + row * k_blocks;
            const float* block_scales =  // a tile of 64 columns lies in one block of 128
                data<float>(b_scale) + (e * n_blocks + column / 128) * k_blocks;
            tile.nt(m, n, k,
                    Fp8Rows{table, data<uint8_t>(a) + row * k, k,
                            [=](int64_t i) { return row_scales + i * k_blocks; }},
                    Fp8Rows{table, data<uint8_t>(b) + (e * width + column) * k, k,
                            [=](int64_t) { return block_scales; }});
            store_tile(tile, m, n, mutable_data<bf16>(out) + row * width + column, width);
        });
    return out;
}

Tensor grouped_gemm(const Tensor& a, const Tensor& b, const Tensor& offsets) {
    return with_dtype(a, [&]<typename T>(T) { return gemm<T>(a, b, offsets); });
}

Tensor grouped_gemm_wgrad(const Tensor& dc, const Tensor& a, const Tensor& offsets) {
    return with_dtype(a, [&]<typename T>(T) { return wgrad<T>(dc, a, offsets); });
}

}  // namespace

DSA_REGISTER_CPU(m) {
    m.impl("grouped_gemm", TORCH_BOX(&grouped_gemm));
    m.impl("grouped_gemm_wgrad", TORCH_BOX(&grouped_gemm_wgrad));
    m.impl("grouped_gemm_fp8", TORCH_BOX(&gemm_fp8));
}

}  // namespace dsa::DSA_ISA
