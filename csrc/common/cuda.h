// What every csrc/<room>/sm90.cu starts from: tensors of the stable ABI, the current stream, launch
// errors.
//
// Only the launch functions of a .cu file see torch types; kernels take a POD Params struct
// (csrc/<room>/params.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace dsa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(const Tensor& like) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

constexpr int kMostSharedBytes = 227 << 10;  // of shared memory that a block of sm_90 can have

// Lets a kernel take `bytes` of dynamic shared memory.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
    STD_TORCH_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         bytes) == cudaSuccess,
                    "no ", bytes, " bytes of shared memory");
}

// Lets a kernel run in clusters of 16 blocks; 8 is what every GPU of the kind can do.
template <class Kernel>
void allow_large_clusters(Kernel* kernel) {
    STD_TORCH_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed,
                                         1) == cudaSuccess,
                    "no clusters of 16 blocks");
}

// How many clusters of `cluster` blocks run at the same time.
template <class Kernel>
int active_clusters(Kernel* kernel, int threads, int shared_bytes, int cluster) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = cluster;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    int count = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    STD_TORCH_CHECK(error == cudaSuccess,
                    "cudaOccupancyMaxActiveClusters: ", cudaGetErrorString(error));
    return count;
}

// Launches kernel(arguments...) in clusters of `cluster` blocks, so that it may start while the
// kernel before it in the stream ends; it must wait for that one before it reads or writes.
template <class... Arguments>
void launch_after(cudaStream_t stream, void (*kernel)(Arguments...), int blocks, int threads,
                  int shared_bytes, int cluster, const Arguments&... arguments) {
    cudaLaunchAttribute attributes[2]{};
    attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[0].val.programmaticStreamSerializationAllowed = 1;
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = blocks;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
    STD_TORCH_CHECK(error == cudaSuccess, "cudaLaunchKernelEx: ", cudaGetErrorString(error));
}

inline int num_multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

}  // namespace dsa
