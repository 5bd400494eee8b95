// moe_mlp on the CPU: routed SwiGLU experts, forward and backward, in fp32 register tiles
// (common/gemm_tile.h) with bf16 or fp32 storage between the GEMMs.
//
// Forward   up: 32 gate and 32 up columns of one expert share the rows of x, gathered by row_token;
//           their tile becomes 32 columns of act = silu(g) * u (and of h). down: y = act w2^T.
//           combine: out[t] = sum_j weights[t, j] * y[slot_row[t, j]], j ascending.
// Backward  dact = dout w2 gathered; its tile, with h, becomes dh, s * act and the row sums
//           dact . act (the gradient of the routing weight s); then dw2, dx rows, dw13, combine.
// Saved for the backward: x and h. Sums have a fixed order: bitwise deterministic.
#include "common/gemm_tile.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kGateCols = kTileCols / 2;

inline Vec sigmoid(Vec x) { return splat(1.0f) / (splat(1.0f) + vexp(-x)); }

// The op's arguments with their sizes; what every step below reads.
template <typename T>
struct Layer {
    const Tensor &x, &w13, &w2, &weights, &row_token, &slot_row;
    Groups groups;
    int64_t tokens = x.sizes()[0], hidden = x.sizes()[1], width = w2.sizes()[2];
    int64_t rows = row_token.numel(), topk = weights.sizes()[1];

    int64_t token(int64_t row) const {  // -1: none
        const int32_t t = data<int32_t>(row_token)[row];
        return t >= 0 && t < tokens ? t : -1;
    }
    // The row of slot (t, j) if it belongs to an expert, else -1.
    int64_t row(int64_t t, int64_t j) const {
        const int64_t r = data<int32_t>(slot_row)[t * topk + j];
        return r >= groups.begin(0) && r < groups.end(groups.size() - 1) ? r : -1;
    }
    float weight(int64_t t, int64_t j) const { return data<float>(weights)[t * topk + j]; }
    float row_weight(int64_t r) const {
        const int64_t t = token(r);
        float sum = 0.0f;
        for (int64_t j = 0; t >= 0 && j < topk; ++j) sum += row(t, j) == r ? weight(t, j) : 0.0f;
        return sum;
    }
    // Row r of the gathered tensor `from` [T, ...].
    auto gathered(const Tensor& from) const {
        return [this, p = data<T>(from), stride = from.stride(0)](int64_t r) {
            const int64_t t = token(r);
            return t < 0 ? nullptr : p + t * stride;
        };
    }
};

template <typename T>
void up(const Layer<T>& layer, T* h, T* act) {
    const auto x_row = layer.gathered(layer.x);
    const int64_t f = layer.width, stride = layer.w13.stride(1);
    for_each_row_tile(
        layer.groups, f, kGateCols,
        [&](GemmTile& tile, int64_t e, int64_t row, int64_t m, int64_t column) {
            const int64_t n = std::min(kGateCols, f - column);
            const T* gate = data<T>(layer.w13) + e * layer.w13.stride(0) + column * stride;
            const T* up = gate + f * stride;
            // n gate columns, then n up columns.
            tile.nt(m, 2 * n, layer.hidden, plain<T>([&](int64_t i) { return x_row(row + i); }),
                    plain<T>([=](int64_t j) {
                        return j < n ? gate + j * stride : up + (j - n) * stride;
                    }));
            for (int64_t i = 0; i < m; ++i) {
                float g[kGateCols] = {}, u[kGateCols] = {};
                std::copy_n(tile.row(i), n, g);
                std::copy_n(tile.row(i) + n, n, u);
                const int64_t r = row + i;
                if (h != nullptr) {
                    narrow(g, n, h + r * 2 * f + column);
                    narrow(u, n, h + r * 2 * f + f + column);
                }
                for (int64_t c = 0; c < kGateCols; c += kLanes) {
                    const Vec gate_value = load(g + c);
                    store(g + c, gate_value * sigmoid(gate_value) * load(u + c));
                }
                narrow(g, n, act + r * f + column);
            }
        });
}

// out [N, width] = rows [N, k] times B of each expert, in the form that `form` takes.
template <typename T, typename Form>
void project(const Layer<T>& layer, int64_t width, T* out, const Form& form) {
    for_each_row_tile(layer.groups, width, kTileCols,
                      [&](GemmTile& tile, int64_t e, int64_t row, int64_t m, int64_t column) {
                          const int64_t n = std::min(kTileCols, width - column);
                          form(tile, e, row, m, column, n);
                          for (int64_t i = 0; i < m; ++i)
                              narrow(tile.row(i), n, out + (row + i) * width + column);
                      });
}

// out[t] = sum_j scale(t, j) * rows[slot_row[t, j]], j ascending.
template <typename T, typename Scale>
void combine(const Layer<T>& layer, const T* rows, const Scale& scale, T* out) {
    const int64_t hidden = layer.hidden;
    parallel_ranges(layer.tokens, 1, [&](int64_t begin, int64_t end) {
        std::vector<float> sum(hidden);
        for (int64_t t = begin; t < end; ++t) {
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t j = 0; j < layer.topk; ++j) {
                const int64_t r = layer.row(t, j);
                if (r < 0) continue;
                const float s = scale(t, j);
                const T* y = rows + r * hidden;
                int64_t i = 0;
                for (; i + kLanes <= hidden; i += kLanes)
                    store(&sum[i], splat(s) * load(y + i) + load(&sum[i]));
                for (; i < hidden; ++i) sum[i] += s * to_float(y[i]);
            }
            narrow(sum.data(), hidden, out + t * hidden);
        }
    });
}

template <typename T>
std::tuple<Tensor, Tensor> forward(const Layer<T>& layer, bool save_h) {
    const int64_t f = layer.width, hidden = layer.hidden;
    const ScalarType dtype = layer.x.scalar_type();
    // Rows of no expert are zero in h, as the contract says.
    Tensor h = zeros_like_device(layer.x, {save_h ? layer.rows : 0, 2 * f}, dtype);
    Tensor act = empty_like_device(layer.x, {layer.rows, f}, dtype);
    up(layer, save_h ? mutable_data<T>(h) : nullptr, mutable_data<T>(act));

    Tensor y = empty_like_device(layer.x, {layer.rows, hidden}, dtype);
    const int64_t stride = layer.w2.stride(1);
    project(layer, hidden, mutable_data<T>(y),
            [&](GemmTile& tile, int64_t e, int64_t row, int64_t m, int64_t column, int64_t n) {
                const T* left = data<T>(act) + row * f;
                const T* w2 = data<T>(layer.w2) + e * layer.w2.stride(0) + column * stride;
                tile.nt(m, n, f, plain<T>([=](int64_t i) { return left + i * f; }),
                        plain<T>([=](int64_t j) { return w2 + j * stride; }));
            });

    Tensor out = empty_like_device(layer.x, {layer.tokens, hidden}, dtype);
    combine(
        layer, data<T>(y), [&](int64_t t, int64_t j) { return layer.weight(t, j); },
        mutable_data<T>(out));
    return {out, h};
}

// dact = dout w2, then per row r with weight s: dh [N, 2F], act * s [N, F] and, for each block of
// 64 columns, the part of dact . act in dweight [N, blocks].
template <typename T>
void down_backward(const Layer<T>& layer, const Tensor& dout, const T* h, T* dh, T* act,
                   float* dweight) {
    const auto dout_row = layer.gathered(dout);
    const int64_t f = layer.width, stride = layer.w2.stride(1);
    const int64_t blocks = (f + kTileCols - 1) / kTileCols;
    for_each_row_tile(
        layer.groups, f, kTileCols,
        [&](GemmTile& tile, int64_t e, int64_t row, int64_t m, int64_t column) {
            const int64_t n = std::min(kTileCols, f - column);
            const T* w2 = data<T>(layer.w2) + e * layer.w2.stride(0) + column;
            tile.nn(m, n, layer.hidden, plain<T>([&](int64_t i) { return dout_row(row + i); }),
                    plain<T>([=](int64_t i) { return w2 + i * stride; }));
            for (int64_t i = 0; i < m; ++i) {
                const int64_t r = row + i;
                const Vec s = splat(layer.row_weight(r));
                float d[kTileCols] = {}, g[kTileCols] = {}, u[kTileCols] = {};
                std::copy_n(tile.row(i), n, d);
                widen(h + r * 2 * f + column, n, g);
                widen(h + r * 2 * f + f + column, n, u);
                Vec sum{};
                for (int64_t c = 0; c < kTileCols; c += kLanes) {
                    const Vec dact = load(d + c), gate = load(g + c), up = load(u + c);
                    const Vec sig = sigmoid(gate), silu = gate * sig, a = silu * up;
                    sum = dact * a + sum;
                    store(d + c, a * s);
                    store(g + c, dact * s * up * (sig + silu * (splat(1.0f) - sig)));
                    store(u + c, dact * s * silu);
                }
                dweight[r * blocks + column / kTileCols] = reduce_add(sum);
                narrow(d, n, act + r * f + column);
                narrow(g, n, dh + r * 2 * f + column);
                narrow(u, n, dh + r * 2 * f + f + column);
            }
        });
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Layer<T>& layer, const Tensor& dout,
                                                    const Tensor& h) {
    const int64_t f = layer.width, hidden = layer.hidden, experts = layer.groups.size();
    const int64_t blocks = (f + kTileCols - 1) / kTileCols;
    const ScalarType dtype = layer.x.scalar_type();
    Tensor dh = empty_like_device(layer.x, {layer.rows, 2 * f}, dtype);
    Tensor act = empty_like_device(layer.x, {layer.rows, f}, dtype);
    Tensor parts = empty_like_device(layer.x, {layer.rows, blocks}, ScalarType::Float);
    down_backward(layer, dout, data<T>(h), mutable_data<T>(dh), mutable_data<T>(act),
                  mutable_data<float>(parts));

    const auto dh_row = [&](int64_t r) { return data<T>(dh) + r * 2 * f; };
    Tensor dw2 = empty_like_device(layer.x, {experts, hidden, f}, dtype);
    grouped_wgrad<T>(
        layer.groups, hidden, f, layer.gathered(dout),
        [&](int64_t r) { return data<T>(act) + r * f; }, mutable_data<T>(dw2));
    Tensor dw13 = empty_like_device(layer.x, {experts, 2 * f, hidden}, dtype);
    grouped_wgrad<T>(layer.groups, 2 * f, hidden, dh_row, layer.gathered(layer.x),
                     mutable_data<T>(dw13));

    Tensor dx_rows = empty_like_device(layer.x, {layer.rows, hidden}, dtype);
    const int64_t stride = layer.w13.stride(1);
    project(layer, hidden, mutable_data<T>(dx_rows),
            [&](GemmTile& tile, int64_t e, int64_t row, int64_t m, int64_t column, int64_t n) {
                const T* w13 = data<T>(layer.w13) + e * layer.w13.stride(0) + column;
                tile.nn(m, n, 2 * f, plain<T>([&](int64_t i) { return dh_row(row + i); }),
                        plain<T>([=](int64_t i) { return w13 + i * stride; }));
            });
    Tensor dx = empty_like_device(layer.x, {layer.tokens, hidden}, dtype);
    combine(layer, data<T>(dx_rows), [](int64_t, int64_t) { return 1.0f; }, mutable_data<T>(dx));

    Tensor dweights = empty_like_device(layer.x, {layer.tokens, layer.topk}, ScalarType::Float);
    parallel(layer.tokens * layer.topk, 4096, [&](int64_t slot) {
        const int64_t r = layer.row(slot / layer.topk, slot % layer.topk);
        float sum = 0.0f;
        for (int64_t b = 0; r >= 0 && b < blocks; ++b) sum += data<float>(parts)[r * blocks + b];
        mutable_data<float>(dweights)[slot] = sum;
    });
    return {dx, dw13, dw2, dweights};
}

std::tuple<Tensor, Tensor> moe_mlp(const Tensor& x, const Tensor& w13, const Tensor& w2,
                                   const Tensor& weights, const Tensor& offsets,
                                   const Tensor& row_token, const Tensor& slot_row, bool save_h) {
    return with_dtype(x, [&]<typename T>(T) {
        return forward(
            Layer<T>{x, w13, w2, weights, row_token, slot_row, Groups(offsets, row_token.numel())},
            save_h);
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_mlp_bwd(
    const Tensor& dout, const Tensor& x, const Tensor& h, const Tensor& w13, const Tensor& w2,
    const Tensor& weights, const Tensor& offsets, const Tensor& row_token, const Tensor& slot_row) {
    return with_dtype(x, [&]<typename T>(T) {
        return backward(
            Layer<T>{x, w13, w2, weights, row_token, slot_row, Groups(offsets, row_token.numel())},
            dout, h);
    });
}

}  // namespace

DSA_REGISTER_CPU(m) {
    m.impl("moe_mlp", TORCH_BOX(&moe_mlp));
    m.impl("moe_mlp_bwd", TORCH_BOX(&moe_mlp_bwd));
}

}  // namespace dsa::DSA_ISA
