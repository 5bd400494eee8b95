// The launch of topk_select, for its own op and for indexer_topk.
#pragma once

#include <cuda_runtime.h>

#include "topk_select/params.h"

namespace dsa {

enum class ScoreType { kFloat, kBfloat16 };

// Sets what is left of p and selects; p has all pointers, row_stride, rows, width and topk.
void select_rows(TopkSelectParams& p, ScoreType type, cudaStream_t stream);

}  // namespace dsa
