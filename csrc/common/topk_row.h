// Exact top-k of one row on the CPU, by (score descending, position ascending), written in
// ascending position. The row arrives in pieces; only candidates are kept.
//
// A score becomes a 32-bit key that sorts as the score does: NaN is 0 (below everything), -inf
// next, -0.0 equals +0.0. Candidates gather in ascending position. When kCandidates * topk of them
// are there, all but the best topk go, and the worst that stays is a bound: a later key that does
// not exceed it can never belong to the set (topk earlier keys are at least as good), so it is not
// kept. A row that is at hand as a whole begins with a bound guessed from a sample, and again
// without one if fewer than topk keys beat it. The k-th largest key is found by counting keys in
// 2048 equal bins between the smallest and the largest; only the bin that holds it is looked at
// again, at most twice.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
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

// A row of n <= topk columns: all of them, -1 in the tail.
inline void select_all(int64_t n, int64_t topk, int32_t* out) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<int32_t>(i);
    std::fill(out + n, out + topk, -1);
}

class TopkRow {
  public:
    // The best min(topk, n) positions of scores[0, n) go to out[0, topk), ascending; -1 fills the
    // tail.
    void select(const float* scores, int64_t n, int64_t topk, int32_t* out) {
        if (n <= topk) return select_all(n, topk, out);
        begin(topk);
        guess_bound(scores, n);
        feed(scores, 0, n);
        if (count_ < topk) {  // fewer than topk beat the guess
            begin(topk);
            feed(scores, 0, n);
        }
        finish(out);
    }

    // The same in pieces: begin, feed for ascending positions base..base+n, finish. At least topk
    // scores must have been fed.
    void begin(int64_t topk) {
        topk_ = topk;
        count_ = 0;
        bounded_ = false;
    }

    void feed(const float* scores, int64_t base, int64_t n) {
        const int64_t capacity = kCandidates * topk_;
        for (int64_t i = 0; i < n;) {
            if (static_cast<int64_t>(keys_.size()) < std::min(capacity, count_ + n - i) + kGroup) {
                keys_.resize(std::min(capacity, count_ + n - i) + kGroup);
                positions_.resize(keys_.size());
            }
            const int64_t stop = std::min(n, i + capacity - count_);
            if (bounded_) {
                keep_better(scores, base, i, stop);
            } else {
                keep_all(scores, base, i, stop);
            }
            i = stop;
            if (count_ == capacity) drop_to_topk(positions_.data());
        }
    }

    void finish(int32_t* out) {
        if (count_ > topk_) {
            drop_to_topk(out);
        } else {
            std::copy_n(positions_.data(), topk_, out);
        }
    }

  private:
    static constexpr int64_t kCandidates = 4;
    static constexpr int64_t kGroup = 4 * kLanes;  // keys that are skipped together
    static constexpr int kBins = 2048;
    static constexpr int64_t kFewestSampled = 256, kMostSampled = 4096;

    // A bound that more than topk keys will beat, so that no other is kept from the start: the key
    // of a sample that four standard deviations more than its share of topk reach. None where that
    // is most of the sample.
    void guess_bound(const float* scores, int64_t n) {
        const int64_t sample = std::clamp(n / 32, kFewestSampled, kMostSampled) / kLanes * kLanes;
        if (n < 2 * sample) return;
        const double expected = static_cast<double>(sample) * topk_ / n;
        const auto rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected)) + 4;
        if (2 * rank > sample) return;
        kept_.resize(std::max<size_t>(kept_.size(), sample));
        const int64_t step = n / (sample / kLanes);
        for (int64_t i = 0; i < sample / kLanes; ++i) {
            const VecU key = order_key(load(scores + i * step));
            std::memcpy(kept_.data() + i * kLanes, &key, sizeof key);
        }
        int64_t ties;
        bound_ = kth_largest(kept_.data(), sample, rank, &ties);
        bounded_ = true;
    }

    void keep_all(const float* scores, int64_t base, int64_t i, int64_t stop) {
        uint32_t* keys = keys_.data() + count_;
        int32_t* positions = positions_.data() + count_;
        count_ += stop - i;
        for (; i + kLanes <= stop; i += kLanes, keys += kLanes, positions += kLanes) {
            const VecU key = order_key(load(scores + i));
            std::memcpy(keys, &key, sizeof key);
            for (int l = 0; l < kLanes; ++l) positions[l] = static_cast<int32_t>(base + i + l);
        }
        for (; i < stop; ++i) {
            *keys++ = order_key(scores[i]);
            *positions++ = static_cast<int32_t>(base + i);
        }
    }

    void keep_better(const float* scores, int64_t base, int64_t i, int64_t stop) {
        const uint32_t bound = bound_;
        uint32_t* keys = keys_.data();
        int32_t* positions = positions_.data();
        int64_t count = count_;
        const auto append = [&](uint32_t key, int64_t position) {
            keys[count] = key;
            positions[count] = static_cast<int32_t>(position);
            count += key > bound;
        };
        for (; i + kGroup <= stop; i += kGroup) {
            uint32_t group[kGroup];
            VecU above{};
            for (int v = 0; v < kGroup; v += kLanes) {
                const VecU key = order_key(load(scores + i + v));
                above |= (VecU)(key > bound);
                std::memcpy(group + v, &key, sizeof key);
            }
            uint64_t words[kLanes / 2], found = 0;
            std::memcpy(words, &above, sizeof words);
            for (uint64_t word : words) found |= word;
            if (found == 0) continue;
            for (int v = 0; v < kGroup; ++v) append(group[v], base + i + v);
        }
        for (; i < stop; ++i) append(order_key(scores[i]), base + i);
        count_ = count;
    }

    // The best topk candidates' positions go to `positions`; they become the candidates.
    void drop_to_topk(int32_t* positions) {
        int64_t ties;  // how many keys equal to the bound belong to the set
        bound_ = kth_largest(keys_.data(), count_, topk_, &ties);
        bounded_ = true;
        const uint32_t bound = bound_;
        uint32_t* keys = keys_.data();
        const int32_t* from = positions_.data();
        for (int64_t i = 0, filled = 0; filled < topk_; ++i) {
            const uint32_t key = keys[i];
            const bool equal = key == bound;
            keys[filled] = key;
            positions[filled] = from[i];
            filled += (key > bound) | (equal & (ties > 0));
            ties -= equal;
        }
        count_ = topk_;
    }

    // Of n keys; `ties` becomes how many of those equal to it are among the k largest.
    uint32_t kth_largest(const uint32_t* keys, int64_t n, int64_t k, int64_t* ties) {
        int32_t histogram[2][kBins];
        for (;;) {
            const auto [low, high] = range(keys, n);
            int shift = 0;
            while ((high - low) >> shift >= kBins) ++shift;
            std::fill(histogram[0], histogram[0] + 2 * kBins, 0);
            int64_t i = 0;
            for (; i + 2 <= n; i += 2) {  // two tables: equal neighbours do not wait for each other
                ++histogram[0][(keys[i] - low) >> shift];
                ++histogram[1][(keys[i + 1] - low) >> shift];
            }
            if (i < n) ++histogram[0][(keys[i] - low) >> shift];
            uint32_t bin = (high - low) >> shift;
            int64_t kept = histogram[0][bin] + histogram[1][bin];
            while (kept < k) {
                k -= kept;
                --bin;
                kept = histogram[0][bin] + histogram[1][bin];
            }
            if (shift == 0) {
                *ties = k;
                return low + bin;
            }
            if (static_cast<int64_t>(kept_.size()) < kept) kept_.resize(kept);
            int64_t m = 0;  // keys may be kept_ itself: m never passes i
            for (int64_t i = 0; m < kept; ++i) {
                kept_[m] = keys[i];
                m += (keys[i] - low) >> shift == bin;
            }
            keys = kept_.data();
            n = kept;
        }
    }

    static std::pair<uint32_t, uint32_t> range(const uint32_t* keys, int64_t n) {
        uint32_t low = keys[0], high = keys[0];
        for (int64_t i = 1; i < n; ++i) {
            low = std::min(low, keys[i]);
            high = std::max(high, keys[i]);
        }
        return {low, high};
    }

    std::vector<uint32_t> keys_, kept_;
    std::vector<int32_t> positions_;
    int64_t topk_ = 0, count_ = 0;
    uint32_t bound_ = 0;
    bool bounded_ = false;
};

}  // namespace dsa::DSA_ISA
