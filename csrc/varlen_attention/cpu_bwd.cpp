// varlen_attention_bwd on the CPU: delta = sum(out * dout) - dlse, then two passes without a shared
// sum, so any number of threads gives the same bits.
//
//   dq:    as the forward, queries in the lanes: S^T, dP^T, dS^T [64 keys, rows], dQ^T += K^T dS^T
//   dk,dv: the mirror image, 96 keys in the lanes, blocks of about 64 rows (tokens x heads of the
//          group): S, dP, dS [rows, keys], dV^T += dO^T P, dK^T += Q^T dS
//
// Seven products where a pass that adds dq across tiles needs five: the price of no atomics.
#include "varlen_attention/cpu_tile.h"

namespace dsa::DSA_ISA {

namespace {

template <typename T>
struct Problem {
    const T *q, *k, *v, *dout;
    int64_t q_stride, k_stride, v_stride;
    const float *lse, *delta;
    std::vector<int64_t> bounds_q, bounds_k;
    int64_t heads, kv_heads, group, dim;
    bool causal;
    float scale;

    Mask mask(int64_t s) const {
        const int64_t keys = bounds_k[s + 1] - bounds_k[s];
        return {causal, keys - (bounds_q[s + 1] - bounds_q[s]), keys};
    }
    // lse and delta of the rows of `tokens` tokens; a row without a key gets lse +inf, p = 0.
    void load_row_scalars(int64_t token, int64_t tokens, int64_t g, int64_t padded, float* row_lse,
                          float* row_delta) const {
        std::fill_n(row_lse, padded, kInf);
        std::fill_n(row_delta, padded, 0.0f);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < group; ++h) {
                const int64_t from = (token + t) * heads + g * group + h;
                row_lse[t * group + h] = lse[from] == -kInf ? kInf : lse[from];
                row_delta[t * group + h] = delta[from];
            }
    }
};

template <typename T>
struct QueryPass {
    const Problem<T>& p;
    std::vector<float> queries, grads, dq, scores, dscores, keys, values, lse, delta, factor;
    std::vector<int32_t> visible;

    QueryPass(const Problem<T>& p, int64_t columns)
        : p(p),
          queries(p.dim * columns),
          grads(p.dim * columns),
          dq(p.dim * columns),
          scores(kBlock * columns),
          dscores(kBlock * columns),
          keys(kBlock * p.dim),
          values(kBlock * p.dim),
          lse(columns),
          delta(columns),
          factor(columns, p.scale),
          visible(columns) {}

    void run(const Tile& tile, int64_t g, T* out) {
        const int64_t dim = p.dim, rows = tile.count * p.group, n = round_up(rows, kLanes);
        const int64_t token = p.bounds_q[tile.sequence] + tile.begin;
        const int64_t first_head = g * p.group * dim, row_stride = p.heads * dim;
        const T* k = p.k + p.bounds_k[tile.sequence] * p.k_stride + g * dim;
        const T* v = p.v + p.bounds_k[tile.sequence] * p.v_stride + g * dim;
        load_columns(p.q + token * p.q_stride + first_head, p.q_stride, tile.count, p.group, dim, n,
                     p.scale, queries.data());
        load_columns(p.dout + token * row_stride + first_head, row_stride, tile.count, p.group, dim,
                     n, 1.0f, grads.data());
        p.load_row_scalars(token, tile.count, g, n, lse.data(), delta.data());
        const Mask mask = p.mask(tile.sequence);
        std::fill_n(visible.begin(), n, 0);
        for (int64_t r = 0; r < rows; ++r)
            visible[r] = int32_t(mask.keys_of(tile.begin + r / p.group));
        std::fill_n(dq.begin(), dim * n, 0.0f);
        const int64_t end = mask.keys_of(tile.begin + tile.count - 1);
        for (int64_t begin = 0; begin < end; begin += kBlock) {
            const int64_t count = std::min(kBlock, end - begin);
            const int64_t padded = round_up(count, kTileRows);
            load_rows(k + begin * p.k_stride, p.k_stride, count, 1, dim, padded, keys.data());
            load_rows(v + begin * p.v_stride, p.v_stride, count, 1, dim, padded, values.data());
            gemm_tile(padded, n, dim, {keys.data(), dim, 1}, queries.data(), n, scores.data(), n,
                      false);
            gemm_tile(padded, n, dim, {values.data(), dim, 1}, grads.data(), n, dscores.data(), n,
                      false);
            for (int64_t c = 0; c < n; c += kLanes) {
                VecI limit;
                std::memcpy(&limit, &visible[c], sizeof limit);
                const Vec shift = load(&lse[c]), offset = load(&delta[c]);
                for (int64_t j = 0; j < count; ++j) {
                    float* ds = &dscores[j * n + c];
                    const Vec x =
                        exp_or_nan(load(&scores[j * n + c]) - shift) * (load(ds) - offset);
                    store(ds, (VecI{} + int32_t(begin + j)) < limit ? x : Vec{});
                }
            }
            gemm_tile(dim, n, count, {keys.data(), 1, dim}, dscores.data(), n, dq.data(), n, true);
        }
        store_columns(dq.data(), n, factor.data(), tile.count, p.group, dim,
                      out + token * row_stride + first_head, row_stride);
    }
};

template <typename T>
struct KeyPass {
    const Problem<T>& p;
    int64_t tokens;  // in a block of rows
    std::vector<float> keys, values, dk, dv, scores, dscores, queries, grads, lse, delta, scale,
        one;

    explicit KeyPass(const Problem<T>& p)
        : p(p),
          tokens(std::max<int64_t>(kBlock / p.group, 1)),
          keys(p.dim * kTileLanes),
          values(p.dim * kTileLanes),
          dk(p.dim * kTileLanes),
          dv(p.dim * kTileLanes),
          scores(rows() * kTileLanes),
          dscores(rows() * kTileLanes),
          queries(rows() * p.dim),
          grads(rows() * p.dim),
          lse(rows()),
          delta(rows()),
          scale(kTileLanes, p.scale),
          one(kTileLanes, 1.0f) {}

    int64_t rows() const { return round_up(tokens * p.group, kTileRows); }

    void run(const Tile& tile, int64_t g, T* dk_out, T* dv_out) {
        const int64_t dim = p.dim, n = round_up(tile.count, kLanes), s = tile.sequence;
        const int64_t key = p.bounds_k[s] + tile.begin, row_stride = p.heads * dim;
        load_columns(p.k + key * p.k_stride + g * dim, p.k_stride, tile.count, 1, dim, n, p.scale,
                     keys.data());
        load_columns(p.v + key * p.v_stride + g * dim, p.v_stride, tile.count, 1, dim, n, 1.0f,
                     values.data());
        std::fill_n(dk.begin(), dim * n, 0.0f);
        std::fill_n(dv.begin(), dim * n, 0.0f);
        const Mask mask = p.mask(s);
        const int64_t length = p.bounds_q[s + 1] - p.bounds_q[s];
        for (int64_t u = mask.first_token_of(tile.begin); u < length; u += tokens) {
            const int64_t count = std::min(tokens, length - u), m = count * p.group;
            const int64_t padded = round_up(m, kTileRows), token = p.bounds_q[s] + u;
            load_rows(p.q + token * p.q_stride + g * p.group * dim, p.q_stride, count, p.group, dim,
                      padded, queries.data());
            load_rows(p.dout + token * row_stride + g * p.group * dim, row_stride, count, p.group,
                      dim, padded, grads.data());
            p.load_row_scalars(token, count, g, padded, lse.data(), delta.data());
            gemm_tile(padded, n, dim, {queries.data(), dim, 1}, keys.data(), n, scores.data(), n,
                      false);
            gemm_tile(padded, n, dim, {grads.data(), dim, 1}, values.data(), n, dscores.data(), n,
                      false);
            for (int64_t r = 0; r < m; ++r) {
                const VecI limit = VecI{} + int32_t(mask.keys_of(u + r / p.group) - tile.begin);
                const Vec shift = splat(lse[r]), offset = splat(delta[r]);
                for (int64_t c = 0; c < n; c += kLanes) {
                    const auto seen = lane_numbers() + int32_t(c) < limit;
                    float *x = &scores[r * n + c], *ds = &dscores[r * n + c];
                    const Vec probability = exp_or_nan(load(x) - shift);
                    store(x, seen ? probability : Vec{});
                    store(ds, seen ? probability * (load(ds) - offset) : Vec{});
                }
            }
            gemm_tile(dim, n, m, {grads.data(), 1, dim}, scores.data(), n, dv.data(), n, true);
            gemm_tile(dim, n, m, {queries.data(), 1, dim}, dscores.data(), n, dk.data(), n, true);
        }
        const int64_t stride = p.kv_heads * dim, to = key * stride + g * dim;
        store_columns(dk.data(), n, scale.data(), tile.count, 1, dim, dk_out + to, stride);
        store_columns(dv.data(), n, one.data(), tile.count, 1, dim, dv_out + to, stride);
    }
};

template <typename T>
void row_deltas(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& out,
                float* delta) {
    const int64_t rows = out.sizes()[0] * out.sizes()[1], dim = out.sizes()[2];
    const float* given = dlse ? data<float>(*dlse) : nullptr;
    parallel(rows, 1024, [&](int64_t r) {
        const T *a = data<T>(dout) + r * dim, *b = data<T>(out) + r * dim;
        float sum = dot(a, b, dim / kLanes * kLanes);
        for (int64_t d = dim / kLanes * kLanes; d < dim; ++d)
            sum += to_float(a[d]) * to_float(b[d]);
        delta[r] = sum - (given ? given[r] : 0.0f);
    });
}

template <typename T>
void backward(const Problem<T>& p, const Tensor& dq, const Tensor& dk, const Tensor& dv) {
    const int64_t group_tokens = std::max<int64_t>(kTileLanes / p.group, 1);
    const auto query_tiles = tiles_of(p.bounds_q, group_tokens);
    parallel_ranges(query_tiles.size() * p.kv_heads, 1, [&](int64_t first, int64_t last) {
        QueryPass<T> pass(p, round_up(group_tokens * p.group, kLanes));
        for (int64_t i = first; i < last; ++i)
            pass.run(query_tiles[i / p.kv_heads], i % p.kv_heads, mutable_data<T>(dq));
    });
    const auto key_tiles = tiles_of(p.bounds_k, kTileLanes);
    parallel_ranges(key_tiles.size() * p.kv_heads, 1, [&](int64_t first, int64_t last) {
        KeyPass<T> pass(p);
        for (int64_t i = first; i < last; ++i)
            pass.run(key_tiles[i / p.kv_heads], i % p.kv_heads, mutable_data<T>(dk),
                     mutable_data<T>(dv));
    });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> varlen_attention_bwd(
    const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& cu_q, const Tensor& cu_k,
    bool causal, double scale, bool deterministic) {
    const auto zeros = [](const Tensor& x) {  // tokens of no sequence keep the 0
        return zeros_like_device(x, {x.sizes()[0], x.sizes()[1], x.sizes()[2]}, x.scalar_type());
    };
    Tensor dq = zeros(q), dk = zeros(k), dv = zeros(v);
    std::vector<float> delta(out.sizes()[0] * out.sizes()[1]);
    with_dtype(q, [&]<typename T>(T) {
        row_deltas<T>(dout, dlse, out, delta.data());
        const int64_t heads = q.sizes()[1], kv_heads = k.sizes()[1];
        backward<T>({data<T>(q), data<T>(k), data<T>(v), data<T>(dout), q.stride(0), k.stride(0),
                     v.stride(0), data<float>(lse), delta.data(),
                     sequence_bounds(cu_q, q.sizes()[0]), sequence_bounds(cu_k, k.sizes()[0]),
                     heads, kv_heads, heads / kv_heads, q.sizes()[2], causal, float(scale)},
                    dq, dk, dv);
    });
    return {dq, dk, dv};
}

DSA_REGISTER_CPU(m) { m.impl("varlen_attention_bwd", TORCH_BOX(&varlen_attention_bwd)); }

}  // namespace dsa::DSA_ISA
