// The launch of indexer_logits, for its own op and for indexer_topk.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "indexer_logits/params.h"

namespace dsa {

// Sets what is left of p and scores the tokens; p has what set_queries and packed_keys or
// paged_keys set, first_token, and where the scores go.
void score_tokens(IndexerLogitsParams& p, const KeyMaps& maps, bool paged, int64_t heads,
                  int64_t dim, cudaStream_t stream);

}  // namespace dsa
