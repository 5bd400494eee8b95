// What every csrc/<room>/cpu.cpp starts from: tensors of the stable ABI, threads, registration of
// one instruction set.
//
//   #include "common/cpu.h"
//   namespace dsa::DSA_ISA {
//   Tensor my_op(const Tensor& x, int64_t k) { ... }
//   DSA_REGISTER_CPU(m) { m.impl("my_op", TORCH_BOX(&my_op)); }
//   }
//
// Arguments arrive checked (dsa_kernels/<room>/__init__.py): dtypes, shapes and a contiguous last
// dimension hold. Values inside tensors (lengths, indices, page tables) are NOT checked: kernels
// treat what is out of range as empty.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "common/isa.h"
#include "common/simd.h"

#define DSA_STRING_(x) #x
#define DSA_STRING(x) DSA_STRING_(x)

// STABLE_TORCH_LIBRARY_IMPL runs for every instruction set at load; only the chosen one registers.
#define DSA_REGISTER_CPU(m)                                                          \
    static void register_cpu_ops(torch::stable::detail::StableLibrary& m);           \
    STABLE_TORCH_LIBRARY_IMPL(dsa_kernels_cpu, CPU, library) {                       \
        if (!std::strcmp(cpu_isa(), DSA_STRING(DSA_ISA))) register_cpu_ops(library); \
    }                                                                                \
    static void register_cpu_ops(torch::stable::detail::StableLibrary& m)

namespace dsa::DSA_ISA {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

inline Tensor empty_like_device(const Tensor& like, const Shape& shape, ScalarType dtype) {
    return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor zeros_like_device(const Tensor& like, const Shape& shape, ScalarType dtype) {
    return torch::stable::new_zeros(like, shape, dtype);
}

template <typename T>
const T* data(const Tensor& x) {
    return static_cast<const T*>(x.data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& x) {
    return static_cast<T*>(x.data_ptr());
}

// body(float{}) or body(bf16{}), by the dtype of x.
template <typename Body>
auto with_dtype(const Tensor& x, const Body& body) {
    return x.scalar_type() == ScalarType::Float ? body(float{}) : body(bf16{});
}

// body(i) for i in [0, n), in chunks of at least `grain`, on torch's threads.
template <typename Body>
void parallel(int64_t n, int64_t grain, const Body& body) {
    if (n <= 0) return;
    torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) body(i);
    });
}

// body(begin, end): for kernels that keep a scratch buffer per thread.
template <typename Body>
void parallel_ranges(int64_t n, int64_t grain, const Body& body) {
    if (n <= 0) return;
    torch::stable::parallel_for(0, n, std::max<int64_t>(grain, 1), body);
}

}  // namespace dsa::DSA_ISA
