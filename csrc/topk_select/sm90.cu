// topk_select on Hopper, the launches: exact, deterministic, smallest position first among equals,
// no workspace. Few rows and short ones stay in shared memory (resident.cuh), the others stream
// through it (streamed.cuh).
#include <algorithm>

#include "common/cuda.h"
#include "topk_select/launch.h"
#include "topk_select/resident.cuh"
#include "topk_select/streamed.cuh"

namespace dsa {
namespace {

constexpr int kShortColumns = 16384;

// Columns of a block, if a cluster of `blocks` shares a row of so many; begun at any address.
int64_t slice_columns(int64_t width, int blocks) {
    const int64_t columns = width + 16 / 2 - 1;
    return (columns + kSliceColumns * blocks - 1) / (kSliceColumns * blocks) * kSliceColumns;
}

int64_t resident_bytes(int64_t width, int blocks) {
    return sizeof(ResidentStorage) + 4 * slice_columns(width, blocks);
}

// The blocks that share a row in shared memory, 0 if it had better stream: as many as fit, or as
// the GPU has to spare.
int blocks_of_row(const TopkSelectParams& p) {
    const int multiprocessors = num_multiprocessors();
    int blocks = 1;
    while (blocks < kMostBlocks && (resident_bytes(p.width, blocks) > kMostSharedBytes ||
                                    (int64_t{p.rows} * 2 * blocks <= multiprocessors &&
                                     slice_columns(p.width, blocks) > 4096)))
        blocks *= 2;
    const bool fits = resident_bytes(p.width, blocks) <= kMostSharedBytes;
    const bool one_wave = int64_t{p.rows} * blocks <= multiprocessors;
    return fits && (one_wave || p.width <= kShortColumns) ? blocks : 0;
}

template <typename T>
void launch_resident(const TopkSelectParams& p, int blocks, cudaStream_t stream) {
    auto* kernel = topk_select_resident_kernel<T>;
    const int shared = static_cast<int>(resident_bytes(p.width, blocks));
    allow_shared_memory(kernel, kMostSharedBytes);
    allow_large_clusters(kernel);
    launch_after(stream, kernel, p.rows * blocks, kResidentThreads, shared, blocks, p);
}

template <typename T>
void launch_streamed(TopkSelectParams& p, cudaStream_t stream) {
    auto* kernel = topk_select_streamed_kernel<T>;
    p.front_pieces = (p.topk + kPiece - 1) / kPiece;
    const int fixed = sizeof(Storage) + (2 * p.front_pieces + kWarps) * kPiece * 8;
    const int stage = kRoundColumns * sizeof(T);
    const int half = kMostSharedBytes / 2 - 1024;  // two blocks an SM, if that leaves a ring
    const int room = fixed + 2 * stage <= half ? half : kMostSharedBytes;
    p.stages = std::min((room - fixed) / stage, kMostStages);
    STD_TORCH_CHECK(p.stages >= 2, "topk: no room for the candidates of ", p.topk);
    allow_shared_memory(kernel, kMostSharedBytes);
    launch_after(stream, kernel, p.rows, kThreads, fixed + p.stages * stage, 1, p);
}

}  // namespace

void select_rows(TopkSelectParams& p, ScoreType type, cudaStream_t stream) {
    const int blocks = blocks_of_row(p);
    const auto launch = [&]<typename T>() {
        blocks ? launch_resident<T>(p, blocks, stream) : launch_streamed<T>(p, stream);
    };
    if (type == ScoreType::kFloat) {
        launch.template operator()<float>();
    } else {
        launch.template operator()<__nv_bfloat16>();
    }
}

Tensor topk_select(const Tensor& scores, int64_t topk, std::optional<Tensor> starts,
                   std::optional<Tensor> lengths) {
    const int64_t rows = scores.sizes()[0];
    Tensor indices = torch::stable::new_empty(scores, {rows, topk}, ScalarType::Int);
    if (rows == 0) return indices;
    TopkSelectParams params{
        .scores = scores.data_ptr(),
        .starts = starts ? static_cast<const int32_t*>(starts->data_ptr()) : nullptr,
        .lengths = lengths ? static_cast<const int32_t*>(lengths->data_ptr()) : nullptr,
        .indices = static_cast<int32_t*>(indices.data_ptr()),
        .row_stride = scores.stride(0),
        .rows = static_cast<int32_t>(rows),
        .width = static_cast<int32_t>(scores.sizes()[1]),
        .topk = static_cast<int32_t>(topk),
    };
    const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
    const bool is_float = scores.scalar_type() == ScalarType::Float;
    select_rows(params, is_float ? ScoreType::kFloat : ScoreType::kBfloat16,
                current_stream(scores));
    return indices;
}

STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cuda, CUDA, m) {
    m.impl("topk_select", TORCH_BOX(&topk_select));
}

}  // namespace dsa
