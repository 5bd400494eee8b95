// topk_select on Hopper, the launches: exact, deterministic, smallest position first among equals,
// no workspace. Few rows share the GPU in clusters (resident.cuh); of many, short ones have a block
// each that walks over them (bracket.cuh), the others stream through theirs (streamed.cuh).
#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "common/cuda.h"
#include "topk_select/bracket.cuh"
#include "topk_select/launch.h"
#include "topk_select/resident.cuh"
#include "topk_select/streamed.cuh"

namespace dsa {
namespace {

// How a row is shared: by so many blocks, whose threads hold so many vectors in registers.
struct Sharing {
    int blocks;
    int held;
};

// Of a row of `width` columns that begins at any address.
constexpr Slice slice_of(int width, Sharing sharing) {
    return {width + 16 / 2 - 1, sharing.blocks, sharing.held};
}

constexpr int resident_bytes(int width, Sharing sharing) {
    const int keys = 4 * kResidentThreads * slice_of(width, sharing).stride(sharing.held);
    return ResidentStorage::bytes(sharing.blocks, keys);
}

// With more, and what the driver adds, two blocks for each of 64 rows of 131072 would leave L1 28
// KB instead of 60 and take 41 us instead of 32.
static_assert(resident_bytes(131072, {2, kMostHeld<float>}) + 1024 <= 196 << 10);

template <typename T, int kHeld>
void launch_resident(const TopkSelectParams& p, int blocks, cudaStream_t stream) {
    STD_TORCH_CHECK(p.topk <= kMostTopk, "topk: at most ", kMostTopk, ", not ", p.topk);
    auto* kernel = topk_select_resident_kernel<T, kHeld>;
    allow_shared_memory(kernel, kMostSharedBytes);
    allow_large_clusters(kernel);
    launch_after(stream, kernel, p.rows * blocks, kResidentThreads,
                 resident_bytes(p.width, {blocks, kHeld}), blocks, p);
}

// How many rows the GPU holds at a time. (The blocks of a cluster lie in one GPC, and what is left
// of it stays idle.)
int rows_at_once(int width, Sharing sharing) {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, int>, int> known;
    const int bytes = resident_bytes(width, sharing);
    const auto [blocks, held] = sharing;
    const std::lock_guard lock(mutex);
    const auto [entry, is_new] = known.try_emplace({bytes, blocks, held});
    if (is_new) {
        auto* kernel = held > 0 ? topk_select_resident_kernel<float, kMostHeld<float>>
                                : topk_select_resident_kernel<float, 0>;
        allow_shared_memory(kernel, kMostSharedBytes);
        allow_large_clusters(kernel);
        entry->second = active_clusters(kernel, kResidentThreads, bytes, blocks);
    }
    return entry->second;
}

// How a row that is too long for one block is shared: by the fewest blocks that hold it where all
// rows fit at once, with the help of registers if they must; or three times as many rows where two
// blocks share an SM. By one block if it had better stream.
template <typename T>
Sharing sharing_of_long_row(const TopkSelectParams& p) {
    struct Way {
        int held, bytes, turns;
    };
    for (const Way way : {Way{0, kMostSharedBytes, 1}, Way{kMostHeld<T>, kMostSharedBytes, 1},
                          Way{0, kMostSharedBytes / 2, 3}})
        for (int blocks = 2; blocks <= kMostBlocks; blocks *= 2) {
            const Sharing sharing{blocks, way.held};
            if (resident_bytes(p.width, sharing) <= way.bytes &&
                p.rows <= way.turns * rows_at_once(p.width, sharing))
                return sharing;
        }
    return {1, 0};
}

// The blocks that share a row: those that the GPU has to spare.
template <typename T>
Sharing sharing_of_row(const TopkSelectParams& p, bool is_short) {
    Sharing sharing = is_short ? Sharing{1, 0} : sharing_of_long_row<T>(p);
    if (!is_short && sharing.blocks == 1) return sharing;
    while (sharing.blocks < kMostBlocks &&
           int64_t{p.rows} * 2 * sharing.blocks <= num_multiprocessors() &&
           slice_of(p.width, sharing).columns() > 4096)
        sharing.blocks *= 2;
    return sharing;
}

template <typename T>
void launch_bracket(TopkSelectParams& p, cudaStream_t stream) {
    p.words = bracket_words(p.width);
    const auto launch = [&]<int kThreads>() {
        auto* kernel = topk_select_bracket_kernel<T, kThreads>;
        allow_shared_memory(kernel, kMostSharedBytes);
        launch_after(stream, kernel, p.rows, kThreads, bracket_bytes(p.width, p.topk), 1, p);
    };
    // Few threads a row, and more the fewer rows have room on an SM.
    if (p.width <= 8192) {
        launch.template operator()<128>();
    } else if (p.width <= 16384) {
        launch.template operator()<256>();
    } else {
        launch.template operator()<512>();
    }
}

// Sets p's pieces; returns the bytes of shared memory that the list and the ring of a second pass
// need.
template <typename T>
int set_pieces(TopkSelectParams& p, int piece) {
    const int bytes = sizeof(Candidate) * piece;
    const int late = kLateStages * kRoundColumns * sizeof(T);
    p.piece = piece;
    p.front_pieces = (p.topk + piece - 1) / piece;
    p.first_front = kWarps + (late + bytes - 1) / bytes;
    return sizeof(Storage) + (p.first_front + 2 * p.front_pieces) * bytes;
}

// Two blocks an SM, if pieces that hold what should pass let them; better pieces with room to
// spare.
template <typename T>
void launch_streamed(TopkSelectParams& p, cudaStream_t stream) {
    auto* kernel = topk_select_streamed_kernel<T>;
    const int smallest = piece_size(p.width, p.topk, 0.0f);
    const auto fit = [&](int bytes, int least) {
        int piece = piece_size(p.width, p.topk, 4.0f);
        while (piece > least && set_pieces<T>(p, piece) > bytes) piece -= 32;
        return set_pieces<T>(p, piece) <= bytes;
    };
    int bytes = kMostSharedBytes / 2 - 1024;
    if (!fit(bytes, smallest)) {
        bytes = kMostSharedBytes;
        STD_TORCH_CHECK(fit(bytes, kSmallestPiece), "topk: no room for the candidates of ", p.topk);
    }
    const int stage = kRoundColumns * sizeof(T);
    const int fixed = sizeof(Storage) + kWarps * p.piece * sizeof(Candidate);
    p.stages = std::min((bytes - fixed) / stage, kMostStages);
    allow_shared_memory(kernel, kMostSharedBytes);
    launch_after(stream, kernel, p.rows, kThreads, bytes, 1, p);
}

template <typename T>
void launch(TopkSelectParams& p, cudaStream_t stream) {
    constexpr int kMostBracketed = 32768;
    const bool is_short = p.width <= kMostBracketed;
    const Sharing sharing = sharing_of_row<T>(p, is_short);
    if (sharing.held > 0) {
        launch_resident<T, kMostHeld<T>>(p, sharing.blocks, stream);
    } else if (sharing.blocks > 1) {
        launch_resident<T, 0>(p, sharing.blocks, stream);
    } else if (is_short) {
        launch_bracket<T>(p, stream);
    } else {
        launch_streamed<T>(p, stream);
    }
}

}  // namespace

void select_rows(TopkSelectParams& p, ScoreType type, cudaStream_t stream) {
    type == ScoreType::kFloat ? launch<float>(p, stream) : launch<__nv_bfloat16>(p, stream);
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
