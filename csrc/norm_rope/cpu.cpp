// norm_rope and its gradient on the CPU: tokens in parallel, a head at a time.
//
// Half a head is the unit: both halves, the tables and the weight lie in L1 as floats, padded with
// zeros to whole vectors, so any head dim runs the same loops. In the backward each block of kBlock
// tokens sums its weight gradients over heads in float and over tokens in double; the blocks are
// added in order, so the sums do not depend on the number of threads. Bound by memory.
#include "common/cpu.h"

#include "common/simd.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kMaxHalf = 128;

// Half a head, or a row of a table.
struct Half {
    alignas(64) float x[kMaxHalf] = {};
};

template <typename T>
void read(const T* from, int64_t n, Half& to) {
    widen(from, n, to.x);
    std::fill(to.x + n, to.x + round_up(n, kLanes), 0.0f);  // a NaN head may have left NaN here
}

// q or k: its heads, its weight, and where the results go.
template <typename T>
struct Heads {
    Heads(const Tensor& t, const std::optional<Tensor>& weight)
        : x(data<T>(t)),
          heads(t.sizes()[1]),
          token_stride(t.stride(0)),
          head_stride(t.stride(1)),
          half(t.sizes()[2] / 2),
          padded(round_up(half, kLanes)),
          norm(weight.has_value()) {
        if (!norm) return;
        with_dtype(*weight, [&]<typename W>(W) {
            read(data<W>(*weight), half, w1);
            read(data<W>(*weight) + half, half, w2);
        });
    }

    const T* head(int64_t token, int64_t h) const {
        return x + token * token_stride + h * head_stride;
    }
    int64_t row(int64_t token, int64_t h) const { return (token * heads + h) * 2 * half; }

    // Reads a head; with a norm, divides it by its root mean square, whose inverse it returns.
    float read_head(int64_t token, int64_t h, float eps, Half& x1, Half& x2) const {
        read(head(token, h), half, x1);
        read(head(token, h) + half, half, x2);
        if (!norm) return 1.0f;
        const float squares = dot(x1.x, x1.x, padded) + dot(x2.x, x2.x, padded);
        const float inverse = 1.0f / std::sqrt(squares / float(2 * half) + eps);
        for (int64_t i = 0; i < padded; i += kLanes) {
            store(x1.x + i, load(x1.x + i) * splat(inverse));
            store(x2.x + i, load(x2.x + i) * splat(inverse));
        }
        return inverse;
    }

    void forward(int64_t token, const Half& cos, const Half& sin, float eps, T* out) const {
        Half x1, x2;
        for (int64_t h = 0; h < heads; ++h) {
            read_head(token, h, eps, x1, x2);
            for (int64_t i = 0; i < padded; i += kLanes) {
                Vec a = load(x1.x + i), b = load(x2.x + i);
                if (norm) {
                    a = a * load(w1.x + i);
                    b = b * load(w2.x + i);
                }
                const Vec c = load(cos.x + i), s = load(sin.x + i);
                store(x1.x + i, a * c - b * s);
                store(x2.x + i, b * c + a * s);
            }
            narrow(x1.x, half, out + row(token, h));
            narrow(x2.x, half, out + row(token, h) + half);
        }
    }

    // dweight: [2][half] of this block, added to.
    void backward(int64_t token, const T* dout, const Half& cos, const Half& sin, float eps, T* dx,
                  double* dweight) const {
        Half x1, x2, g1, g2, dw1, dw2;
        for (int64_t h = 0; h < heads; ++h) {
            read(dout + row(token, h), half, g1);
            read(dout + row(token, h) + half, half, g2);
            const float inverse = norm ? read_head(token, h, eps, x1, x2) : 1.0f;
            Vec sum{};
            for (int64_t i = 0; i < padded; i += kLanes) {
                const Vec d1 = load(g1.x + i), d2 = load(g2.x + i);
                const Vec c = load(cos.x + i), s = load(sin.x + i);
                Vec a = d1 * c + d2 * s, b = d2 * c - d1 * s;
                if (norm) {
                    store(dw1.x + i, a * load(x1.x + i) + load(dw1.x + i));
                    store(dw2.x + i, b * load(x2.x + i) + load(dw2.x + i));
                    a = a * load(w1.x + i);
                    b = b * load(w2.x + i);
                    sum = sum + a * load(x1.x + i) + b * load(x2.x + i);
                }
                store(g1.x + i, a);
                store(g2.x + i, b);
            }
            if (norm) {
                const Vec mean = splat(reduce_add(sum) / float(2 * half));
                for (int64_t i = 0; i < padded; i += kLanes) {
                    store(g1.x + i, splat(inverse) * (load(g1.x + i) - load(x1.x + i) * mean));
                    store(g2.x + i, splat(inverse) * (load(g2.x + i) - load(x2.x + i) * mean));
                }
            }
            narrow(g1.x, half, dx + row(token, h));
            narrow(g2.x, half, dx + row(token, h) + half);
        }
        for (int64_t i = 0; norm && i < half; ++i) {
            dweight[i] += dw1.x[i];
            dweight[half + i] += dw2.x[i];
        }
    }

    const T* x;
    int64_t heads, token_stride, head_stride, half, padded;
    bool norm;
    Half w1, w2;
};

// The rows of the tables, one token after the other.
struct Tables {
    Tables(const Tensor& c, const Tensor& s)
        : cos_base(data<float>(c)),
          sin_base(data<float>(s)),
          cos_stride(c.stride(0)),
          sin_stride(s.stride(0)),
          half(c.sizes()[1]) {}
    void read_row(int64_t token, Half& cos, Half& sin) const {
        read(cos_base + token * cos_stride, half, cos);
        read(sin_base + token * sin_stride, half, sin);
    }
    const float *cos_base, *sin_base;
    int64_t cos_stride, sin_stride, half;
};

template <typename T>
void forward(const Heads<T>& q, const Heads<T>& k, const Tables& tables, int64_t tokens, float eps,
             T* q_out, T* k_out) {
    parallel_ranges(tokens, 8, [&](int64_t begin, int64_t end) {
        Half cos, sin;
        for (int64_t token = begin; token < end; ++token) {
            tables.read_row(token, cos, sin);
            q.forward(token, cos, sin, eps, q_out);
            k.forward(token, cos, sin, eps, k_out);
        }
    });
}

// The weight gradients come back as [2][D], q's and k's.
template <typename T>
std::vector<double> backward(const Heads<T>& q, const Heads<T>& k, const Tables& tables,
                             int64_t tokens, float eps, const T* dq_out, const T* dk_out, T* dq,
                             T* dk) {
    const int64_t blocks = (tokens + kBlock - 1) / kBlock, width = 4 * tables.half;
    std::vector<double> partial(blocks * width, 0.0), total(width, 0.0);
    parallel(blocks, 1, [&](int64_t block) {
        Half cos, sin;
        double* dweight = &partial[block * width];
        const int64_t end = std::min((block + 1) * kBlock, tokens);
        for (int64_t token = block * kBlock; token < end; ++token) {
            tables.read_row(token, cos, sin);
            q.backward(token, dq_out, cos, sin, eps, dq, dweight);
            k.backward(token, dk_out, cos, sin, eps, dk, dweight + width / 2);
        }
    });
    for (int64_t i = 0; i < blocks * width; ++i) total[i % width] += partial[i];
    return total;
}

Tensor weight_gradient(const Tensor& like, const std::optional<Tensor>& weight,
                       const double* total) {
    if (!weight) return empty_like_device(like, {0}, like.scalar_type());
    const int64_t n = weight->sizes()[0];
    Tensor gradient = empty_like_device(*weight, {n}, weight->scalar_type());
    with_dtype(gradient, [&]<typename T>(T) {
        for (int64_t i = 0; i < n; ++i) from_float(float(total[i]), mutable_data<T>(gradient) + i);
    });
    return gradient;
}

Tensor contiguous_like(const Tensor& x) {
    return empty_like_device(x, {x.sizes()[0], x.sizes()[1], x.sizes()[2]}, x.scalar_type());
}

}  // namespace

std::tuple<Tensor, Tensor> norm_rope(const Tensor& q, const Tensor& k,
                                     std::optional<Tensor> q_weight, std::optional<Tensor> k_weight,
                                     const Tensor& cos, const Tensor& sin, double eps) {
    Tensor q_out = contiguous_like(q), k_out = contiguous_like(k);
    with_dtype(q, [&]<typename T>(T) {
        forward<T>({q, q_weight}, {k, k_weight}, {cos, sin}, q.sizes()[0], float(eps),
                   mutable_data<T>(q_out), mutable_data<T>(k_out));
    });
    return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_rope_bwd(
    const Tensor& dq, const Tensor& dk, const Tensor& q, const Tensor& k,
    std::optional<Tensor> q_weight, std::optional<Tensor> k_weight, const Tensor& cos,
    const Tensor& sin, double eps, bool /*deterministic: always*/) {
    Tensor q_grad = contiguous_like(q), k_grad = contiguous_like(k);
    std::vector<double> total;
    with_dtype(q, [&]<typename T>(T) {
        total =
            backward<T>({q, q_weight}, {k, k_weight}, {cos, sin}, q.sizes()[0], float(eps),
                        data<T>(dq), data<T>(dk), mutable_data<T>(q_grad), mutable_data<T>(k_grad));
    });
    return {q_grad, k_grad, weight_gradient(q, q_weight, total.data()),
            weight_gradient(k, k_weight, total.data() + q.sizes()[2])};
}

DSA_REGISTER_CPU(m) {
    m.impl("norm_rope", TORCH_BOX(&norm_rope));
    m.impl("norm_rope_bwd", TORCH_BOX(&norm_rope_bwd));
}

}  // namespace dsa::DSA_ISA
