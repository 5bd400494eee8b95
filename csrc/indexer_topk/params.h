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
    int32_t front;  // of a list: room for topk, a multiple of 4
    int32_t
        segment;  // candidates that a warp can append to a list between two cuts, a multiple of 4
    int32_t capacity;  // front + a segment for each warp
};

}  // namespace dsa
