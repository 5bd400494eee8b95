// moe_router and its gradient on the CPU: blocks of kBlock tokens in parallel, a token at a time.
//
// A row of logits (512 bytes for 128 experts) stays in L1: one pass for the maximum and the order
// keys, one for the exponentials, K for the maxima. Each block adds up its probabilities and
// choices on its own; the blocks are added in order, in double, so the sums do not depend on the
// number of threads. Bound by the exponentials and the K maxima.
#include "common/cpu.h"

#include "common/simd.h"
#include "common/topk_row.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kBlock = 64;

// sum over i < n of term(i) in double, in kLanes partial sums; n a multiple of kLanes.
template <typename Term>
double sum_exactly(int64_t n, const Term& term) {
    double partial[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
        for (int lane = 0; lane < kLanes; ++lane) partial[lane] += term(i + lane);
    }
    double sum = 0.0;
    for (const double x : partial) sum += x;
    return sum;
}

// Buffers of one row, padded to whole vectors.
struct Row {
    explicit Row(int64_t num_experts)
        : padded(round_up(num_experts, kLanes)),
          score(padded, -kInf),
          prob(padded),
          dprob(padded) {}

    // score = logits, prob = softmax(logits): all NaN where torch.softmax's are.
    template <typename T>
    void softmax(const T* logits, int64_t n) {
        for (int64_t e = 0; e < n; ++e) score[e] = to_float(logits[e]);
        Vec top = load(&score[0]);
        VecI nan{};
        for (int64_t e = 0; e < padded; e += kLanes) {
            const Vec x = load(&score[e]);
            nan |= (VecI)(x != x);
            top = vmax(x, top);
        }
        float largest = reduce_max(top);
        for (int i = 0; i < kLanes; ++i) {
            if (nan[i]) largest = std::numeric_limits<float>::quiet_NaN();
        }
        if (!std::isfinite(largest)) {
            std::fill(prob.begin(), prob.end(), std::numeric_limits<float>::quiet_NaN());
            return;
        }
        for (int64_t e = 0; e < padded; e += kLanes) {
            store(&prob[e], vexp(load(&score[e]) - splat(largest)));
        }
        const float* y = prob.data();
        const Vec total = splat(float(sum_exactly(padded, [&](int64_t e) { return y[e]; })));
        for (int64_t e = 0; e < padded; e += kLanes) store(&prob[e], load(&prob[e]) / total);
    }

    int64_t padded;
    std::vector<float> score, prob, dprob;
};

// The best `topk` of score[0, n), best first, the lower position first among equals. `keys` holds n
// rounded up to whole vectors. Every choice is a branch-free maximum over the row.
void select(const float* score, int64_t n, int64_t topk, int32_t* keys, int32_t* ids) {
    constexpr int32_t kTaken = std::numeric_limits<int32_t>::min();
    for (int64_t e = 0; e < n; e += kLanes) {
        const VecI key =
            (VecI)((order_key(load(score + e)) + 1) ^ 0x80000000u);  // NaN above kTaken
        std::memcpy(keys + e, &key, sizeof key);
    }
    std::fill(keys + n, keys + round_up(n, kLanes), kTaken);
    for (int64_t j = 0; j < topk; ++j) {
        VecI best = VecI{} + kTaken, position{};
        for (int32_t e = 0; e < n; e += kLanes) {
            VecI key;
            std::memcpy(&key, keys + e, sizeof key);
            const VecI better = key > best;
            best = better ? key : best;
            position = better ? VecI{} + e : position;
        }
        int32_t largest = best[0];
        for (int lane = 1; lane < kLanes; ++lane) largest = std::max(largest, best[lane]);
        int32_t first = std::numeric_limits<int32_t>::max();
        for (int lane = 0; lane < kLanes; ++lane) {
            first = std::min(first, best[lane] == largest ? position[lane] + lane : first);
        }
        ids[j] = first;
        keys[first] = kTaken;
    }
}

template <typename T>
void route(const Tensor& logits, int64_t topk, bool normalize, float* weights, int32_t* ids,
           int32_t* counts, float* prob_sum) {
    const int64_t tokens = logits.sizes()[0], n = logits.sizes()[1], stride = logits.stride(0);
    const int64_t blocks = (tokens + kBlock - 1) / kBlock;
    const T* base = data<T>(logits);
    std::vector<float> block_probs(blocks * n, 0.0f);  // [blocks, E]
    std::vector<int32_t> block_counts(blocks * n, 0);  // [blocks, E]
    parallel_ranges(blocks, 1, [&](int64_t begin, int64_t end) {
        Row row(n);
        std::vector<int32_t> keys(row.padded);
        for (int64_t t = begin * kBlock; t < std::min(end * kBlock, tokens); ++t) {
            float* probs = &block_probs[t / kBlock * n];
            row.softmax(base + t * stride, n);
            select(row.score.data(), n, topk, keys.data(), ids + t * topk);
            for (int64_t e = 0; e < n; ++e) probs[e] += row.prob[e];
            float total = 0.0f;
            for (int64_t j = 0; j < topk; ++j) {
                const int32_t expert = ids[t * topk + j];
                ++block_counts[t / kBlock * n + expert];
                weights[t * topk + j] = row.prob[expert];
                total += row.prob[expert];
            }
            for (int64_t j = 0; normalize && j < topk; ++j) weights[t * topk + j] /= total;
        }
    });
    std::vector<double> sums(n, 0.0);
    std::fill(counts, counts + n, 0);
    for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t e = 0; e < n; ++e) {
            sums[e] += block_probs[block * n + e];
            counts[e] += block_counts[block * n + e];
        }
    }
    std::copy(sums.begin(), sums.end(), prob_sum);
}

template <typename T>
void route_bwd(const Tensor& logits, const Tensor& ids, const float* dweights,
               const float* dprob_sum, bool normalize, T* dlogits) {
    const int64_t tokens = logits.sizes()[0], n = logits.sizes()[1], stride = logits.stride(0);
    const int64_t topk = ids.sizes()[1];
    const T* base = data<T>(logits);
    const int32_t* id_base = data<int32_t>(ids);
    parallel_ranges(tokens, 16, [&](int64_t begin, int64_t end) {
        Row row(n);
        for (int64_t t = begin; t < end; ++t) {
            const int32_t* chosen = id_base + t * topk;
            row.softmax(base + t * stride, n);
            std::fill(row.dprob.begin(), row.dprob.end(), 0.0f);
            if (dprob_sum) std::copy(dprob_sum, dprob_sum + n, row.dprob.begin());
            const auto in_range = [&](int64_t j) { return chosen[j] >= 0 && chosen[j] < n; };
            double total = 1.0, mean = 0.0;
            if (normalize) {
                total = 0.0;
                for (int64_t j = 0; j < topk; ++j) {
                    if (!in_range(j)) continue;
                    total += row.prob[chosen[j]];
                    mean += double(row.prob[chosen[j]]) * dweights[t * topk + j];
                }
                mean /= total;
            }
            for (int64_t j = 0; j < topk; ++j) {
                if (in_range(j)) row.dprob[chosen[j]] += (dweights[t * topk + j] - mean) / total;
            }
            const float *p = row.prob.data(), *dp = row.dprob.data();
            const Vec dot_product = splat(
                float(sum_exactly(row.padded, [&](int64_t e) { return double(p[e]) * dp[e]; })));
            for (int64_t e = 0; e < row.padded; e += kLanes) {
                store(&row.dprob[e], load(&row.prob[e]) * (load(&row.dprob[e]) - dot_product));
            }
            for (int64_t e = 0; e < n; ++e) from_float(row.dprob[e], dlogits + t * n + e);
        }
    });
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_router(const Tensor& logits, int64_t topk,
                                                      bool normalize) {
    const int64_t tokens = logits.sizes()[0], num_experts = logits.sizes()[1];
    Tensor weights = empty_like_device(logits, {tokens, topk}, ScalarType::Float);
    Tensor ids = empty_like_device(logits, {tokens, topk}, ScalarType::Int);
    Tensor counts = empty_like_device(logits, {num_experts}, ScalarType::Int);
    Tensor prob_sum = empty_like_device(logits, {num_experts}, ScalarType::Float);
    with_dtype(logits, [&]<typename T>(T) {
        route<T>(logits, topk, normalize, mutable_data<float>(weights), mutable_data<int32_t>(ids),
                 mutable_data<int32_t>(counts), mutable_data<float>(prob_sum));
    });
    return {weights, ids, counts, prob_sum};
}

Tensor moe_router_bwd(const Tensor& dweights, std::optional<Tensor> dprob_sum, const Tensor& logits,
                      const Tensor& ids, bool normalize) {
    const Shape shape{logits.sizes()[0], logits.sizes()[1]};
    Tensor dlogits = empty_like_device(logits, shape, logits.scalar_type());
    const float* dw = data<float>(dweights);
    const float* dp = dprob_sum ? data<float>(*dprob_sum) : nullptr;
    with_dtype(logits, [&]<typename T>(T) {
        route_bwd<T>(logits, ids, dw, dp, normalize, mutable_data<T>(dlogits));
    });
    return dlogits;
}

DSA_REGISTER_CPU(m) {
    m.impl("moe_router", TORCH_BOX(&moe_router));
    m.impl("moe_router_bwd", TORCH_BOX(&moe_router_bwd));
}

}  // namespace dsa::DSA_ISA
