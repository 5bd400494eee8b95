// topk_select on the CPU: rows in parallel, one radix select each (common/topk_row.h).
//
// Bound by the row's bytes: the row is read once from memory and its keys (same size, in L2) three
// times.
#include "common/cpu.h"

#include "common/topk_row.h"

namespace dsa::DSA_ISA {

template <typename T>
void select_rows(const Tensor& scores, int64_t topk, const int32_t* starts, const int32_t* lengths,
                 int32_t* out) {
    const int64_t width = scores.sizes()[1], stride = scores.stride(0);
    const T* base = data<T>(scores);
    parallel_ranges(scores.sizes()[0], 1, [&](int64_t begin, int64_t end) {
        TopkRow row;
        std::vector<float> widened;
        for (int64_t r = begin; r < end; ++r) {
            const int64_t start = starts ? std::clamp<int64_t>(starts[r], 0, width) : 0;
            const int64_t n = std::clamp<int64_t>(lengths ? lengths[r] : width, 0, width - start);
            const T* source = base + r * stride + start;
            const float* values;
            if constexpr (std::is_same_v<T, float>) {
                values = source;
            } else {
                widened.resize(n);
                widen(source, n, widened.data());
                values = widened.data();
            }
            row.select(values, n, topk, out + r * topk);
        }
    });
}

Tensor topk_select(const Tensor& scores, int64_t topk, std::optional<Tensor> starts,
                   std::optional<Tensor> lengths) {
    Tensor indices = empty_like_device(scores, {scores.sizes()[0], topk}, ScalarType::Int);
    const int32_t* s = starts ? data<int32_t>(*starts) : nullptr;
    const int32_t* n = lengths ? data<int32_t>(*lengths) : nullptr;
    int32_t* out = mutable_data<int32_t>(indices);
    with_dtype(scores, [&]<typename T>(T) { select_rows<T>(scores, topk, s, n, out); });
    return indices;
}

DSA_REGISTER_CPU(m) { m.impl("topk_select", TORCH_BOX(&topk_select)); }

}  // namespace dsa::DSA_ISA
