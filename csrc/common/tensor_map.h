// Tensor maps for TMA, made on the host. The driver's function is found at run time: no link
// against libcuda.
#pragma once

#include <cuda.h>

#include "common/cuda.h"

namespace dsa {

// A row-major array of bytes [.., rows, row_bytes]; `rank` 2 or 3, sizes and boxes innermost first,
// strides in bytes from the second dimension on. Boxes arrive swizzled over box[0] bytes, 64 or
// 128; what lies outside is zero.
inline CUtensorMap byte_tensor_map(const void* data, int rank, const cuuint64_t* sizes,
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
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, rank, const_cast<void*>(data), sizes, strides,
               box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
               box[0] == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(error == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int{error});
    return map;
}

}  // namespace dsa
