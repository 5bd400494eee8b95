// indexer_topk on Hopper, the launches. Many tokens are scored and selected for by one kernel: with
// a list of candidates each (sm90.cuh), or, if all sequences are short, with all of their scores
// (kept.cuh). Few tokens, as those of a paged cache, leave its blocks without work: there the
// kernels of indexer_logits and topk_select follow each other, for as many tokens at a time as have
// room for their scores in the workspace, a matrix as wide as the longest sequence.
#include <algorithm>
#include <type_traits>

#include "common/indexer_launch.h"
#include "indexer_logits/launch.h"
#include "indexer_topk/kept.cuh"
#include "indexer_topk/sm90.cuh"
#include "topk_select/launch.h"

namespace dsa {
namespace {

constexpr int64_t kWorkspaceBytes = 60 << 20;
constexpr int kFewestKeptHeads = 16;     // with fewer, scores are made faster than selected from
constexpr int kFewestKeptTokens = 4096;  // with fewer, two steps are faster

// Entries of a list, if so many tokens have one at a time.
int32_t list_capacity(int64_t tokens) {
    const int64_t entries = kWorkspaceBytes / (static_cast<int64_t>(sizeof(Candidate)) * tokens);
    return static_cast<int32_t>(std::min<int64_t>(entries, kLargestCapacity) / 4 * 4);
}

template <class Shape>
void launch(IndexerTopkParams& p, const KeyMaps& maps, const Tensor& like, cudaStream_t stream) {
    p.token_blocks = (p.tokens + Shape::kTokens - 1) / Shape::kTokens;
    const int blocks = std::min(p.token_blocks, num_multiprocessors());
    p.capacity = list_capacity(int64_t{Shape::kTokens} * blocks);
    p.room = kept_columns(p.capacity);
    p.front = (p.topk + 3) / 4 * 4;
    STD_TORCH_CHECK(
        p.capacity - p.front >= kSegments * (kFewestRounds * kThreadKeys + kSpareEntries),
        "topk: no room for the candidates of ", p.topk);

    const int64_t entries = int64_t{blocks} * Shape::kTokens * p.capacity;
    Tensor workspace = torch::stable::new_empty(like, {2 * entries + 1}, ScalarType::Int);
    p.candidates = static_cast<Candidate*>(workspace.data_ptr());
    p.next_block = reinterpret_cast<int32_t*>(p.candidates + entries);
    const cudaError_t error = cudaMemsetAsync(p.next_block, 0, sizeof(int32_t), stream);
    STD_TORCH_CHECK(error == cudaSuccess, "cudaMemsetAsync: ", cudaGetErrorString(error));
    const auto run = [&]<class Storage>(std::type_identity<Storage>, auto* kernel, int threads) {
        constexpr int kStorageBytes = sizeof(Storage) + 1024;  // it begins on so many
        static_assert(kStorageBytes <= kMostSharedBytes);
        allow_shared_memory(kernel, kStorageBytes);
        kernel<<<blocks, threads, kStorageBytes, stream>>>(maps, p);
        check_launch("indexer_topk");
    };
    if constexpr (Shape::kHeads >= kFewestKeptHeads) {
        using Kept = IndexerShape<Shape::kHeads, Shape::kDim, false, Division::kByKeysAhead>;
        if (p.width <= p.room)
            return run(std::type_identity<KeptStorage<Kept>>{}, indexer_topk_kept_kernel<Kept>,
                       kKeptThreads);
    }
    run(std::type_identity<TopkStorage<Shape>>{}, indexer_topk_kernel<Shape>, kIndexerThreads);
}

// How many tokens' scores have room in the workspace.
int64_t tokens_with_room(const IndexerTopkParams& p) {
    return kWorkspaceBytes / (sizeof(float) * (int64_t{p.width} + 1));
}

// Whether two steps are faster than one. One that keeps all scores only loses for few tokens; else
// the shorter of two times in us, as an H200 takes them (16 x 64, 32 and 64 x 128), if the
// sequences are as long as they may be: a score and its share of a selection for each pair, and a
// pair of launches for each matrix; or waves of blocks that walk the keys and select for their
// tokens.
bool in_two_steps(const IndexerTopkParams& p, int64_t heads) {
    if (tokens_with_room(p) == 0) return false;
    const int64_t block = heads <= 16 ? 8 : 128 / heads, wave = num_multiprocessors() * block;
    const int room = kept_columns(list_capacity(wave));
    if (heads >= kFewestKeptHeads && p.width <= room) return p.tokens < kFewestKeptTokens;
    const double waves = static_cast<double>((p.tokens + wave - 1) / wave);
    const double keys = std::max(p.num_keys, 1), with_keys = std::min<double>(p.tokens, keys);
    const double visible = p.width * (1 - with_keys / (2 * keys));  // of a token
    const double matrices = static_cast<double>(p.tokens / tokens_with_room(p) + 1);
    const double two_steps = (2.3e-6 + 2.8e-5 / block) * p.tokens * visible + 7 * matrices;
    double of_wave = 55 + 3.1e-3 * visible;
    if (visible <= room) of_wave = 4.5 + 4.6e-3 * visible + 3.5e-3 * std::max(visible - 8192, 0.0);
    return two_steps < 27 + waves * of_wave;
}

void score_then_select(const IndexerTopkParams& p, const KeyMaps& maps, bool paged, const Tensor& q,
                       cudaStream_t stream) {
    const int64_t room = tokens_with_room(p);
    STD_TORCH_CHECK(room > 0, "max_seqlen_k: no room for the scores of ", p.width, " keys");
    const int64_t at_once = std::min<int64_t>(room, p.tokens);
    Tensor scores = torch::stable::new_empty(q, {at_once, p.width}, ScalarType::Float);
    Tensor visible = torch::stable::new_empty(q, {at_once}, ScalarType::Int);
    IndexerLogitsParams score{p};
    score.out = static_cast<float*>(scores.data_ptr());
    score.out_stride = p.width;
    score.visible = static_cast<int32_t*>(visible.data_ptr());
    score.unscored = p.topk;
    TopkSelectParams choose{
        .scores = scores.data_ptr(),
        .lengths = score.visible,
        .row_stride = p.width,
        .width = p.width,
        .topk = p.topk,
    };
    for (int64_t first = 0; first < p.tokens; first += choose.rows) {
        const int64_t rest = p.tokens - first;
        const bool leaves_few = at_once < rest && rest < at_once * 5 / 4;
        choose.rows = static_cast<int32_t>(leaves_few ? (rest + 1) / 2 : std::min(at_once, rest));
        choose.indices = p.indices + first * p.topk;
        score.first_token = static_cast<int32_t>(first);
        score.tokens = score.first_token + choose.rows;
        score_tokens(score, maps, paged, q.sizes()[1], q.sizes()[2], stream);
        select_rows(choose, ScoreType::kFloat, stream);
    }
}

Tensor select(IndexerTopkParams& p, const KeyMaps& maps, bool paged, const Tensor& q,
              int64_t topk) {
    Tensor indices = torch::stable::new_empty(q, {q.sizes()[0], topk}, ScalarType::Int);
    if (p.tokens == 0) return indices;
    p.indices = static_cast<int32_t*>(indices.data_ptr());
    p.topk = static_cast<int32_t>(topk);
    const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
    const cudaStream_t stream = current_stream(q);
    const auto in_one_step = [&]<class Shape>() { launch<Shape>(p, maps, q, stream); };
    if (paged || in_two_steps(p, q.sizes()[1])) {
        score_then_select(p, maps, paged, q, stream);
    } else {
        with_indexer_shape<false, Division::kByKeys>(q.sizes()[1], q.sizes()[2], in_one_step);
    }
    return indices;
}

}  // namespace

Tensor indexer_topk(const Tensor& q, const Tensor& weights, const Tensor& k, const Tensor& k_scale,
                    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t topk,
                    int64_t max_seqlen_k) {
    IndexerTopkParams p{};
    set_queries(p, q, weights, cu_seqlens_q);
    const KeyMaps maps = packed_keys(p, k, k_scale, cu_seqlens_k, max_seqlen_k);
    return select(p, maps, false, q, topk);
}

Tensor indexer_topk_paged(const Tensor& q, const Tensor& weights, const Tensor& index_cache,
                          const Tensor& page_table, const Tensor& lengths,
                          const Tensor& cu_seqlens_q, int64_t topk) {
    IndexerTopkParams p{};
    set_queries(p, q, weights, cu_seqlens_q);
    const KeyMaps maps = paged_keys(p, index_cache, page_table, lengths, q.sizes()[2]);
    return select(p, maps, true, q, topk);
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("indexer_topk", TORCH_BOX(&indexer_topk));
    m.impl("indexer_topk_paged", TORCH_BOX(&indexer_topk_paged));
}

}  // namespace dsa
