// indexer_topk on Hopper: what both of its kernels share. A token of a block has a place in the
// workspace, either for a list of candidates (lists.cuh) or for all of its scores (rows.cuh).
#pragma once

#include "common/candidates.cuh"
#include "common/indexer_tile.cuh"
#include "indexer_topk/params.h"

namespace dsa {

constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kLargestCapacity = 8192;  // of a list

// Where the list of token t begins in the workspace.
template <class Shape>
__device__ uint32_t list_begin(const IndexerTopkParams& p, int t) {
    return (blockIdx.x * Shape::kTokens + t) * p.capacity;
}

template <class Shape>
__device__ Candidate* list_of(const IndexerTopkParams& p, int t) {
    return p.candidates + list_begin<Shape>(p, t);
}

// In place of the list of token t: p.room scores.
template <class Shape>
__device__ float* row_of(const IndexerTopkParams& p, int t) {
    return reinterpret_cast<float*>(list_of<Shape>(p, t));
}

__device__ __forceinline__ int32_t* indices_of(const IndexerTopkParams& p, int token) {
    return p.indices + static_cast<int64_t>(token) * p.topk;
}

// The scorers write the indices of the block's tokens that see at most topk keys: all of these.
template <class Shape>
__device__ void take_all_keys(const IndexerTopkParams& p, int first_token, uint32_t scored,
                              const auto& visible_of) {
    for (int t = 0; t < Shape::kTokens && first_token + t < p.tokens; ++t) {
        if (scored >> t & 1) continue;
        int32_t* row = indices_of(p, first_token + t);
        const int visible = visible_of(t);
#pragma unroll 1
        for (int i = threadIdx.x; i < p.topk; i += kScoreThreads) row[i] = i < visible ? i : -1;
    }
}

// Of the tokens that a lane scores: which take part, and how many keys they see.
template <class Shape>
struct OwnTokens {
    static constexpr int kOwn = Shape::kLaneTokens;
    int first;
    int seen[kOwn];  // 0 if the token takes no part, or is another lane's

    // `block` tells of all tokens of the block, `tokens` has a bit for each that takes part.
    __device__ OwnTokens(const LaneToken* block, int quad, uint32_t tokens)
        : first(Shape::token(quad, 0)) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
            const bool mine = tokens >> (first + a) & 1 && quad % Shape::kLanesPerToken == 0;
            seen[a] = mine ? block[first + a].visible : 0;
        }
    }
};

__device__ __forceinline__ ThreadGroup<32> this_warp() {
    return {static_cast<int>(threadIdx.x % 32), 0};
}

}  // namespace dsa
