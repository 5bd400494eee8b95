// varlen_attention on the CPU: a tile of queries (tokens x heads of a KV group) in the lanes,
// online softmax over blocks of 64 keys.
//
// Everything is kept transposed, S^T [64 keys, rows] and O^T [D, rows], so that the softmax runs
// lane by lane without a horizontal step, its state is one vector per 8 or 16 rows, and both
// products read K and V as they lie. A work item is (tile, KV group): independent of the others, so
// the bits do not depend on the threads. Scratch per thread: about 250 KB at D = 128, in L2.
#include "varlen_attention/cpu_tile.h"

namespace dsa::DSA_ISA {

struct Forward {
    int64_t dim, group, columns;
    std::vector<float> queries, out, scores, keys, values, highest, total, factor;
    std::vector<int32_t> visible;

    Forward(int64_t dim, int64_t group, int64_t columns)
        : dim(dim),
          group(group),
          columns(columns),
          queries(dim * columns),
          out(dim * columns),
          scores(kBlock * columns),
          keys(kBlock * dim),
          values(kBlock * dim),
          highest(columns),
          total(columns),
          factor(columns),
          visible(columns) {}

    // One step of the online softmax over scores [count, n]: they become numerators.
    void softmax(int64_t begin, int64_t count, int64_t n, bool masked) {
        for (int64_t c = 0; c < n; c += kLanes) {
            float* column = scores.data() + c;
            if (masked) {
                VecI limit;
                std::memcpy(&limit, visible.data() + c, sizeof limit);
                for (int64_t j = 0; j < count; ++j) {
                    const VecI position = VecI{} + int32_t(begin + j);
                    const Vec s = load(column + j * n);
                    store(column + j * n, position < limit ? s : splat(-kInf));
                }
            }
            online_softmax(column, count, n, &highest[c], &total[c], &out[c], dim);
        }
    }

    // q, k, v and the results point at the first token of the tile and the sequence's first key,
    // at the group's first head.
    template <typename T>
    void run(const T* q, int64_t q_stride, const T* k, int64_t k_stride, const T* v,
             int64_t v_stride, const Tile& tile, const Mask& mask, float scale, T* result,
             float* lse, int64_t heads) {
        const int64_t rows = tile.count * group, n = round_up(rows, kLanes);
        load_columns(q, q_stride, tile.count, group, dim, n, scale, queries.data());
        std::fill_n(out.begin(), dim * n, 0.0f);
        std::fill_n(highest.begin(), n, -kInf);
        std::fill_n(total.begin(), n, 0.0f);
        std::fill_n(visible.begin(), n, 0);
        for (int64_t r = 0; r < rows; ++r)
            visible[r] = int32_t(mask.keys_of(tile.begin + r / group));
        const int64_t all = mask.keys_of(tile.begin),
                      end = mask.keys_of(tile.begin + tile.count - 1);
        for (int64_t begin = 0; begin < end; begin += kBlock) {
            const int64_t count = std::min(kBlock, end - begin);
            const int64_t padded = round_up(count, kTileRows);
            load_rows(k + begin * k_stride, k_stride, count, 1, dim, padded, keys.data());
            load_rows(v + begin * v_stride, v_stride, count, 1, dim, padded, values.data());
            gemm_tile(padded, n, dim, {keys.data(), dim, 1}, queries.data(), n, scores.data(), n,
                      false);
            softmax(begin, count, n, begin + count > all);
            gemm_tile(dim, n, count, {values.data(), 1, dim}, scores.data(), n, out.data(), n,
                      true);
        }
        for (int64_t r = 0; r < rows; ++r) {
            factor[r] = total[r] == 0.0f ? 0.0f : 1.0f / total[r];
            lse[r / group * heads + r % group] =
                total[r] == 0.0f ? -kInf : highest[r] + std::log(total[r]);
        }
        store_columns(out.data(), n, factor.data(), tile.count, group, dim, result, heads * dim);
    }
};

template <typename T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_q,
             const Tensor& cu_k, bool causal, float scale, const Tensor& out, const Tensor& lse) {
    const int64_t heads = q.sizes()[1], dim = q.sizes()[2], kv_heads = k.sizes()[1];
    const int64_t group = heads / kv_heads, tokens = std::max<int64_t>(kTileLanes / group, 1);
    const auto bounds_q = sequence_bounds(cu_q, q.sizes()[0]),
               bounds_k = sequence_bounds(cu_k, k.sizes()[0]);
    const auto tiles = tiles_of(bounds_q, tokens);
    T* result = mutable_data<T>(out);
    float* lse_out = mutable_data<float>(lse);
    const auto fill_unowned = [&](int64_t begin, int64_t end) {
        std::memset(result + begin * heads * dim, 0, (end - begin) * heads * dim * sizeof(T));
        std::fill(lse_out + begin * heads, lse_out + end * heads, -kInf);
    };
    fill_unowned(0, bounds_q.front());
    fill_unowned(bounds_q.back(), q.sizes()[0]);
    parallel_ranges(tiles.size() * kv_heads, 1, [&](int64_t first, int64_t last) {
        Forward work(dim, group, round_up(tokens * group, kLanes));
        for (int64_t i = first; i < last; ++i) {
            const Tile& tile = tiles[i / kv_heads];
            const int64_t s = tile.sequence, g = i % kv_heads;
            const int64_t row = bounds_q[s] + tile.begin, key = bounds_k[s];
            const int64_t keys = bounds_k[s + 1] - key;
            const Mask mask{causal, keys - (bounds_q[s + 1] - bounds_q[s]), keys};
            work.run(data<T>(q) + row * q.stride(0) + g * group * dim, q.stride(0),
                     data<T>(k) + key * k.stride(0) + g * dim, k.stride(0),
                     data<T>(v) + key * v.stride(0) + g * dim, v.stride(0), tile, mask, scale,
                     result + (row * heads + g * group) * dim, lse_out + row * heads + g * group,
                     heads);
        }
    });
}

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& cu_q, const Tensor& cu_k, bool causal,
                                            double scale, bool deterministic) {
    Tensor out = empty_like_device(q, {q.sizes()[0], q.sizes()[1], q.sizes()[2]}, q.scalar_type());
    Tensor lse = empty_like_device(q, {q.sizes()[0], q.sizes()[1]}, ScalarType::Float);
    with_dtype(q, [&]<typename T>(T) { forward<T>(q, k, v, cu_q, cu_k, causal, scale, out, lse); });
    return {out, lse};
}

DSA_REGISTER_CPU(m) { m.impl("varlen_attention", TORCH_BOX(&varlen_attention)); }

}  // namespace dsa::DSA_ISA
