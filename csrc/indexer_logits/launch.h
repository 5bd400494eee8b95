// The launch of indexer_logits, for its own op and for indexer_topk.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "indexer_logits/params.h"

namespace dsa {

// Sets what is left of p and scores the tokens; p has what set_queries and packed_keys or
// paged_keys set, first_token or chunk, and where the scores go.
void score_tokens(IndexerLogitsParams& p, const KeyMaps& maps, bool paged, int64_t heads,
                  int64_t dim, cudaStream_t stream);

// Whether the sequences have few tokens each, as when decoding.
inline bool has_few_tokens(const IndexerScoreParams& p) {
    return p.tokens <= int64_t{4} * p.num_sequences;
}

// Scores of so many bytes are a chunk.
constexpr int64_t kChunkBytes = 60 << 20;
constexpr int kMostChunkRows = 32768;

// Writes to `chunks` how the tokens of p from first_token on are dealt out to chunks, and sets
// p.tokens to the first one that did not come to it; returns how many chunks there are at most.
// `chunks` may be null, to know that.
int plan_chunks(ChunkPlanParams& p, int32_t* chunks, int64_t heads, int64_t dim,
                cudaStream_t stream);

}  // namespace dsa
