// indexer_loss on the CPU, forward and backward, dense and sparse.
//
// A task is a tile of 64 neighbouring tokens (dense) or one token (sparse). It walks over the keys
// in blocks of 32: the block is widened to fp32 and transposed, so that keys lie in the lanes, and
// stays in cache while each token of the tile multiplies it with its H attention and Hi index
// heads. What the softmax of I needs is kept online; no more than one block of scores exists.
//
// Sums have a fixed order whatever the number of threads: a token belongs to one task, and the
// backward adds d index_k into kPartials copies, task i into copy i % kPartials, each copy by one
// thread in task order; the copies are added in order at the end.
//
// Bound by the FMA units: H * D + Hi * Di multiply-adds a token and key, 2 * Hi * Di more in the
// backward. Sparse blocks are packed for one token only, which costs about a third on top.
#include "common/cpu.h"

#include "common/sequence_bounds.h"
#include "common/simd.h"
#include "indexer_loss/panels.h"

namespace dsa::DSA_ISA {
namespace {

constexpr int64_t kTile = 64;      // tokens of a dense task
constexpr int64_t kPartials = 16;  // copies of d index_k, and the threads the backward can use

// One input: rows of heads in fp32 or bf16.
struct Source {
    explicit Source(const Tensor& x)
        : base(x.data_ptr()),
          half(x.scalar_type() == ScalarType::BFloat16),
          row(x.stride(0)),
          head(x.dim() == 3 ? x.stride(1) : 0) {}

    // heads x depth values of row r, as fp32.
    void widen(int64_t r, int64_t heads, int64_t depth, float* out) const {
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t offset = r * row + h * head;
            for (int64_t d = 0; d < depth; d += kLanes)
                store(out + h * depth + d,
                      half ? load(static_cast<const bf16*>(base) + offset + d)
                           : load(static_cast<const float*>(base) + offset + d));
        }
    }

    // [depth][kBlock] of head h of the given rows.
    void pack(const int64_t* rows, int64_t n, int64_t h, int64_t depth, float* out) const {
        if (half)
            pack_transposed(static_cast<const bf16*>(base) + h * head, row, rows, n, depth, out);
        else
            pack_transposed(static_cast<const float*>(base) + h * head, row, rows, n, depth, out);
    }

    const void* base;
    bool half;
    int64_t row, head;
};

struct Inputs {
    Inputs(const Tensor& iq, const Tensor& ik, const Tensor& iw, const Tensor& aq, const Tensor& ak,
           const Tensor& normaliser, const std::optional<Tensor>& selected, double softmax_scale)
        : index_q(iq),
          index_k(ik),
          q(aq),
          k(ak),
          weights(data<float>(iw)),
          lse(data<float>(normaliser)),
          sparse(selected.has_value()),
          indices(selected ? data<int32_t>(*selected) : nullptr),
          weights_row(iw.stride(0)),
          lse_row(normaliser.stride(0)),
          indices_row(selected ? selected->stride(0) : 0),
          topk(selected ? selected->sizes()[1] : 0),
          num_tokens(iq.sizes()[0]),
          num_keys(ik.sizes()[0]),
          index_heads(iq.sizes()[1]),
          index_dim(iq.sizes()[2]),
          heads(aq.sizes()[1]),
          groups(ak.sizes()[1]),
          dim(aq.sizes()[2]),
          scale(static_cast<float>(softmax_scale)) {}

    Source index_q, index_k, q, k;
    const float *weights, *lse;
    bool sparse;
    const int32_t* indices;
    int64_t weights_row, lse_row, indices_row, topk;
    int64_t num_tokens, num_keys, index_heads, index_dim, heads, groups, dim;
    float scale;
};

// `count` tokens from `first`, of a sequence with the keys [key_begin, key_begin + num_keys). The
// i-th token sees the first limit + i of them (dense) or its selected ones (sparse).
struct Task {
    int64_t first, count, key_begin, num_keys, limit;
};

std::vector<Task> make_tasks(const Inputs& in, const Tensor& cu_seqlens_q,
                             const Tensor& cu_seqlens_k) {
    const auto bounds_q = sequence_bounds(cu_seqlens_q, in.num_tokens);
    const auto bounds_k = sequence_bounds(cu_seqlens_k, in.num_keys);
    const int64_t tile = in.sparse ? 1 : kTile;
    std::vector<Task> tasks;
    for (size_t s = 0; s + 1 < bounds_q.size(); ++s) {
        const int64_t q_end = bounds_q[s + 1], k_begin = bounds_k[s];
        const int64_t num_keys = bounds_k[s + 1] - k_begin;
        for (int64_t t = bounds_q[s]; t < q_end; t += tile)
            tasks.push_back(
                {t, std::min(tile, q_end - t), k_begin, num_keys, num_keys - (q_end - t) + 1});
    }
    return tasks;
}

// The buffers of one thread and the arithmetic on one block of keys.
class Worker {
  public:
    explicit Worker(const Inputs& inputs)
        : in(inputs),
          tile(in.sparse ? 1 : kTile),
          index_q(tile * in.index_heads * in.index_dim),
          q(tile * in.heads * in.dim),
          packed_index_k(in.index_dim * kBlock),
          packed_k(in.groups * in.dim * kBlock),
          logits(in.index_heads * kBlock),
          products(in.heads / in.groups * kBlock) {}

    // Calls visit(i, n) for every token i of the task and block of keys with n >= 1 visible ones,
    // the scores and the target's operands in place; end_block() after each block.
    template <typename Visit, typename EndBlock>
    void walk(const Task& task, const Visit& visit, const EndBlock& end_block) {
        for (int64_t i = 0; i < task.count; ++i) {
            in.index_q.widen(task.first + i, in.index_heads, in.index_dim, index_q_of(i));
            in.q.widen(task.first + i, in.heads, in.dim, q.data() + i * in.heads * in.dim);
        }
        if (in.sparse) list_selected(task);
        const int64_t total = in.sparse ? static_cast<int64_t>(selected.size())
                                        : std::min(task.num_keys, task.limit + task.count - 1);
        for (int64_t base = 0; base < total; base += kBlock) {
            num_rows = std::min(kBlock, total - base);
            for (int64_t s = 0; s < num_rows; ++s)
                rows[s] = in.sparse ? selected[base + s] : task.key_begin + base + s;
            in.index_k.pack(rows, num_rows, 0, in.index_dim, packed_index_k.data());
            for (int64_t g = 0; g < in.groups; ++g)
                in.k.pack(rows, num_rows, g, in.dim, packed_k.data() + g * in.dim * kBlock);
            for (int64_t i = 0; i < task.count; ++i) {
                const int64_t n = in.sparse ? num_rows : std::min(num_rows, task.limit + i - base);
                if (n <= 0) continue;
                index_scores(task.first + i, i, n);
                visit(i, n);
            }
            end_block();
        }
    }

    // relu(index_q . index_k) into logits [Hi][kBlock]; I into scores, -inf from n on.
    void index_scores(int64_t t, int64_t i, int64_t n) {
        multiply(index_q_of(i), in.index_dim, 1, in.index_heads, packed_index_k.data(), kBlock,
                 in.index_dim, kBlock, logits.data(), kBlock, false);
        const float* w = in.weights + t * in.weights_row;
        for (int64_t s = 0; s < kBlock; s += kLanes) {
            Vec sum{};
            for (int64_t j = 0; j < in.index_heads; ++j) {
                const Vec active = vmax(load(&logits[j * kBlock + s]), Vec{});
                store(&logits[j * kBlock + s], active);
                sum = active * splat(w[j]) + sum;
            }
            store(scores + s, sum);
        }
        std::fill(scores + n, scores + kBlock, -kInf);
    }

    // p of group g into p, 0 from n on.
    void target(int64_t t, int64_t i, int64_t g, int64_t n) {
        const int64_t heads = in.heads / in.groups;
        multiply(q.data() + (i * in.heads + g * heads) * in.dim, in.dim, 1, heads,
                 packed_k.data() + g * in.dim * kBlock, kBlock, in.dim, kBlock, products.data(),
                 kBlock, false);
        const float* lse = in.lse + t * in.lse_row + g * heads;
        const Vec scale = splat(in.scale), share = splat(1.0f / static_cast<float>(heads));
        for (int64_t s = 0; s < kBlock; s += kLanes) {
            Vec sum{};
            for (int64_t h = 0; h < heads; ++h)
                sum += vexp(load(&products[h * kBlock + s]) * scale - splat(lse[h]));
            store(p + s, sum * share);
        }
        std::fill(p + n, p + kBlock, 0.0f);
    }

    float* index_q_of(int64_t i) { return index_q.data() + i * in.index_heads * in.index_dim; }

    const Inputs& in;
    int64_t tile;
    std::vector<float> index_q, q;                // of the tile's tokens
    std::vector<float> packed_index_k, packed_k;  // [Di][kBlock], [G][D][kBlock]
    std::vector<float> logits, products;
    std::vector<int64_t> selected;
    int64_t rows[kBlock], num_rows = 0;
    float scores[kBlock], p[kBlock];

  private:
    void list_selected(const Task& task) {
        const int32_t* entries = in.indices + task.first * in.indices_row;
        selected.clear();
        for (int64_t i = 0; i < in.topk; ++i)
            if (entries[i] >= 0 && entries[i] < task.num_keys &&
                (i == 0 || entries[i] != entries[i - 1]))
                selected.push_back(task.key_begin + entries[i]);
    }
};

// The sums of one token over its keys.
struct Sums {
    float max = -kInf;
    double total = 0;  // of exp(I - max)
    double mass = 0;   // of p
    double cross = 0;  // of p (log p - I)

    void add(Worker& w, int64_t t, int64_t i, int64_t n) {
        float block_max = max;
        for (int64_t s = 0; s < n; ++s) block_max = std::max(block_max, w.scores[s]);
        if (block_max > max) {
            total *= std::exp(static_cast<double>(max) - block_max);
            max = block_max;
        }
        Vec exps{};
        for (int64_t s = 0; s < kBlock; s += kLanes) exps += vexp(load(w.scores + s) - splat(max));
        total += reduce_add(exps);
        for (int64_t g = 0; g < w.in.groups; ++g) {
            w.target(t, i, g, n);
            Vec p_sum{}, cross_sum{};
            for (int64_t s = 0; s < kBlock; s += kLanes) {
                const Vec p = load(w.p + s);
                p_sum += p;
                cross_sum += p > Vec{} ? p * (vlog(p) - load(w.scores + s)) : Vec{};
            }
            mass += reduce_add(p_sum);
            cross += reduce_add(cross_sum);
        }
    }
};

std::tuple<Tensor, Tensor, Tensor> indexer_loss(
    const Tensor& index_q, const Tensor& index_k, const Tensor& index_weights, const Tensor& q,
    const Tensor& k, const Tensor& lse, std::optional<Tensor> indices, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, double softmax_scale, bool) {
    const Inputs in(index_q, index_k, index_weights, q, k, lse, indices, softmax_scale);
    Tensor loss = zeros_like_device(lse, {in.num_tokens}, ScalarType::Float);
    Tensor index_lse = empty_like_device(lse, {in.num_tokens}, ScalarType::Float);
    Tensor mass = zeros_like_device(lse, {in.num_tokens}, ScalarType::Float);
    float *loss_out = mutable_data<float>(loss), *mass_out = mutable_data<float>(mass);
    float* lse_out = mutable_data<float>(index_lse);
    std::fill(lse_out, lse_out + in.num_tokens, -kInf);

    const std::vector<Task> tasks = make_tasks(in, cu_seqlens_q, cu_seqlens_k);
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
    parallel_ranges(num_tasks, 1, [&](int64_t begin, int64_t end) {
        Worker worker(in);
        std::vector<Sums> sums;
        for (int64_t c = begin; c < end; ++c) {
            // The first and the last in turn: a contiguous share has long and short rows.
            const Task& task = tasks[c % 2 ? num_tasks - 1 - c / 2 : c / 2];
            sums.assign(task.count, Sums());
            worker.walk(
                task, [&](int64_t i, int64_t n) { sums[i].add(worker, task.first + i, i, n); },
                [] {});
            for (int64_t i = 0; i < task.count; ++i) {
                if (sums[i].total == 0) continue;
                const double normaliser = sums[i].max + std::log(sums[i].total);
                lse_out[task.first + i] = static_cast<float>(normaliser);
                mass_out[task.first + i] = static_cast<float>(sums[i].mass);
                loss_out[task.first + i] =
                    static_cast<float>(sums[i].cross + sums[i].mass * normaliser);
            }
        }
    });
    return {loss, index_lse, mass};
}

// The gradients of a task's tokens, and its share of d index_k.
class Backward {
  public:
    explicit Backward(const Inputs& inputs)
        : worker(inputs),
          in(inputs),
          index_rows(kBlock * in.index_dim),
          dlogits(in.index_heads * kBlock),
          d_rows(kBlock * in.index_dim),
          d_q(worker.tile * in.index_heads * in.index_dim),
          d_weights(worker.tile * in.index_heads) {}

    void run(const Task& task, const float* dloss, const float* index_lse, const float* mass,
             float* d_index_k) {
        std::fill(d_q.begin(), d_q.end(), 0.0f);
        std::fill(d_weights.begin(), d_weights.end(), 0.0);
        fresh = true;
        worker.walk(
            task,
            [&](int64_t i, int64_t n) {
                const int64_t t = task.first + i;
                if (fresh) begin_block();
                score_gradients(t, i, n, dloss[t], index_lse[t], mass[t]);
                head_gradients(t, i, n);
            },
            [&] { end_block(d_index_k); });
    }

    Worker worker;

  private:
    void begin_block() {
        fresh = false;
        std::fill(d_rows.begin(), d_rows.end(), 0.0f);
        for (int64_t s = 0; s < worker.num_rows; ++s)
            in.index_k.widen(worker.rows[s], 1, in.index_dim, &index_rows[s * in.index_dim]);
    }

    void end_block(float* d_index_k) {
        if (fresh) return;
        fresh = true;
        for (int64_t s = 0; s < worker.num_rows; ++s) {
            float* out = d_index_k + worker.rows[s] * in.index_dim;
            for (int64_t d = 0; d < in.index_dim; d += kLanes)
                store(out + d, load(out + d) + load(&d_rows[s * in.index_dim + d]));
        }
    }

    // dI = dloss (mass softmax(I) - sum_g p_g)
    void score_gradients(int64_t t, int64_t i, int64_t n, float dloss, float index_lse,
                         float mass) {
        std::fill(d_scores, d_scores + kBlock, 0.0f);
        for (int64_t g = 0; g < in.groups; ++g) {
            worker.target(t, i, g, n);
            for (int64_t s = 0; s < kBlock; s += kLanes)
                store(d_scores + s, load(d_scores + s) - load(worker.p + s));
        }
        for (int64_t s = 0; s < kBlock; s += kLanes) {
            const Vec softmax = vexp(load(worker.scores + s) - splat(index_lse));
            store(d_scores + s, splat(dloss) * (splat(mass) * softmax + load(d_scores + s)));
        }
    }

    void head_gradients(int64_t t, int64_t i, int64_t n) {
        const float* w = in.weights + t * in.weights_row;
        for (int64_t j = 0; j < in.index_heads; ++j) {
            Vec sum{};
            for (int64_t s = 0; s < kBlock; s += kLanes) {
                const Vec active = load(&worker.logits[j * kBlock + s]), d = load(d_scores + s);
                sum += d * active;
                store(&dlogits[j * kBlock + s], active > Vec{} ? d * splat(w[j]) : Vec{});
            }
            d_weights[i * in.index_heads + j] += reduce_add(sum);
        }
        const int64_t depth = in.index_dim;
        multiply(dlogits.data(), kBlock, 1, in.index_heads, index_rows.data(), depth, n, depth,
                 &d_q[i * in.index_heads * depth], depth, true);
        multiply(dlogits.data(), 1, kBlock, n, worker.index_q_of(i), depth, in.index_heads, depth,
                 d_rows.data(), depth, true);
    }

    const Inputs& in;
    std::vector<float> index_rows, dlogits, d_rows;  // [kBlock][Di], [Hi][kBlock], [kBlock][Di]
    float d_scores[kBlock];
    bool fresh = true;

  public:
    std::vector<float> d_q;         // [tile][Hi][Di]
    std::vector<double> d_weights;  // [tile][Hi]
};

void narrow_to(const Tensor& out, int64_t offset, const float* x, int64_t n) {
    with_dtype(out, [&]<typename T>(T) { narrow(x, n, mutable_data<T>(out) + offset); });
}

std::tuple<Tensor, Tensor, Tensor> indexer_loss_bwd(
    const Tensor& dloss, const Tensor& index_q, const Tensor& index_k, const Tensor& index_weights,
    const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& index_lse,
    const Tensor& mass, std::optional<Tensor> indices, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, double softmax_scale, bool) {
    const Inputs in(index_q, index_k, index_weights, q, k, lse, indices, softmax_scale);
    const int64_t token = in.index_heads * in.index_dim, key = in.index_dim;
    Tensor d_index_q = zeros_like_device(index_q, {in.num_tokens, in.index_heads, in.index_dim},
                                         index_q.scalar_type());
    Tensor d_index_k = empty_like_device(index_k, {in.num_keys, key}, index_k.scalar_type());
    Tensor d_weights = zeros_like_device(lse, {in.num_tokens, in.index_heads}, ScalarType::Float);

    const std::vector<Task> tasks = make_tasks(in, cu_seqlens_q, cu_seqlens_k);
    const int64_t num_tasks = static_cast<int64_t>(tasks.size());
    const int64_t copies = std::clamp<int64_t>(num_tasks, 1, kPartials);
    Tensor partials = zeros_like_device(lse, {copies, in.num_keys, key}, ScalarType::Float);
    float* partial = mutable_data<float>(partials);
    parallel_ranges(copies, 1, [&](int64_t begin, int64_t end) {
        Backward backward(in);
        for (int64_t copy = begin; copy < end; ++copy) {
            for (int64_t c = copy; c < num_tasks; c += copies) {
                const Task& task = tasks[c];
                backward.run(task, data<float>(dloss), data<float>(index_lse), data<float>(mass),
                             partial + copy * in.num_keys * key);
                narrow_to(d_index_q, task.first * token, backward.d_q.data(), task.count * token);
                float* out = mutable_data<float>(d_weights) + task.first * in.index_heads;
                for (int64_t i = 0; i < task.count * in.index_heads; ++i)
                    out[i] = static_cast<float>(backward.d_weights[i]);
            }
        }
    });
    parallel(in.num_keys, 64, [&](int64_t r) {
        float* sum = partial + r * key;
        for (int64_t copy = 1; copy < copies; ++copy)
            for (int64_t d = 0; d < key; d += kLanes)
                store(sum + d, load(sum + d) + load(sum + copy * in.num_keys * key + d));
        narrow_to(d_index_k, r * key, sum, key);
    });
    return {d_index_q, d_index_k, d_weights};
}

}  // namespace

DSA_REGISTER_CPU(m) {
    m.impl("indexer_loss", TORCH_BOX(&indexer_loss));
    m.impl("indexer_loss_bwd", TORCH_BOX(&indexer_loss_bwd));
}

}  // namespace dsa::DSA_ISA
