// What crosses from the launch of indexer_topk to its kernel.
#pragma once

#include "indexer_logits/params.h"

namespace dsa {

struct Candidate;

struct IndexerTopkParams : IndexerScoreParams {
    int32_t* indices;       // [T, topk]
    Candidate* candidates;  // [blocks of the grid, tokens of a block, capacity]
    int32_t* next_block;    // zero: how many blocks of tokens are taken
    int32_t token_blocks;
    int32_t topk;
    int32_t capacity;  // of a list, a multiple of 4
    int32_t room;      // in place of a list, for all scores of a row
    int32_t front;     // of a list that is cut: room for topk
};

}  // namespace dsa
