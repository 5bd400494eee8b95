// paged_cache on the CPU: one memcpy per row, rows in parallel. Bound by bytes.
//
// A reader finds the request of each packed row by bisection of cu_seqlens and checks what it
// found.
#include "common/cpu.h"

#include "common/paging.h"

namespace dsa::DSA_ISA {

constexpr int64_t kGrainBytes = 1 << 16;  // a thread takes at least this much

inline int64_t rows_per_thread(int64_t row_bytes) {
    return kGrainBytes / std::max<int64_t>(row_bytes, 1) + 1;
}

class Places {
  public:
    Places(const Tensor& page_table, const Tensor& cu_seqlens, int64_t pages)
        : table_(data<int32_t>(page_table)),
          starts_(data<int32_t>(cu_seqlens)),
          batch_(page_table.sizes()[0]),
          stride_(page_table.stride(0)),
          positions_(page_table.sizes()[1] * kPageSize),
          pages_(pages) {}

    // The slot of the token that packed row `row` holds, or -1.
    int64_t slot(int64_t row) const {
        const int32_t* ends = starts_ + 1;
        const int64_t b = std::upper_bound(ends, ends + batch_, row) - ends;
        if (b >= batch_ || row >= ends[b]) return -1;
        const int64_t position = row - starts_[b];
        if (position < 0 || position >= positions_) return -1;
        const int64_t page = table_[b * stride_ + position / kPageSize];
        return page < 0 || page >= pages_ ? -1 : page * kPageSize + position % kPageSize;
    }

  private:
    const int32_t* table_;
    const int32_t* starts_;
    int64_t batch_, stride_, positions_, pages_;
};

// The rows of one KV cache as bytes.
class KvCache {
  public:
    explicit KvCache(const Tensor& cache)
        : base_(mutable_data<uint8_t>(cache)),
          row_bytes_(cache.sizes()[2] * cache.sizes()[3] * element_size(cache)),
          page_bytes_(cache.stride(0) * element_size(cache)) {}

    static int64_t element_size(const Tensor& x) {
        return x.scalar_type() == ScalarType::Float ? 4 : 2;
    }
    int64_t row_bytes() const { return row_bytes_; }
    uint8_t* row(int64_t slot) const {
        return base_ + slot / kPageSize * page_bytes_ + slot % kPageSize * row_bytes_;
    }

  private:
    uint8_t* base_;
    int64_t row_bytes_, page_bytes_;
};

void write_kv_cache(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slots) {
    const KvCache keys(k_cache), values(v_cache);
    const int64_t bytes = keys.row_bytes(), limit = k_cache.sizes()[0] * kPageSize;
    const int64_t k_stride = k.stride(0) * KvCache::element_size(k);
    const int64_t v_stride = v.stride(0) * KvCache::element_size(v);
    const uint8_t *k_rows = data<uint8_t>(k), *v_rows = data<uint8_t>(v);
    const int64_t* slot_of = data<int64_t>(slots);
    parallel(k.sizes()[0], rows_per_thread(2 * bytes), [&](int64_t t) {
        const int64_t slot = slot_of[t];
        if (slot < 0 || slot >= limit) return;
        std::memcpy(keys.row(slot), k_rows + t * k_stride, bytes);
        std::memcpy(values.row(slot), v_rows + t * v_stride, bytes);
    });
}

void write_index_cache(const Tensor& k, const Tensor& k_scale, const Tensor& index_cache,
                       const Tensor& slots) {
    const IndexCache cache(index_cache);
    const uint8_t* rows = data<uint8_t>(k);
    const float* scales = data<float>(k_scale);
    const int64_t* slot_of = data<int64_t>(slots);
    const int64_t stride = k.stride(0);
    parallel(k.sizes()[0], rows_per_thread(cache.dim()), [&](int64_t t) {
        if (cache.holds(slot_of[t])) cache.write(slot_of[t], rows + t * stride, scales[t]);
    });
}

std::tuple<Tensor, Tensor> read_kv_cache(const Tensor& k_cache, const Tensor& v_cache,
                                         const Tensor& page_table, const Tensor& cu_seqlens,
                                         int64_t total) {
    const KvCache keys(k_cache), values(v_cache);
    const Shape shape{total, k_cache.sizes()[2], k_cache.sizes()[3]};
    Tensor k = empty_like_device(k_cache, shape, k_cache.scalar_type());
    Tensor v = empty_like_device(v_cache, shape, v_cache.scalar_type());
    const Places places(page_table, cu_seqlens, k_cache.sizes()[0]);
    const int64_t bytes = keys.row_bytes();
    uint8_t *k_rows = mutable_data<uint8_t>(k), *v_rows = mutable_data<uint8_t>(v);
    parallel(total, rows_per_thread(2 * bytes), [&](int64_t r) {
        const int64_t slot = places.slot(r);
        if (slot < 0) {
            std::memset(k_rows + r * bytes, 0, bytes);
            std::memset(v_rows + r * bytes, 0, bytes);
        } else {
            std::memcpy(k_rows + r * bytes, keys.row(slot), bytes);
            std::memcpy(v_rows + r * bytes, values.row(slot), bytes);
        }
    });
    return {k, v};
}

std::tuple<Tensor, Tensor> read_index_cache(const Tensor& index_cache, const Tensor& page_table,
                                            const Tensor& cu_seqlens, int64_t total) {
    const IndexCache cache(index_cache);
    const int64_t dim = cache.dim();
    Tensor k = empty_like_device(index_cache, {total, dim}, ScalarType::Float8_e4m3fn);
    Tensor k_scale = empty_like_device(index_cache, {total}, ScalarType::Float);
    const Places places(page_table, cu_seqlens, cache.pages());
    uint8_t* rows = mutable_data<uint8_t>(k);
    float* scales = mutable_data<float>(k_scale);
    parallel(total, rows_per_thread(dim), [&](int64_t r) {
        const int64_t slot = places.slot(r);
        if (slot < 0) {
            std::memset(rows + r * dim, 0, dim);
            scales[r] = 0;
        } else {
            std::memcpy(rows + r * dim, cache.key(slot), dim);
            std::memcpy(scales + r, cache.scale(slot), sizeof(float));
        }
    });
    return {k, k_scale};
}

DSA_REGISTER_CPU(m) {
    m.impl("write_kv_cache", TORCH_BOX(&write_kv_cache));
    m.impl("write_index_cache", TORCH_BOX(&write_index_cache));
    m.impl("read_kv_cache", TORCH_BOX(&read_kv_cache));
    m.impl("read_index_cache", TORCH_BOX(&read_index_cache));
}

}  // namespace dsa::DSA_ISA
