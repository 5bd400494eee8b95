// What crosses from the launch of indexer_topk to its kernel.
#pragma once

#include "indexer_logits/params.h"

namespace dsa {

struct IndexerTopkParams : IndexerScoreParams {
    int32_t* indices;  // [T, topk]
    uint32_t* keys;    // [blocks of the grid, tokens of a block, capacity]: candidates of a token,
    int32_t* positions;   // and where they lie
    int32_t* next_block;  // zero: how many blocks of tokens are taken
    int32_t token_blocks;
    int32_t topk;
    int32_t segment;   // candidates that a warp can append to a token's list between two cuts
    int32_t capacity;  // topk + a segment for each warp
};

}  // namespace dsa
