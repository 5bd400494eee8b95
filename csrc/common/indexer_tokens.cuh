// Which keys the tokens of a block see: where a token's sequence begins and ends, and which tokens
// of a block share one.
#pragma once

#include <cstdint>

#include "indexer_logits/params.h"

namespace dsa {

constexpr int kKeys = 64;  // of a product, and of a page
constexpr int kTileKeys = 2 * kKeys;

// The last sequence that begins at or before a token.
__device__ __forceinline__ int sequence_of(const IndexerScoreParams& p, int token) {
    int low = 0;
    for (int high = p.num_sequences; high - low > 1;) {
        const int middle = (low + high) / 2;
        (p.cu_seqlens_q[middle] <= token ? low : high) = middle;
    }
    return low;
}

// A sequence: its tokens, where its keys begin, and how many there are.
struct Sequence {
    int begin;
    int end;
    int first_key;
    int keys;

    __device__ bool holds(int token) const { return begin <= token && token < end; }

    // How many keys a token sees: all up to its own, the last token's key being the last; 0 if it
    // lies outside.
    __device__ int visible(int token, int width) const {
        if (!holds(token)) return 0;
        const int64_t seen = keys - (static_cast<int64_t>(end) - token) + 1;
        return static_cast<int>(max(min(min(seen, int64_t{keys}), int64_t{width}), int64_t{0}));
    }
};

template <bool kPaged>
__device__ __forceinline__ Sequence sequence_at(const IndexerScoreParams& p, int number) {
    if (p.num_sequences == 0) return {0, 0, 0, 0};
    Sequence sequence{p.cu_seqlens_q[number], p.cu_seqlens_q[number + 1], 0, 0};
    if constexpr (kPaged) {
        sequence.keys = min(max(p.key_bounds[number], 0), p.width);
    } else {
        sequence.first_key = min(max(p.key_bounds[number], 0), p.num_keys);
        sequence.keys = min(max(p.key_bounds[number + 1], 0), p.num_keys) - sequence.first_key;
    }
    return sequence;
}

// A token of the block: lane t of every warp knows number t.
struct LaneToken {
    int sequence = 0;
    int first_key = 0;  // of the sequence
    int visible = 0;    // keys

    // Token first_token + t; the last one's sequence is tried first.
    template <class Shape>
    __device__ void find(const IndexerScoreParams& p, int first_token) {
        const int lane = threadIdx.x % 32, token = first_token + lane;
        const bool there = lane < Shape::kTokens && token < p.tokens;
        Sequence found = sequence_at<Shape::kPaged>(p, sequence);
        if (there && !found.holds(token)) {
            sequence = sequence_of(p, token);
            found = sequence_at<Shape::kPaged>(p, sequence);
        }
        first_key = found.first_key;
        visible = there ? found.visible(token, p.width) : 0;
    }
};

// The tokens of the block that share a sequence with the first pending one.
struct TokenRun {
    uint32_t tokens;  // a bit each
    int sequence;
    int first_key;
    int keys;  // the most that one of them sees

    __device__ TokenRun(const LaneToken& own, uint32_t pending) {
        const int first = __ffs(pending) - 1;
        sequence = __shfl_sync(~0u, own.sequence, first);
        first_key = __shfl_sync(~0u, own.first_key, first);
        const bool belongs = pending >> threadIdx.x % 32 & 1 && own.sequence == sequence;
        tokens = __ballot_sync(~0u, belongs);
        keys = __reduce_max_sync(~0u, belongs ? own.visible : 0);
    }
    __device__ int tiles() const { return (keys + kTileKeys - 1) / kTileKeys; }
};

}  // namespace dsa
