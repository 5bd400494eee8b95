// sparse_attention on the CPU: one token and one KV head at a time, every selected K and V row read
// once for all heads of the group.
//
// Forward, per (token, KV head): kTile rows, widened to float in L1, against blocks of kBlock
// heads. Scores stay in kLanes accumulators of kBlock heads x kLanes / kBlock keys, summed by one
// transposing tree, and lie as [K][kBlock]: the lanes of the softmax are heads. Softmax over the
// list in two passes, then tiles of V rows against kBlock heads x kWide accumulators. Scratch: K
// scores a head, per thread.
//
// Backward: dq by token, as the forward. dk and dv by (KV head, range of kRange keys): the owner
// walks the tokens in order, so the order of the sums does not depend on the number of threads. The
// scores are computed in both passes: 7 products instead of 5, but no memory beyond O(T * K).
//
// Bound by the gather of rows from L2 and L3, then by FMAs (8 per 6 loads).
#include "common/cpu.h"

#include "common/sequence_bounds.h"
#include "common/simd.h"

namespace dsa::DSA_ISA {

constexpr int64_t kTile = 32;  // rows widened at a time: 16 KB of floats
constexpr int64_t kMaxDim = 128;
constexpr int64_t kRange = 1024;  // keys a dk / dv task owns: 1 MB of sums at D = 128
constexpr int kWide = kLanes == 16 ? 4 : 2;

// Sums of neighbours of a, then of b: single lanes inside every 128 bits (kGroup 1), or whole
// groups of four lanes (kGroup 4).
template <int kGroup, int... I>
inline Vec add_neighbours(Vec a, Vec b, std::integer_sequence<int, I...>) {
    if constexpr (kGroup == 1) {
        return __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 * 2 + I % 4 / 2 * kLanes)...) +
               __builtin_shufflevector(a, b, (I / 4 * 4 + I % 2 * 2 + 1 + I % 4 / 2 * kLanes)...);
    } else {
        return __builtin_shufflevector(a, b, (I / 4 * 8 + I % 4)...) +
               __builtin_shufflevector(a, b, (I / 4 * 8 + 4 + I % 4)...);
    }
}

// r[i] = sum of the lanes of x[i]; x is used up.
inline Vec reduce_lanes(Vec* x) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
    for (int n = kLanes / 2; n > 0; n /= 2)
        for (int i = 0; i < n; ++i)
            x[i] = n >= kLanes / 4 ? add_neighbours<1>(x[2 * i], x[2 * i + 1], lanes)
                                   : add_neighbours<4>(x[2 * i], x[2 * i + 1], lanes);
    return x[0];
}

// Lane i becomes combine(lanes i % kBlock, i % kBlock + kBlock, ...).
template <int kBlock, typename Combine>
inline Vec across_keys(Vec v, Combine combine) {
    float x[kLanes];
    store(x, v);
    for (int w = kLanes / 2; w >= kBlock; w /= 2)
        for (int i = 0; i < w; ++i) x[i] = combine(x[i], x[i + w]);
    for (int i = kBlock; i < kLanes; ++i) x[i] = x[i % kBlock];
    return load(x);
}

// The n rows of one KV head of k or v that one token selected.
template <typename T>
struct Rows {
    const T* base;
    int64_t stride;
    const int32_t* positions;
    int64_t n;
    const T* operator[](int64_t i) const { return base + positions[i] * stride; }

    // Rows [begin, end) as floats, one after another; the kTile after them are prefetched. Used in
    // place they would keep hitting a quarter of L1's sets (a row of 4 KV heads is 1 KB).
    void widen(int64_t begin, int64_t end, int64_t dim, float* tile) const {
        for (int64_t i = end; i < std::min(end + kTile, n); ++i)
            for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T)))
                __builtin_prefetch((*this)[i] + d, 0, 2);
        for (int64_t i = begin; i < end; ++i)
            for (int64_t d = 0; d < dim; d += kLanes)
                store(tile + (i - begin) * dim + d, load((*this)[i] + d));
        if ((end - begin) % kLanes != 0)  // dot_rows reads up to a whole vector of keys
            std::fill(tile + (end - begin) * dim,
                      tile + std::min(end - begin + kLanes, kTile) * dim, 0.0f);
    }
};

// Floats a block of scores takes: n rounded up to whole vectors of [keys][kBlock].
template <int kBlock>
int64_t padded_size(int64_t n) {
    return round_up(n * kBlock, kLanes);
}

// scores[b][i][h] = rows[i] . heads[b][h], for `blocks` blocks of heads [kBlock][dim].
template <int kBlock, typename T>
void dot_rows(const float* heads, int64_t blocks, const Rows<T>& rows, int64_t dim, float* scores) {
    constexpr int kKeys = kLanes / kBlock;
    alignas(64) float tile[kTile * kMaxDim];
    const int64_t size = padded_size<kBlock>(rows.n);
    for (int64_t begin = 0; begin < rows.n; begin += kTile) {
        const int64_t end = std::min(begin + kTile, rows.n);
        rows.widen(begin, end, dim, tile);
        for (int64_t b = 0; b < blocks; ++b) {
            const float* head = heads + b * kBlock * dim;
            for (int64_t i = begin; i < end; i += kKeys) {
                const float* key = tile + (i - begin) * dim;
                Vec sums[kLanes];
                for (Vec& sum : sums) sum = Vec{};
                for (int64_t d = 0; d < dim; d += kLanes)
                    for (int j = 0; j < kKeys; ++j) {
                        const Vec value = load(key + j * dim + d);
                        for (int h = 0; h < kBlock; ++h)
                            sums[j * kBlock + h] =
                                value * load(head + h * dim + d) + sums[j * kBlock + h];
                    }
                store(scores + b * size + i * kBlock, reduce_lanes(sums));
            }
        }
    }
}

// out[b][h] += sum_i weights[b][i][h] * rows[i].
template <int kBlock, typename T>
void add_rows(const float* weights, int64_t blocks, const Rows<T>& rows, int64_t dim, float* out) {
    alignas(64) float tile[kTile * kMaxDim];
    const int64_t size = padded_size<kBlock>(rows.n);
    for (int64_t begin = 0; begin < rows.n; begin += kTile) {
        const int64_t end = std::min(begin + kTile, rows.n);
        rows.widen(begin, end, dim, tile);
        for (int64_t b = 0; b < blocks; ++b) {
            const float* weight = weights + b * size;
            for (int64_t d = 0; d < dim; d += kWide * kLanes) {
                float* target = out + b * kBlock * dim + d;
                Vec sums[kBlock][kWide];
                for (int h = 0; h < kBlock; ++h)
                    for (int w = 0; w < kWide; ++w)
                        sums[h][w] = load(target + h * dim + w * kLanes);
                for (int64_t i = begin; i < end; ++i) {
                    Vec value[kWide];
                    for (int w = 0; w < kWide; ++w)
                        value[w] = load(tile + (i - begin) * dim + d + w * kLanes);
                    for (int h = 0; h < kBlock; ++h)
                        for (int w = 0; w < kWide; ++w)
                            sums[h][w] = broadcast(weight[i * kBlock + h]) * value[w] + sums[h][w];
                }
                for (int h = 0; h < kBlock; ++h)
                    for (int w = 0; w < kWide; ++w)
                        store(target + h * dim + w * kLanes, sums[h][w]);
            }
        }
    }
}

// sums[positions[i] - first] += sum_h weights[i][h] * heads[h], for one block of heads.
template <int kBlock>
void add_outer(const float* weights, const int32_t* positions, int64_t n, int64_t first,
               const float* heads, int64_t dim, float* sums) {
    for (int64_t i = 0; i < n; ++i) {
        float* target = sums + (positions[i] - first) * dim;
        Vec weight[kBlock];
        for (int h = 0; h < kBlock; ++h) weight[h] = broadcast(weights[i * kBlock + h]);
        for (int64_t d = 0; d < dim; d += kLanes) {
            Vec sum = load(target + d);
            for (int h = 0; h < kBlock; ++h) sum = weight[h] * load(heads + h * dim + d) + sum;
            store(target + d, sum);
        }
    }
}

// Softmax over the n rows of one block of scores, in place; lse[kBlock].
template <int kBlock>
void softmax_columns(float* scores, int64_t n, float* lse) {
    const int64_t size = padded_size<kBlock>(n);
    std::fill(scores + n * kBlock, scores + size, -kInf);
    Vec top = splat(-kInf);
    for (int64_t i = 0; i < size; i += kLanes) top = vmax(load(scores + i), top);
    top = across_keys<kBlock>(top, [](float a, float b) { return a > b ? a : b; });
    Vec sum{};
    for (int64_t i = 0; i < size; i += kLanes) {
        const Vec weight = exp_or_nan(load(scores + i) - top);
        store(scores + i, weight);
        sum = sum + weight;
    }
    sum = across_keys<kBlock>(sum, [](float a, float b) { return a + b; });
    const Vec inverse = splat(1.0f) / sum;
    for (int64_t i = 0; i < size; i += kLanes) store(scores + i, load(scores + i) * inverse);
    for (int h = 0; h < kBlock; ++h) lse[h] = top[h] + std::log(sum[h]);
}

// A packed tensor [rows][heads][dim] with a contiguous last dimension.
template <typename T>
struct Packed {
    T* base;
    int64_t row_stride, head_stride;
    explicit Packed(const Tensor& x)
        : base(static_cast<T*>(x.data_ptr())), row_stride(x.stride(0)), head_stride(x.stride(1)) {}
    T* at(int64_t row, int64_t head) const { return base + row * row_stride + head * head_stride; }
};

struct Selection {
    const int32_t* indices;
    int64_t stride, topk;
    std::vector<int64_t> bounds_q, bounds_k;

    Selection(const Tensor& ids, const Tensor& cu_q, const Tensor& cu_k, int64_t keys)
        : indices(data<int32_t>(ids)),
          stride(ids.stride(0)),
          topk(ids.sizes()[1]),
          bounds_q(sequence_bounds(cu_q, ids.sizes()[0])),
          bounds_k(sequence_bounds(cu_k, keys)) {}

    // Writes the packed positions of the keys that a token selects, ascending; returns how many.
    int64_t positions(int64_t token, int32_t* out) const {
        const auto next = std::upper_bound(bounds_q.begin(), bounds_q.end(), token);
        if (next == bounds_q.begin() || next == bounds_q.end()) return 0;
        const int64_t s = next - bounds_q.begin() - 1;
        const int64_t first = bounds_k[s], length = bounds_k[s + 1] - first;
        const int32_t* row = indices + token * stride;
        int64_t n = 0;
        bool ascending = true;
        for (int64_t i = 0; i < topk; ++i) {
            if (row[i] < 0 || row[i] >= length) continue;
            const int32_t position = static_cast<int32_t>(first + row[i]);
            if (n > 0 && position <= out[n - 1]) {
                if (position == out[n - 1]) continue;
                ascending = false;
            }
            out[n++] = position;
        }
        if (ascending) return n;
        std::sort(out, out + n);
        return std::unique(out, out + n) - out;
    }
};

struct Shape3 {
    int64_t tokens, heads, dim, keys, groups, group;
    Shape3(const Tensor& q, const Tensor& k)
        : tokens(q.sizes()[0]),
          heads(q.sizes()[1]),
          dim(q.sizes()[2]),
          keys(k.sizes()[0]),
          groups(k.sizes()[1]),
          group(heads / groups) {}
};

// scale * the heads of group g as float [group rounded up to whole blocks][dim]; the rest stays 0.
template <typename T>
void widen_heads(const Packed<T>& x, int64_t token, int64_t g, const Shape3& shape, float scale,
                 float* out) {
    for (int64_t h = 0; h < shape.group; ++h) {
        const T* source = x.at(token, g * shape.group + h);
        for (int64_t d = 0; d < shape.dim; d += kLanes)
            store(out + h * shape.dim + d, load(source + d) * splat(scale));
    }
}

template <int kBlock, typename T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Selection& selection,
             float scale, const Tensor& out, float* lse) {
    const Shape3 shape(q, k);
    const Packed<T> queries(q), keys(k), values(v), results(out);
    const int64_t blocks = (shape.group + kBlock - 1) / kBlock;
    const int64_t size = padded_size<kBlock>(selection.topk);
    parallel_ranges(shape.tokens * shape.groups, 1, [&](int64_t begin, int64_t end) {
        std::vector<int32_t> positions(selection.topk);
        std::vector<float> heads(blocks * kBlock * shape.dim), sums(heads.size());
        std::vector<float> scores(blocks * size), block_lse(blocks * kBlock);
        int64_t listed = -1, n = 0;
        for (int64_t item = begin; item < end; ++item) {
            const int64_t token = item / shape.groups, g = item % shape.groups;
            if (token != listed) n = selection.positions(token, positions.data());
            listed = token;
            std::fill(sums.begin(), sums.end(), 0.0f);
            std::fill(block_lse.begin(), block_lse.end(), -kInf);
            if (n > 0) {
                const Rows<T> k_rows{keys.at(0, g), keys.row_stride, positions.data(), n};
                const Rows<T> v_rows{values.at(0, g), values.row_stride, positions.data(), n};
                widen_heads(queries, token, g, shape, scale, heads.data());
                dot_rows<kBlock>(heads.data(), blocks, k_rows, shape.dim, scores.data());
                for (int64_t b = 0; b < blocks; ++b)
                    softmax_columns<kBlock>(scores.data() + b * padded_size<kBlock>(n), n,
                                            block_lse.data() + b * kBlock);
                add_rows<kBlock>(scores.data(), blocks, v_rows, shape.dim, sums.data());
            }
            for (int64_t h = 0; h < shape.group; ++h) {
                const int64_t head = g * shape.group + h;
                narrow(sums.data() + h * shape.dim, shape.dim, results.at(token, head));
                lse[token * shape.heads + head] = block_lse[h];
            }
        }
    });
}

// One token and KV head of the backward: the weights and the gradient of the scores over some keys.
template <int kBlock, typename T>
class TokenGradient {
  public:
    TokenGradient(const Shape3& shape, int64_t topk)
        : blocks((shape.group + kBlock - 1) / kBlock),
          q(blocks * kBlock * shape.dim),
          dout(q.size()),
          weights(blocks * padded_size<kBlock>(topk)),
          dscores(weights.size()),
          shape_(shape),
          lse_(blocks * kLanes),
          delta_(lse_.size()) {}

    // Loads q and dout of the token and delta = dout . out - dlse.
    void load_token(const Packed<T>& queries, const Packed<T>& gradients, const Packed<T>& outputs,
                    const float* lse, const float* dlse, int64_t token, int64_t g) {
        widen_heads(queries, token, g, shape_, 1.0f, q.data());
        widen_heads(gradients, token, g, shape_, 1.0f, dout.data());
        for (int64_t h = 0; h < shape_.group; ++h) {
            const int64_t head = g * shape_.group + h, row = token * shape_.heads + head;
            const float delta =
                dot(gradients.at(token, head), outputs.at(token, head), shape_.dim) -
                (dlse ? dlse[row] : 0.0f);
            for (int lane = h % kBlock; lane < kLanes; lane += kBlock) {
                lse_[h / kBlock * kLanes + lane] = lse[row];
                delta_[h / kBlock * kLanes + lane] = delta;
            }
        }
    }

    void compute(const Rows<T>& k_rows, const Rows<T>& v_rows, float scale) {
        dot_rows<kBlock>(q.data(), blocks, k_rows, shape_.dim, weights.data());
        dot_rows<kBlock>(dout.data(), blocks, v_rows, shape_.dim, dscores.data());
        const int64_t size = padded_size<kBlock>(k_rows.n);
        for (int64_t b = 0; b < blocks; ++b) {
            const Vec lse = load(&lse_[b * kLanes]), delta = load(&delta_[b * kLanes]);
            for (int64_t i = b * size; i < (b + 1) * size; i += kLanes) {
                const Vec weight = exp_or_nan(load(&weights[i]) * splat(scale) - lse);
                store(&weights[i], weight);
                store(&dscores[i], weight * (load(&dscores[i]) - delta) * splat(scale));
            }
        }
    }

    const int64_t blocks;
    std::vector<float> q, dout, weights, dscores;  // [blocks][kBlock][dim], [blocks][n][kBlock]

  private:
    const Shape3 shape_;
    std::vector<float> lse_, delta_;  // [blocks][kLanes], repeated over the keys of a vector
};

template <int kBlock, typename T>
void backward(const Tensor& dout_, const float* dlse, const Tensor& q_, const Tensor& k_,
              const Tensor& v_, const Tensor& out_, const float* lse, const Selection& selection,
              float scale, const Tensor& dq_, const Tensor& dk_, const Tensor& dv_) {
    const Shape3 shape(q_, k_);
    const Packed<T> dout(dout_), q(q_), k(k_), v(v_), out(out_), dq(dq_), dk(dk_), dv(dv_);
    std::vector<int32_t> positions(shape.tokens * selection.topk);
    std::vector<int64_t> counts(shape.tokens);
    parallel(shape.tokens, 1, [&](int64_t token) {
        counts[token] = selection.positions(token, &positions[token * selection.topk]);
    });
    const auto rows = [&](const Packed<T>& x, int64_t g, const int32_t* list, int64_t n) {
        return Rows<T>{x.at(0, g), x.row_stride, list, n};
    };

    parallel_ranges(shape.tokens * shape.groups, 1, [&](int64_t begin, int64_t end) {
        TokenGradient<kBlock, T> gradient(shape, selection.topk);
        std::vector<float> sums(gradient.q.size());
        for (int64_t item = begin; item < end; ++item) {
            const int64_t token = item / shape.groups, g = item % shape.groups;
            const int32_t* list = positions.data() + token * selection.topk;
            std::fill(sums.begin(), sums.end(), 0.0f);
            if (counts[token] > 0) {
                const Rows<T> k_rows = rows(k, g, list, counts[token]);
                gradient.load_token(q, dout, out, lse, dlse, token, g);
                gradient.compute(k_rows, rows(v, g, list, counts[token]), scale);
                add_rows<kBlock>(gradient.dscores.data(), gradient.blocks, k_rows, shape.dim,
                                 sums.data());
            }
            for (int64_t h = 0; h < shape.group; ++h)
                narrow(&sums[h * shape.dim], shape.dim, dq.at(token, g * shape.group + h));
        }
    });

    const int64_t ranges = (shape.keys + kRange - 1) / kRange;
    parallel_ranges(ranges * shape.groups, 1, [&](int64_t begin, int64_t end) {
        TokenGradient<kBlock, T> gradient(shape, selection.topk);
        std::vector<float> dk_sums(kRange * shape.dim), dv_sums(kRange * shape.dim);
        for (int64_t item = begin; item < end; ++item) {
            const int64_t first = item / shape.groups * kRange, g = item % shape.groups;
            const int64_t last = std::min(first + kRange, shape.keys);
            std::fill(dk_sums.begin(), dk_sums.end(), 0.0f);
            std::fill(dv_sums.begin(), dv_sums.end(), 0.0f);
            for (int64_t token = 0; token < shape.tokens; ++token) {
                const int32_t* list = positions.data() + token * selection.topk;
                const int32_t* from = std::lower_bound(list, list + counts[token], first);
                const int64_t n = std::lower_bound(from, list + counts[token], last) - from;
                if (n == 0) continue;
                gradient.load_token(q, dout, out, lse, dlse, token, g);
                gradient.compute(rows(k, g, from, n), rows(v, g, from, n), scale);
                const int64_t size = padded_size<kBlock>(n);
                for (int64_t b = 0; b < gradient.blocks; ++b) {
                    const int64_t head = b * kBlock * shape.dim;
                    add_outer<kBlock>(&gradient.weights[b * size], from, n, first,
                                      &gradient.dout[head], shape.dim, dv_sums.data());
                    add_outer<kBlock>(&gradient.dscores[b * size], from, n, first,
                                      &gradient.q[head], shape.dim, dk_sums.data());
                }
            }
            for (int64_t key = first; key < last; ++key) {
                narrow(&dk_sums[(key - first) * shape.dim], shape.dim, dk.at(key, g));
                narrow(&dv_sums[(key - first) * shape.dim], shape.dim, dv.at(key, g));
            }
        }
    });
}

// Calls body<heads a block, element type>.
#define DSA_DISPATCH(body, group, like, ...)                                 \
    do {                                                                     \
        const bool wide = (like).scalar_type() == ScalarType::Float;         \
        if ((group) == 1) {                                                  \
            wide ? body<1, float>(__VA_ARGS__) : body<1, bf16>(__VA_ARGS__); \
        } else if ((group) == 2) {                                           \
            wide ? body<2, float>(__VA_ARGS__) : body<2, bf16>(__VA_ARGS__); \
        } else {                                                             \
            wide ? body<4, float>(__VA_ARGS__) : body<4, bf16>(__VA_ARGS__); \
        }                                                                    \
    } while (0)

std::tuple<Tensor, Tensor> sparse_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& indices, const Tensor& cu_seqlens_q,
                                            const Tensor& cu_seqlens_k, double softmax_scale,
                                            bool) {
    const Shape3 shape(q, k);
    Tensor out = empty_like_device(q, {shape.tokens, shape.heads, shape.dim}, q.scalar_type());
    Tensor lse = empty_like_device(q, {shape.tokens, shape.heads}, ScalarType::Float);
    const Selection selection(indices, cu_seqlens_q, cu_seqlens_k, shape.keys);
    DSA_DISPATCH(forward, shape.group, q, q, k, v, selection, float(softmax_scale), out,
                 mutable_data<float>(lse));
    return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> sparse_attention_bwd(
    const Tensor& dout, std::optional<Tensor> dlse, const Tensor& q, const Tensor& k,
    const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& indices,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double softmax_scale, bool) {
    const Shape3 shape(q, k);
    const Shape kv{shape.keys, shape.groups, shape.dim};
    Tensor dq = empty_like_device(q, {shape.tokens, shape.heads, shape.dim}, q.scalar_type());
    Tensor dk = empty_like_device(q, kv, q.scalar_type());
    Tensor dv = empty_like_device(q, kv, q.scalar_type());
    const Selection selection(indices, cu_seqlens_q, cu_seqlens_k, shape.keys);
    DSA_DISPATCH(backward, shape.group, q, dout, dlse ? data<float>(*dlse) : nullptr, q, k, v, out,
                 data<float>(lse), selection, float(softmax_scale), dq, dk, dv);
    return {dq, dk, dv};
}

DSA_REGISTER_CPU(m) {
    m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
    m.impl("sparse_attention_bwd", TORCH_BOX(&sparse_attention_bwd));
}

}  // namespace dsa::DSA_ISA
