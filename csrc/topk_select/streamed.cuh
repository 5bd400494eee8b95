// topk_select of rows of any length and number, each by one block that reads it once.
//
// A block reads its row once: one warp copies rounds of 2048 columns by TMA into a ring in shared
// memory, 8 warps take 256 columns each of a round. What beats the bound goes to the warp's own
// piece of the list of candidates in shared memory: a ballot and a store, no atomics, no meeting of
// the warps. The bound is a guess from 1024 to 4096 columns spread over the row; of 131072 it lets
// about 3600 pass at topk = 2048. If the guess was wrong, or more passed than a piece holds, the
// block goes through the row again with certain bounds and cuts (common/candidates.cuh).
//
// 112 KB of shared memory, 48 of them the ring of a first pass: two blocks an SM, so that one
// streams while the other selects. With a ring of 16 KB half of a block's time was the scan, two
// fifths of that waiting for columns; guess, threshold and writing are the rest, bound by latency.
// Measured on an H200: 227 us for 1024 rows of 131072, of which reading is 125; 807 for 4096.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>

#include "common/candidates.cuh"
#include "common/ring.cuh"
#include "topk_select/row.cuh"

namespace dsa {

constexpr int kScanThreads = 256;
constexpr int kThreads = kScanThreads + 32;  // one warp loads
constexpr int kWarps = kScanThreads / 32;
constexpr int kLaneColumns = 8;  // of a round
constexpr int kWarpColumns = 32 * kLaneColumns;
constexpr uint32_t kRoundColumns = kWarps * kWarpColumns;
constexpr int kBitmapWords = 2048;
constexpr int kMostStages = 8, kLateStages = 2;
constexpr int kFewestSampled = 4096;  // columns of a row
constexpr int kMostSample = 4096;
constexpr int kSmallestPiece = kMostSample / kWarps;  // they hold the sample, too

using Group = ThreadGroup<kScanThreads>;

// How many of n columns tell the guess.
__host__ __device__ constexpr int sample_size(uint32_t n) {
    return n >= 65536 ? kMostSample : n >= 16384 ? 2048 : 1024;
}

// A warp's share of the candidates that should pass, three standard deviations more, as warps
// differ, and `deviations` of the guess, which is one of a sample.
inline int piece_size(int width, int topk, float deviations) {
    const int sample = sample_size(width), rank = sample_rank(sample, topk, width);
    const float passing = static_cast<float>(rank) / sample * width;
    const float share = passing * (1.0f + deviations / std::sqrt(std::max(rank, 1))) / kWarps;
    const int piece = static_cast<int>(share + 3.0f * std::sqrt(share));
    return std::max((piece + 31) / 32 * 32, kSmallestPiece);
}

// The list has a piece for each warp and, after some that do not count, two fronts, which a cut
// fills in turn. The ring begins behind the warps' pieces: in a first pass, which needs no fronts,
// it takes all memory, in a second one only what lies before them.
struct Storage {
    uint32_t bitmap[kBitmapWords];
    SelectScratch scratch;
    uint64_t full[kMostStages + kLateStages];  // of either pass
    uint64_t empty[kMostStages + kLateStages];
    uint64_t settled;  // whether the row has to come again is known
    bool again;
    int counts[64];                 // of each piece
    alignas(16) uint8_t dynamic[];  // the list and the ring
};

// A pass over the row: the stages of its ring, and which mbarriers are theirs.
struct Pass {
    int stages;
    int barriers;
    RingPosition at;

    __device__ int barrier() const { return barriers + at.stage; }
};

template <typename T>
__device__ int rounds(const Row<T>& row) {
    return (row.end + kRoundColumns - 1) / kRoundColumns;
}

// All rounds of the row into the ring, in whole 16-byte pieces: the first and the last hold at
// least one of its columns, and what else they hold is never looked at. By one thread.
template <typename T>
__device__ void load_row(const Row<T>& row, Storage& s, T* ring, Pass pass) {
    constexpr int kVector = 16 / sizeof(T);
    for (int round = 0; round < rounds(row); ++round, pass.at.advance(pass.stages)) {
        const uint32_t first = round * kRoundColumns;
        const uint32_t left = (row.end - first + kVector - 1) / kVector * kVector;
        const uint32_t bytes = sizeof(T) * min(left, kRoundColumns);
        uint64_t* full = &s.full[pass.barrier()];
        mbarrier_wait(&s.empty[pass.barrier()], pass.at.parity ^ 1);
        mbarrier_arrive_expect(full, bytes);
        bulk_load(ring + pass.at.stage * kRoundColumns, row.scores + first, bytes, full, true);
    }
}

// The scanning warps' side.
template <typename T>
struct Scanner {
    static constexpr int kVector = 16 / sizeof(T);
    union Vector {
        uint4 raw;
        T value[kVector];
    };

    const TopkSelectParams& p;
    const Row<T>& row;
    Storage& s;
    const T* ring;
    Candidate* entries;
    Group group{static_cast<int>(threadIdx.x), 1};
    Pass pass{p.stages, 0};
    int count = 0;  // candidates in this warp's piece, those that found no room included
    float bound = NAN;
    Threshold threshold;  // of the set, once a pass has found it

    // Takes this warp's part of a round.
    __device__ void scan(int round) {
        const int in_round = group.warp() * kWarpColumns + group.lane() * kVector;
        const uint32_t first = round * kRoundColumns + in_round - row.begin;  // may wrap around
        const uint32_t below = group.lanes_below();
        const bool edge = round == 0 || round == rounds(row) - 1;
        const uint32_t own = shared_address(entries + group.warp() * p.piece);
        const T* columns = ring + pass.at.stage * kRoundColumns + in_round;
        mbarrier_wait(&s.full[pass.barrier()], pass.at.parity);
        Vector vectors[kLaneColumns / kVector];
#pragma unroll
        for (int j = 0; j < kLaneColumns; j += kVector)
            vectors[j / kVector].raw = *reinterpret_cast<const uint4*>(columns + j * 32);
        fence_proxy_async();  // they are read, not only asked for, before TMA writes there again
        __syncwarp();
        if (group.lane() == 0) mbarrier_arrive(&s.empty[pass.barrier()]);
        pass.at.advance(pass.stages);
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j) {
            const int column = j / kVector * kVector * 32 + j % kVector;
            const float score = static_cast<float>(vectors[j / kVector].value[j % kVector]);
            bool pass = passes(score, bound);
            if (edge) pass = pass && first + column < static_cast<uint32_t>(row.length());
            const uint32_t ballot = __ballot_sync(~0u, pass);
            const int place = count + __popc(ballot & below);
            shared_store(own + place * sizeof(Candidate), score, first + column,
                         pass && place < p.piece);
            count += __popc(ballot);
        }
    }

    // The bound from columns spread over the row; NaN, which all pass, where that makes no sense.
    __device__ float guess() {
        const uint32_t n = row.length();
        if (n < kFewestSampled) return NAN;
        constexpr int kMostVectors = kMostSample / kVector / kScanThreads;
        const int sample = sample_size(n);
        const int rank = sample_rank(sample, p.topk, n);
        if (rank == 0) return NAN;
        const uint32_t first = (row.begin + kVector - 1) / kVector;
        const uint32_t step = (row.end / kVector - first) / (sample / kVector);
        Vector vectors[kMostVectors];
#pragma unroll
        for (int u = 0; u < kMostVectors; ++u) {
            const int i = group.thread + u * kScanThreads;
            if (i < sample / kVector)
                vectors[u].raw = *reinterpret_cast<const uint4*>(
                    row.scores + size_t{first + i * step} * kVector);
        }
#pragma unroll
        for (int u = 0; u < kMostVectors; ++u) {
            const int i = group.thread + u * kScanThreads;
#pragma unroll
            for (int v = 0; i < sample / kVector && v < kVector; ++v)
                entries[i * kVector + v] = {static_cast<float>(vectors[u].value[v]), 0};
        }
        group.sync();
        const float score =
            score_of(find_key(group, s.scratch, dense<Group>(entries, sample), rank).value);
        group.sync();
        return score;
    }

    __device__ auto list() const {
        const auto count = [counts = s.counts](int piece) { return counts[piece]; };
        return CandidateList<decltype(count)>{entries, p.first_front + 2 * p.front_pieces, p.piece,
                                              count};
    }

    // Shows the count of every warp's piece to all; returns the fullest.
    __device__ int publish() {
        group.sync();  // the last counts are read
        if (group.lane() == 0) s.counts[group.warp()] = count;
        group.sync();
        return __reduce_max_sync(~0u, s.counts[group.lane() % kWarps]);
    }

    __device__ int total() const {
        const int pieces = p.first_front + 2 * p.front_pieces;
        int sum = 0;
        for (int piece = group.lane(); piece < pieces; piece += 32) sum += s.counts[piece];
        return __reduce_add_sync(~0u, sum);
    }

    // One pass with a guess. Whether the list holds the set: if it is whole and the set lies above
    // the guess.
    __device__ bool select_by_guess() {
        for (int i = kWarps + group.thread; i < p.first_front + 2 * p.front_pieces;
             i += kScanThreads)
            s.counts[i] = 0;
        bound = guess();
#pragma unroll 1
        for (int round = 0; round < rounds(row); ++round) scan(round);
        if (publish() > p.piece || total() < p.topk) return false;
        threshold = find_threshold(group, s.scratch, list(), p.topk);
        return above_guess(threshold, bound);
    }

    // Another pass: after it the list holds the set.
    __device__ void select_by_cuts() {
        bound = NAN;
        count = 0;
        pass = {kLateStages, kMostStages};
        int turn = 0;
        for (int done = 0, fullest = 0; done < rounds(row);) {
            const int stop = min(rounds(row), done + (p.piece - fullest) / kWarpColumns);
#pragma unroll 1
            for (; done < stop; ++done) scan(done);
            fullest = publish();
            const bool last = done == rounds(row);
            if (!last && p.piece - fullest >= kWarpColumns) continue;
            const int candidates = total();
            threshold = {0, INT_MAX};
            if (candidates >= p.topk) {
                threshold = find_threshold(group, s.scratch, list(), p.topk);
                bound = score_of(threshold.key);
            }
            if (last) return;
            const int front = turn * p.front_pieces;
            keep(group, s.scratch, list(), threshold, entries + (p.first_front + front) * p.piece);
            if (group.thread < 2 * p.front_pieces) {
                const int piece = group.thread - front;
                const int left = min(candidates, p.topk) - piece * p.piece;
                s.counts[p.first_front + group.thread] =
                    piece >= 0 && piece < p.front_pieces ? min(max(left, 0), p.piece) : 0;
            }
            turn ^= 1;
            count = fullest = 0;
        }
    }

    __device__ void write() {
        write_ascending<kBitmapWords>(group, s.scratch, list(), threshold, row.length(), s.bitmap,
                                      row.out);
    }
};

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    topk_select_streamed_kernel(const TopkSelectParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    Storage& s = *reinterpret_cast<Storage*>(shared);
    wait_for_kernels_before();
    const Row<T> row(p, blockIdx.x);
    if (row.take_all(p.topk, threadIdx.x, kThreads)) return;
    Candidate* entries = reinterpret_cast<Candidate*>(s.dynamic);
    T* ring = reinterpret_cast<T*>(entries + kWarps * p.piece);
    if (threadIdx.x < kMostStages + kLateStages) {
        mbarrier_init(&s.full[threadIdx.x], 1);
        mbarrier_init(&s.empty[threadIdx.x], kWarps);
    }
    if (threadIdx.x == 0) mbarrier_init(&s.settled, 1);
    fence_mbarrier_init();
    __syncthreads();
    if (threadIdx.x >= kScanThreads) {
        if (threadIdx.x > kScanThreads) return;
        load_row(row, s, ring, {p.stages, 0});
        mbarrier_wait(&s.settled, 0);
        if (s.again) load_row(row, s, ring, {kLateStages, kMostStages});
    } else {
        Scanner<T> scanner{p, row, s, ring, entries};
        const bool done = scanner.select_by_guess();
        if (threadIdx.x == 0) {
            s.again = !done;
            mbarrier_arrive(&s.settled);
        }
        if (!done) scanner.select_by_cuts();
        scanner.write();
    }
}

}  // namespace dsa
