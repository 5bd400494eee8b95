// sparse_decode on the CPU: one work item per (token, KV group), online softmax over blocks of 64
// gathered rows.
//
// The heads of the group are the lanes: S^T [64 keys, heads], O^T [D, heads]. A row that the
// group's heads share is gathered and widened once; empty entries leave a row out, so nothing that
// the cache holds there is read. Bound by the gather: 512 bytes a selected token and KV group.
#include "common/cpu.h"

#include "common/attention_tile.h"

namespace dsa::DSA_ISA {

namespace {

constexpr int64_t kPage = 64, kBlock = 64;

// The request of a token: the one before the first boundary above it; -1 if there is none.
int64_t request_of(int64_t token, const int32_t* boundaries, int64_t requests) {
    for (int64_t b = 0; b <= requests; ++b)
        if (boundaries[b] > token) return b - 1;
    return -1;
}

// Where an entry's token lies in the cache.
struct Selection {
    const int32_t *indices, *pages;
    int64_t count, length, max_pages, num_pages;

    // Cache slots of the valid entries from `entry` on, at most kBlock; advances `entry`.
    int64_t next_block(int64_t* entry, int64_t* slots) const {
        int64_t n = 0;
        for (; *entry < count && n < kBlock; ++*entry) {
            const int64_t position = indices[*entry];
            if (position < 0 || position >= length || position / kPage >= max_pages) continue;
            if (*entry > 0 && indices[*entry - 1] == position) continue;
            const int64_t page = pages[position / kPage];
            if (page >= 0 && page < num_pages) slots[n++] = page * kPage + position % kPage;
        }
        return n;
    }
};

struct Cache {
    const void* base;
    int64_t page_stride, slot_stride;

    template <typename T>
    const T* row(int64_t slot) const {
        return static_cast<const T*>(base) + slot / kPage * page_stride +
               slot % kPage * slot_stride;
    }
};

template <typename T>
struct Decode {
    int64_t group, dim, n;
    std::vector<float> queries, out, scores, keys, values, highest, total;

    Decode(int64_t group, int64_t dim)
        : group(group),
          dim(dim),
          n(round_up(group, kLanes)),
          queries(dim * n),
          out(dim * n),
          scores(kBlock * n),
          keys(kBlock * dim),
          values(kBlock * dim),
          highest(n),
          total(n) {}

    void run(const T* q, const Cache& k_cache, const Cache& v_cache, int64_t head,
             const Selection& selection, float scale, T* result, float* lse) {
        std::fill(queries.begin(), queries.end(), 0.0f);
        std::fill(out.begin(), out.end(), 0.0f);
        std::fill(highest.begin(), highest.end(), -kInf);
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t h = 0; h < group; ++h)
            for (int64_t d = 0; d < dim; ++d) queries[d * n + h] = to_float(q[h * dim + d]) * scale;
        int64_t slots[kBlock], ahead[kBlock], entry = 0;
        int64_t count = selection.next_block(&entry, slots);
        while (count > 0) {
            const int64_t padded = round_up(count, kTileRows);
            const int64_t following = selection.next_block(&entry, ahead);
            for (int64_t j = 0; j < count; ++j) {
                if (j < following) {  // the next block's rows come from memory meanwhile
                    for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) {
                        __builtin_prefetch(k_cache.row<T>(ahead[j]) + head * dim + d);
                        __builtin_prefetch(v_cache.row<T>(ahead[j]) + head * dim + d);
                    }
                }
                widen(k_cache.row<T>(slots[j]) + head * dim, dim, &keys[j * dim]);
                widen(v_cache.row<T>(slots[j]) + head * dim, dim, &values[j * dim]);
            }
            std::fill(keys.begin() + count * dim, keys.begin() + padded * dim, 0.0f);
            gemm_tile(padded, n, dim, {keys.data(), dim, 1}, queries.data(), n, scores.data(), n,
                      false);
            for (int64_t c = 0; c < n; c += kLanes)
                online_softmax(&scores[c], count, n, &highest[c], &total[c], &out[c], dim);
            gemm_tile(dim, n, count, {values.data(), 1, dim}, scores.data(), n, out.data(), n,
                      true);
            std::memcpy(slots, ahead, sizeof slots);
            count = following;
        }
        for (int64_t h = 0; h < group; ++h) {
            const float factor = total[h] == 0.0f ? 0.0f : 1.0f / total[h];
            for (int64_t d = 0; d < dim; ++d)
                from_float(out[d * n + h] * factor, result + h * dim + d);
            lse[h] = total[h] == 0.0f ? -kInf : highest[h] + std::log(total[h]);
        }
    }
};

template <typename T>
void decode(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& indices,
            const Tensor& page_table, const Tensor& lengths, const Tensor& cu_q, float scale,
            const Tensor& out, const Tensor& lse) {
    const int64_t heads = q.sizes()[1], dim = q.sizes()[2], kv_heads = k_cache.sizes()[2];
    const int64_t group = heads / kv_heads, requests = lengths.sizes()[0];
    const Cache keys{k_cache.data_ptr(), k_cache.stride(0), k_cache.stride(1)};
    const Cache values{v_cache.data_ptr(), v_cache.stride(0), v_cache.stride(1)};
    parallel_ranges(q.sizes()[0] * kv_heads, 1, [&](int64_t first, int64_t last) {
        Decode<T> work(group, dim);
        for (int64_t i = first; i < last; ++i) {
            const int64_t t = i / kv_heads, g = i % kv_heads;
            const int64_t b = request_of(t, data<int32_t>(cu_q), requests);
            const Selection selection{
                data<int32_t>(indices) + t * indices.stride(0),
                data<int32_t>(page_table) + std::max<int64_t>(b, 0) * page_table.stride(0),
                b < 0 ? 0 : indices.sizes()[1],
                b < 0 ? 0 : data<int32_t>(lengths)[b],
                page_table.sizes()[1],
                k_cache.sizes()[0]};
            const int64_t row = t * heads + g * group;
            work.run(data<T>(q) + t * q.stride(0) + g * group * dim, keys, values, g, selection,
                     scale, mutable_data<T>(out) + row * dim, mutable_data<float>(lse) + row);
        }
    });
}

}  // namespace

std::tuple<Tensor, Tensor> sparse_decode(const Tensor& q, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& indices,
                                         const Tensor& page_table, const Tensor& lengths,
                                         const Tensor& cu_q, double scale) {
    Tensor out = empty_like_device(q, {q.sizes()[0], q.sizes()[1], q.sizes()[2]}, q.scalar_type());
    Tensor lse = empty_like_device(q, {q.sizes()[0], q.sizes()[1]}, ScalarType::Float);
    with_dtype(q, [&]<typename T>(T) {
        decode<T>(q, k_cache, v_cache, indices, page_table, lengths, cu_q, scale, out, lse);
    });
    return {out, lse};
}

DSA_REGISTER_CPU(m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace dsa::DSA_ISA
