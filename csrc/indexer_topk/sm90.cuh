// indexer_topk on Hopper, the kernel: scores (common/indexer_tile.cuh) that never reach memory, and
// the selection of common/candidates.cuh.
//
// A block of threads owns 8 tokens (at 16 heads) and walks all their keys. A score that beats its
// token's bound is appended to the token's list of candidates, which lies in L2; every thread has a
// segment of its own in the lists of its tokens, so an append is a comparison and two predicated
// instructions, a store and a count: no ballot, no atomics, no branch. The bounds are guesses from
// a sample of the keys, 1024 to 4096 in tiles spread over the sequence, whose scores stay in shared
// memory: at 131072 keys and topk = 2048 about 3500 to 3900 pass. After the last key each warp
// selects from a list, which it reads twice where it lies: 1024 equal bins between the bound and
// the best of the sample leave one bin open, a few candidates that the warp compares; all better
// ones are marked in a bitmap, which writes the set in order.
//
// Tokens whose list has fewer than topk candidates, or more than it holds, walk their keys again
// with certain bounds: now the scorers meet every few tiles, the room left in the fullest segment
// says how many tiles are safe, and full lists are cut to their best topk.
//
// Blocks take the next 8 tokens from a counter, the last tokens first: those of one sequence see
// the most keys. Workspace: 132 blocks x 8 lists x 7.4 K candidates of 8 bytes, 60 MB.
// Measured on an H200 at 16 heads x 64: 0.32 ms for 2048 tokens at the end of 32768 keys, 1.20 for
// 131072, where the products alone are 0.41; 34.4 ms for all of 131072. A block takes 3.6 us for
// each 1024 keys, bound by instructions (449 a warp and tile, 397 of them for scores), and 42 us
// whatever their number, for the sample and the lists: shared memory's atomics on random bins.
#pragma once

#include "common/candidates.cuh"
#include "common/indexer_tile.cuh"
#include "indexer_topk/params.h"

namespace dsa {

constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kSegments = kScoreThreads / 4;  // of a list: a quad scores a key for all tokens
constexpr int kThreadKeys = 4;                // of a tile: the most that a thread appends to a list
constexpr int kFewestRounds = 2;  // tiles a warpgroup that are worth going on for without a cut
constexpr int kFewestSampled = 8, kMostSampled = 32;  // tiles

template <class Shape>
struct alignas(1024) TopkStorage {
    static constexpr int kBitmapWords = Shape::kDim == 64 ? 4096 : 2048;
    static constexpr int kSampled = kBitmapWords;  // keys of a token, at most
    static_assert(Shape::kTokens <= kScoreWarps);  // a warp for each list

    ScoreStorage<Shape> score;
    union {
        alignas(16) uint32_t bitmap[kScoreWarps][kBitmapWords];
        float sample[Shape::kTokens][kSampled / kSegments][kSegments];  // scores, as in segments
    };
    SelectScratch scratch[kScoreWarps];
    int appended[Shape::kTokens][kSegments];  // those that found no room included
    int front[Shape::kTokens];                // candidates before the segments
    float bound[Shape::kTokens];
    float high[Shape::kTokens];  // the best of the sample
    uint32_t again;              // tokens whose bound was not right
    int block;
};

// The segments of a list lie side by side: entry e of number i at begin + e * kSegments + i. The
// last entries take what finds no room.
struct Segments {
    int begin;
    int room;

    __device__ Segments(const IndexerTopkParams& p, bool with_front)
        : begin(with_front ? p.front : 0), room((p.capacity - begin) / kSegments - 1) {}
};

// How the keys of a run are walked.
template <class Shape>
struct RunPlan {
    TileRange sample;  // empty: no guess
    TileRange all;

    __device__ explicit RunPlan(const TokenRun& run) : sample{0, 0}, all{0, run.tiles()} {
        constexpr int kRoom = TopkStorage<Shape>::kSampled / kTileKeys;
        const int tiles = min(min(max(all.last / 32, kFewestSampled), kMostSampled), kRoom);
        if (all.last < 2 * tiles) return;
        // Blocks that start together do not ask for the same tiles together, and the tiles of a
        // block do not lie a power of two apart, on the same lines of the caches.
        const int turn = static_cast<int>(blockIdx.x) % tiles;
        sample = {0, tiles, (all.last / tiles - 1) | 1, turn};
    }
};

// The list of token t in the workspace.
template <class Shape>
__device__ Candidate* list_of(const IndexerTopkParams& p, int t) {
    return p.candidates + (static_cast<int64_t>(blockIdx.x) * Shape::kTokens + t) * p.capacity;
}

// A list as a warp reads it: two neighbouring columns of 64 a lane, first of what lies before the
// segments, then of these.
struct ColumnList {
    const Candidate* entries[2];
    int2 counts[2];  // of this lane's columns
    int rows[2];
    int total;  // candidates; if not `whole`, more than these were appended
    bool whole;

    template <class Shape>
    __device__ ColumnList(const IndexerTopkParams& p, const TopkStorage<Shape>& s, int t,
                          const Segments& segments)
        : entries{list_of<Shape>(p, t), list_of<Shape>(p, t) + segments.begin} {
        const int column = threadIdx.x % 32 * 2, front = s.front[t];
        counts[0] = {(front - column + kSegments - 1) / kSegments,
                     (front - column + kSegments - 2) / kSegments};
        const int2 appended = *reinterpret_cast<const int2*>(&s.appended[t][column]);
        counts[1] = {min(appended.x, segments.room), min(appended.y, segments.room)};
        rows[0] = (front + kSegments - 1) / kSegments;
        rows[1] = __reduce_max_sync(~0u, max(counts[1].x, counts[1].y));
        total = front + __reduce_add_sync(~0u, counts[1].x + counts[1].y);
        whole = __all_sync(~0u, max(appended.x, appended.y) <= segments.room);
    }
};

// Calls f(entries, there) with arrays of kLaneCandidates for all candidates: some entries are not
// there.
template <class F>
__device__ __forceinline__ void for_each_entry(const ColumnList& list, const F& f) {
    constexpr int kRows = kLaneCandidates / 2, kAhead = 2;
    using Rows = float4[kRows];
#pragma unroll 1
    for (int part = 0; part < 2; ++part) {
        const Candidate* entries =
            (part ? list.entries[1] : list.entries[0]) + threadIdx.x % 32 * 2;
        const int2 counts = part ? list.counts[1] : list.counts[0];
        const int rows = part ? list.rows[1] : list.rows[0];
        const int own_rows = max(counts.x, counts.y);
        Rows ahead[kAhead];
        const auto fetch = [&](Rows& two, int row) {
#pragma unroll
            for (int u = 0; u < kRows; ++u) {
                const auto* from = reinterpret_cast<const float4*>(entries + (row + u) * kSegments);
                two[u] = row + u < own_rows ? __ldcg(from) : float4{};
            }
        };
#pragma unroll
        for (int a = 0; a < kAhead; ++a) fetch(ahead[a], a * kRows);
#pragma unroll 1
        for (int base = 0; base < rows; base += kAhead * kRows) {
#pragma unroll
            for (int a = 0; a < kAhead; ++a) {
                const int row = base + a * kRows;
                Candidate own[kLaneCandidates];
                bool there[kLaneCandidates];
#pragma unroll
                for (int u = 0; u < kRows; ++u) {
                    const float4 two = ahead[a][u];
                    own[2 * u] = {two.x, __float_as_int(two.y)};
                    own[2 * u + 1] = {two.z, __float_as_int(two.w)};
                    there[2 * u] = row + u < counts.x;
                    there[2 * u + 1] = row + u < counts.y;
                }
                fetch(ahead[a], row + kAhead * kRows);
                f(own, there);
            }
        }
    }
}

template <class F>
__device__ __forceinline__ void for_each(const ThreadGroup<32>&, const ColumnList& list,
                                         const F& f) {
    for_each_entry(list, [&](const auto& entries, const auto& there) {
        uint32_t keys[kLaneCandidates];
#pragma unroll
        for (int u = 0; u < kLaneCandidates; ++u)
            keys[u] = there[u] ? order_key(entries[u].score) : 0;
        f(keys, entries);
    });
}

__device__ __forceinline__ ThreadGroup<32> this_warp() {
    return {static_cast<int>(threadIdx.x % 32), 0};
}

// Guesses the bound of token t from its sample, by a warp: 1024 equal bins over the sample's range.
template <class Shape>
__device__ void guess_bound(const IndexerTopkParams& p, TopkStorage<Shape>& s, int t) {
    const int lane = threadIdx.x % 32;
    const int2 counts = *reinterpret_cast<const int2*>(&s.appended[t][2 * lane]);
    const int rows = __reduce_max_sync(~0u, max(counts.x, counts.y));
    const int sampled = __reduce_add_sync(~0u, counts.x + counts.y);
    const int rank = sample_rank(sampled, p.topk, s.score.visible[t]);
    if (rank == 0) return;
    SelectScratch& scratch = s.scratch[threadIdx.x / 32];
    const auto for_each_two = [&](const auto& f) {
#pragma unroll 4
        for (int row = 0; row < rows; ++row) {
            const auto* two = reinterpret_cast<const float2*>(&s.sample[t][row][2 * lane]);
            f(two->x, row < counts.x);
            f(two->y, row < counts.y);
        }
    };
    ScoreRange range;
    for_each_two([&](float score, bool there) { range.add(score, there); });
    range.add_lanes();
    clear_histogram(this_warp(), scratch);
    const EqualBins bins(range.low, range.high);
    const uint32_t histogram = shared_address(scratch.histogram);
    for_each_two(
        [&](float score, bool there) { shared_add(histogram + bins.bin(score) * 4, 1, there); });
    __syncwarp();
    const int bin = find_bin(this_warp(), scratch, rank).value;
    if (lane == 0 && bin > 0) s.bound[t] = bins.edge(bin);
    if (lane == 0) s.high[t] = range.high;
}

enum class Guessed { kWritten, kCrowded, kTooFew };

// Writes the topk best of a list of all scores that beat a finite bound, by a warp, if there are so
// many. Two passes over the list: 1024 equal bins between the bound and the best of the sample, of
// which one holds the topk-th; then all of better bins are marked, and of this one those that
// belong, if it is not too crowded for a warp to rank.
template <class Shape>
__device__ Guessed write_guessed(const IndexerTopkParams& p, TopkStorage<Shape>& s, int t,
                                 const ColumnList& list, int32_t* row) {
    const ThreadGroup<32> group = this_warp();
    const int warp = threadIdx.x / 32;
    SelectScratch& scratch = s.scratch[warp];
    const EqualBins bins(s.bound[t], s.high[t]);
    const uint32_t histogram = shared_address(scratch.histogram);
    clear_histogram(group, scratch);
    int above = 0;  // without NaN
    for_each_entry(list, [&](const auto& entries, const auto& there) {
#pragma unroll
        for (int u = 0; u < kLaneCandidates; ++u) {
            const bool counts = there[u] && entries[u].score == entries[u].score;
            shared_add(histogram + bins.bin(entries[u].score) * 4, 1, counts);
            above += counts;
        }
    });
    __syncwarp();
    if (__reduce_add_sync(~0u, above) < p.topk) return Guessed::kTooFew;
    const Cut cut = find_bin(group, scratch, p.topk);
    if (cut.count > 32) return Guessed::kCrowded;
    const int cut_bin = cut.value;
    // The candidates of the cut's bin, collected where the first bins were counted.
    auto* in_bin = reinterpret_cast<Candidate*>(scratch.histogram);
    const auto mark = [&](const auto& set) {
        if (group.lane() == 0) scratch.sums[0] = 0;
        __syncwarp();
        for_each_entry(list, [&](const auto& entries, const auto& there) {
            uint32_t hits = 0;
#pragma unroll
            for (int u = 0; u < kLaneCandidates; ++u) {
                const float score = entries[u].score;
                const int bin = bins.bin(score);
                set(entries[u].position, there[u] && bin > cut_bin);
                hits |= static_cast<uint32_t>(there[u] && bin == cut_bin && score == score) << u;
            }
            if (hits == 0) return;
#pragma unroll
            for (int u = 0; u < kLaneCandidates; ++u)
                if (hits >> u & 1) in_bin[atomicAdd(&scratch.sums[0], 1)] = entries[u];
        });
        __syncwarp();
        const Candidate own = in_bin[group.lane()];
        const uint32_t own_key = order_key(own.score);
        int better = 0;
        for (int i = 0; i < cut.count; ++i) {
            const uint32_t key = __shfl_sync(~0u, own_key, i);
            const int position = __shfl_sync(~0u, own.position, i);
            better += key > own_key || (key == own_key && position < own.position);
        }
        set(own.position, group.lane() < cut.count && better < cut.wanted);
    };
    write_marked<TopkStorage<Shape>::kBitmapWords>(group, scratch, mark, s.score.visible[t],
                                                   s.bitmap[warp], row);
    return Guessed::kWritten;
}

// What a pass, or a part of a certain one, ends with for the list of token t, by a warp: one that
// is full before the last key is cut to its best topk, kept before the segments, and gives the next
// bound; one that is complete is written out, if the guess was right.
template <class Shape>
__device__ void settle_list(const IndexerTopkParams& p, TopkStorage<Shape>& s, int t,
                            int first_token, bool certain, bool last) {
    const ColumnList list(p, s, t, Segments(p, certain));
    const ThreadGroup<32> group = this_warp();
    const int warp = threadIdx.x / 32;
    SelectScratch& scratch = s.scratch[warp];
    int32_t* row = p.indices + static_cast<int64_t>(first_token + t) * p.topk;
    const float guess = s.bound[t];
    bool enough = list.total >= p.topk && list.whole;
    if (!certain && guess == guess && enough) {
        const Guessed guessed = write_guessed(p, s, t, list, row);
        if (guessed == Guessed::kWritten) return;
        enough = guessed == Guessed::kCrowded;
    }
    Threshold threshold{0, INT_MAX};
    if (enough) threshold = find_threshold(group, scratch, list, p.topk);
    if (!last) {
        keep(group, scratch, list, threshold, list_of<Shape>(p, t));
        if (group.thread == 0) {
            s.front[t] = min(list.total, p.topk);
            if (enough) s.bound[t] = score_of(threshold.key);
        }
    } else if (enough) {
        write_ascending<TopkStorage<Shape>::kBitmapWords>(group, scratch, list, threshold,
                                                          s.score.visible[t], s.bitmap[warp], row);
    } else if (group.thread == 0) {
        atomicOr(&s.again, 1u << t);
    }
}

// Of the tokens that a lane scores: which take part, and how many keys they see.
template <class Shape>
struct OwnTokens {
    static constexpr int kOwn = Shape::kLaneTokens;
    int first;
    int seen[kOwn];  // 0 if the token takes no part, or is another lane's

    __device__ OwnTokens(const TopkStorage<Shape>& s, int quad, uint32_t tokens)
        : first(Shape::token(quad, 0)) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
            const bool mine = tokens >> (first + a) & 1 && quad % Shape::kLanesPerToken == 0;
            seen[a] = mine ? s.score.visible[first + a] : 0;
        }
    }
};

// How many a thread appended to the segments of its own tokens.
template <class Shape>
__device__ void report(TopkStorage<Shape>& s, int quad, const int (&count)[Shape::kLaneTokens]) {
    if (quad % Shape::kLanesPerToken != 0) return;
#pragma unroll
    for (int a = 0; a < Shape::kLaneTokens; ++a)
        s.appended[Shape::token(quad, a)][threadIdx.x / 4] = count[a];
}

// Keeps every score of a sample.
template <class Shape>
struct Sampler {
    OwnTokens<Shape> own;
    float* column;  // this thread's, of the first own token
    int count[Shape::kLaneTokens] = {};

    __device__ Sampler(TopkStorage<Shape>& s, int quad, uint32_t tokens)
        : own(s, quad, tokens), column(&s.sample[own.first][0][threadIdx.x / 4]) {}

    __device__ void operator()(const typename Scorer<Shape>::Scores& scores) {
#pragma unroll
        for (int a = 0; a < Shape::kLaneTokens; ++a) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (scores.key + kRowStep * r >= own.seen[a]) continue;
                column[a * TopkStorage<Shape>::kSampled + count[a]++ * kSegments] =
                    scores.score[a][r];
            }
        }
    }
};

// Appends what passes to the lists of this lane's tokens.
template <class Shape>
struct Appender {
    static constexpr int kOwn = Shape::kLaneTokens;
    OwnTokens<Shape> own;
    int count[kOwn] = {};  // in this thread's segment, those that found no room included
    float bound[kOwn];
    int room;            // of the segment
    int whole;           // keys that all tokens of the block see
    Candidate* segment;  // this thread's, in the list of the first own token

    __device__ Appender(const IndexerTopkParams& p, const TopkStorage<Shape>& s, int quad,
                        uint32_t tokens, const Segments& segments)
        : own(s, quad, tokens), room(segments.room) {
        segment = list_of<Shape>(p, own.first) + segments.begin + threadIdx.x / 4;
#pragma unroll
        for (int a = 0; a < kOwn; ++a) bound[a] = s.bound[own.first + a];
        whole = Shape::kLanesPerToken == 1 ? INT_MAX : 0;
        for (int t = 0; t < Shape::kTokens; ++t)
            whole = min(whole, tokens >> t & 1 ? s.score.visible[t] : 0);
    }

    __device__ void operator()(const IndexerTopkParams& p,
                               const typename Scorer<Shape>::Scores& scores) {
        if (scores.end <= whole) {
            append<true>(p, scores);
        } else {
            append<false>(p, scores);
        }
    }

    template <bool kWhole>
    __device__ void append(const IndexerTopkParams& p,
                           const typename Scorer<Shape>::Scores& scores) {
#pragma unroll
        for (int a = 0; a < kOwn; ++a) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float score = scores.score[a][r];
                const int key = scores.key + kRowStep * r;
                const bool pass = passes(score, bound[a]) && (kWhole || key < own.seen[a]);
                global_store(segment + a * p.capacity + min(count[a], room) * kSegments, score, key,
                             pass);
                count[a] += pass;
            }
        }
    }
};

// All keys of a run: the scorers' side.
template <class Shape>
__device__ void select_run(const IndexerTopkParams& p, TopkStorage<Shape>& s, Scorer<Shape>& scorer,
                           const TokenRun& run, int first_token) {
    const RunPlan<Shape> plan(run);
    const auto meet = [] { named_barrier_sync(kSyncScorers, kScoreThreads); };
    const auto forget_bounds = [&] {
        if (threadIdx.x < Shape::kTokens) s.front[threadIdx.x] = 0, s.bound[threadIdx.x] = NAN;
        meet();
    };
    const int list = threadIdx.x / 32;  // this warp's
    uint32_t tokens = run.tokens;
    const auto settles = [&] { return list < Shape::kTokens && (tokens >> list & 1) != 0; };
    if (threadIdx.x == 0) s.again = 0;
    forget_bounds();
    if (plan.sample.last > 0) {
        Sampler<Shape> sampler(s, scorer.quad, tokens);
        scorer.score(p, s.score, run, plan.sample, [&](const auto& scores) { sampler(scores); });
        report(s, scorer.quad, sampler.count);
        meet();
        if (settles()) guess_bound(p, s, list);
        meet();
    }
    bool certain = false;
    TileRange tiles = plan.all;
    Appender<Shape> appender(p, s, scorer.quad, tokens, Segments(p, false));
    while (true) {
        scorer.score(p, s.score, run, tiles, [&](const auto& scores) { appender(p, scores); });
        report(s, scorer.quad, appender.count);
        meet();
        const bool last = tiles.last == plan.all.last;
        int rounds = 0;  // tiles a warpgroup that a certain pass can go on for
        if (certain) {
            int fullest = 0;
            for (int i = scorer.lane; i < kSegments * Shape::kTokens; i += 32)
                fullest = max(fullest, (&s.appended[0][0])[i]);
            rounds = (appender.room - __reduce_max_sync(~0u, fullest)) / kThreadKeys;
        }
        if (last || rounds < kFewestRounds) {
            if (settles()) settle_list(p, s, list, first_token, certain, last);
            if (last && certain) break;
            if (last) {
                __syncthreads();  // with the loader
                tokens = s.again;
                if (tokens == 0) return;
                certain = true;
                meet();
                forget_bounds();
                tiles = {0, 0};
            } else {
                meet();
            }
            appender = Appender<Shape>(p, s, scorer.quad, tokens, Segments(p, true));
            rounds = appender.room / kThreadKeys;
        } else {
            meet();  // before the counts are written again
        }
        tiles = {tiles.last, min(tiles.last + rounds * kWarpgroups, plan.all.last)};
    }
    meet();
}

template <class Shape>
__global__ void __launch_bounds__(kIndexerThreads, 1)
    indexer_topk_kernel(const __grid_constant__ CUtensorMap map, const IndexerTopkParams p) {
    auto& s = aligned_storage<TopkStorage<Shape>>();
    init_storage(s.score);

    // The next tokens, for the whole block of threads; false if there are none. Bit t of `scored`:
    // token t sees more keys than topk.
    const auto next_tokens = [&](int& first_token, uint32_t& scored) {
        __syncthreads();  // the last ones are done with
        if (threadIdx.x == 0) s.block = p.token_blocks - 1 - atomicAdd(p.next_block, 1);
        __syncthreads();
        if (s.block < 0) return false;
        first_token = s.block * Shape::kTokens;
        find_keys(p, s.score, first_token);
        __syncthreads();
        scored = 0;
        for (int t = 0; t < Shape::kTokens; ++t)
            if (s.score.visible[t] > p.topk) scored |= 1u << t;
        return true;
    };

    int first_token;
    uint32_t scored;
    if (threadIdx.x >= kScoreThreads) {
        give_registers_back<kLoaderRegisters>();
        KeyLoader<Shape> loader;
        while (next_tokens(first_token, scored)) {
            while (scored != 0) {
                const TokenRun run = next_run(s.score, scored);
                scored &= ~run.tokens;
                const RunPlan<Shape> plan(run);
                const bool loads = threadIdx.x < kScoreThreads + 32 * kWarpgroups;
                if (loads) {
                    loader.load(p, map, s.score, run, plan.sample);
                    loader.load(p, map, s.score, run, plan.all);
                }
                __syncthreads();  // with the scorers, who know now
                if (loads && s.again) loader.load(p, map, s.score, run, plan.all);
            }
        }
    } else {
        take_registers<kScorerRegisters>();
        Scorer<Shape> scorer;
        while (next_tokens(first_token, scored)) {
            for (int t = 0; t < Shape::kTokens && first_token + t < p.tokens; ++t) {
                if (scored >> t & 1) continue;
                int32_t* row = p.indices + static_cast<int64_t>(first_token + t) * p.topk;
                const int visible = s.score.visible[t];
                for (int i = threadIdx.x; i < p.topk; i += kScoreThreads)
                    row[i] = i < visible ? i : -1;
            }
            if (scored == 0) continue;
            load_queries(p, s.score, first_token);
            scorer.load_weights(p, first_token);
            named_barrier_sync(kSyncScorers, kScoreThreads);
            while (scored != 0) {
                const TokenRun run = next_run(s.score, scored);
                scored &= ~run.tokens;
                select_run(p, s, scorer, run, first_token);
            }
        }
    }
}

}  // namespace dsa
