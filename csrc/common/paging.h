// Pages of 64 tokens: where a token lives in the KV cache [pages, 64, G, D] and in the index cache,
// uint8 [pages, 64 * (Di + 4)]: 64 * Di key bytes, token-major, then 64 float32 scales.
#pragma once

#include "common/cpu.h"

namespace dsa::DSA_ISA {

inline constexpr int64_t kPageSize = 64;

class IndexCache {
  public:
    explicit IndexCache(const Tensor& cache)
        : base_(mutable_data<uint8_t>(cache)),
          pages_(cache.sizes()[0]),
          page_bytes_(cache.stride(0)),
          dim_(cache.sizes()[1] / kPageSize - 4) {}

    int64_t dim() const { return dim_; }
    int64_t pages() const { return pages_; }
    bool holds(int64_t slot) const { return slot >= 0 && slot < pages_ * kPageSize; }
    uint8_t* key(int64_t slot) const { return page(slot) + slot % kPageSize * dim_; }
    uint8_t* scale(int64_t slot) const {
        return page(slot) + kPageSize * dim_ + slot % kPageSize * sizeof(float);
    }
    void write(int64_t slot, const uint8_t* key_bytes, float scale_value) const {
        std::memcpy(key(slot), key_bytes, dim_);
        std::memcpy(scale(slot), &scale_value, sizeof(float));
    }

  private:
    uint8_t* page(int64_t slot) const { return base_ + slot / kPageSize * page_bytes_; }

    uint8_t* base_;
    int64_t pages_, page_bytes_, dim_;
};

}  // namespace dsa::DSA_ISA
