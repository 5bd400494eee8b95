// The launch of indexer_logits, for indexer_topk too.
#pragma once

#include <cuda.h>

#include "common/cuda.h"
#include "indexer_logits/params.h"

namespace dsa {

// Scores into p.out; sets how the keys are split.
void launch_indexer_logits(IndexerLogitsParams& p, const CUtensorMap& map, int64_t heads,
                           int64_t dim, bool paged, cudaStream_t stream);

}  // namespace dsa
