// Exact top-k of one row on the CPU, by (score descending, position ascending), written in
// ascending position.
//
// A score becomes a 32-bit key that sorts as the score does: NaN is 0 (below everything), -inf
// next, -0.0 equals +0.0. A radix select over 11 + 11 + 10 bits finds the k-th largest key; only
// the keys of the bin that holds it are looked at again. One more pass over the row emits what is
// above it, and the first ties.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/simd.h"

namespace dsa::DSA_ISA {

inline uint32_t order_key(float score) {
    if (score != score) return 0;
    score += 0.0f;  // -0.0 + 0.0 is +0.0
    uint32_t bits;
    std::memcpy(&bits, &score, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline VecU order_key(Vec score) {
    const VecU bits = (VecU)(score + Vec{});
    const VecU sign = (VecU)((VecI)bits >> 31);  // all ones where negative
    const VecU key = bits ^ (sign | 0x80000000u);
    return score == score ? key : VecU{};
}

class TopkRow {
  public:
    // The best min(topk, n) positions of scores[0, n) go to out[0, topk), ascending; -1 fills the
    // tail.
    void select(const float* scores, int64_t n, int64_t topk, int32_t* out) {
        if (n <= topk) {
            for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(i);
            std::fill(out + n, out + topk, -1);
            return;
        }
        make_keys(scores, n);
        int64_t ties;  // how many keys equal to the threshold belong to the set
        const uint32_t threshold = kth_largest(n, topk, &ties);
        for (int64_t i = 0, filled = 0; filled < topk; ++i) {
            if (keys_[i] < threshold) continue;
            if (keys_[i] == threshold && ties-- <= 0) continue;
            out[filled++] = static_cast<int32_t>(i);
        }
    }

  private:
    void make_keys(const float* scores, int64_t n) {
        if (static_cast<int64_t>(keys_.size()) < n) keys_.resize(n);
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) {
            const VecU key = order_key(load(scores + i));
            std::memcpy(&keys_[i], &key, sizeof key);
        }
        for (; i < n; ++i) keys_[i] = order_key(scores[i]);
    }

    uint32_t kth_largest(int64_t n, int64_t k, int64_t* ties) {
        const uint32_t* candidates = keys_.data();
        uint32_t prefix = 0;
        for (const auto [shift, bits] : {std::pair{21, 11}, {10, 11}, {0, 10}}) {
            const uint32_t mask = (1u << bits) - 1;
            std::fill(histogram_, histogram_ + mask + 1, 0);
            for (int64_t i = 0; i < n; ++i) ++histogram_[(candidates[i] >> shift) & mask];
            uint32_t bin = mask;
            for (; histogram_[bin] < k; --bin) k -= histogram_[bin];
            prefix |= bin << shift;
            const int64_t kept = histogram_[bin];
            if (shift == 0 || kept == n) continue;
            if (static_cast<int64_t>(kept_.size()) < kept) kept_.resize(kept);
            int64_t m = 0;  // in place from the second round on: m never passes i
            for (int64_t i = 0; m < kept; ++i)
                if (((candidates[i] >> shift) & mask) == bin) kept_[m++] = candidates[i];
            candidates = kept_.data();
            n = kept;
        }
        *ties = k;
        return prefix;
    }

    std::vector<uint32_t> keys_, kept_;
    int64_t histogram_[2048];
};

}  // namespace dsa::DSA_ISA
