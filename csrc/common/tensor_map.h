// Tensor maps for TMA, made on the host. The driver's function is found at run time: no link
// against libcuda.
#pragma once

#include <cuda.h>

#include "common/cuda.h"

namespace dsa {

// A row-major array of `rank` dimensions; sizes and boxes innermost first, strides in bytes from
// the second dimension on. Boxes arrive swizzled; what lies outside is zero.
inline CUtensorMap tensor_map(CUtensorMapDataType type, CUtensorMapSwizzle swizzle,
                              const void* data, int rank, const cuuint64_t* sizes,
                              const cuuint64_t* strides, const cuuint32_t* box) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t error = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        STD_TORCH_CHECK(error == cudaSuccess && found == cudaDriverEntryPointSuccess,
                        "the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(function);
    }();
    CUtensorMap map;
    const cuuint32_t ones[3] = {1, 1, 1};
    const CUresult error =
        encode(&map, type, rank, const_cast<void*>(data), sizes, strides, box, ones,
               CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(error == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int{error});
    return map;
}

// Bytes, 2-D or 3-D, swizzled over box[0] of them, 64 or 128.
inline CUtensorMap byte_tensor_map(const void* data, int rank, const cuuint64_t* sizes,
                                   const cuuint64_t* strides, const cuuint32_t* box) {
    const auto swizzle = box[0] == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    return tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, swizzle, data, rank, sizes, strides, box);
}

// A vector of floats.
inline CUtensorMap float_tensor_map(const void* data, cuuint64_t size, cuuint32_t box) {
    return tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_SWIZZLE_NONE, data, 1, &size,
                      &size, &box);  // no strides
}

}  // namespace dsa
