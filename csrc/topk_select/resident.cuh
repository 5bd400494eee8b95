// topk_select of a row that fits into the shared memory of a cluster of 2 to 16 blocks: a radix
// select over keys that stay there, for rows so few that a block for each leaves the GPU idle.
//
// A row's columns go to the blocks in order, to the threads of a block in order. A key is the
// complement of the score's order: the best is the smallest. Three digits, of 11, 11 and 10 bits,
// find the topk-th, or the first ones if their bin belongs as a whole: each block counts its keys,
// and the one digit of the cluster's counts is found from sums of 32 bins, which every block sends
// to all, then from the 32 bins of one such sum; all come to the same result. The first digit is
// counted while the row arrives. Then every thread knows how many members lie before its columns,
// those that only equal the cut included, and puts its own in order into shared memory, from where
// they leave side by side: no sort, no list. (Equal counts in one bin are one instruction: equal
// scores do not queue up.)
//
// Blocks do not read each other's memory. What they send is counted by mbarriers of the receiver,
// and they meet once, when these are there. (A meeting after which they could read is a MEMBAR of
// the whole GPU and empties L1 on its way.)
//
// A thread's columns are neighbours: one scan a row orders the members, of which it keeps two bits
// a column, whether it lies before the cut and whether it equals that. In shared memory its columns
// take an odd number of 16-byte vectors, so that eight threads read eight different banks of four.
// Where the shared memory of all blocks does not hold all rows at once, the first ones of a
// thread's vectors stay in its registers.
//
// Bound by latency: up to seven times a block waits for what all send; every warp searches the
// counts, and nothing waits for one of them. Measured on an H200: 11.6 us for one row of 131072
// with 16 blocks, 32.2 for 64 with 2, a third of them in registers.
#pragma once

#include <cuda_bf16.h>

#include "common/candidates.cuh"
#include "topk_select/row.cuh"

namespace dsa {

constexpr int kResidentThreads = 512;
constexpr int kResidentWarps = kResidentThreads / 32;
constexpr int kMostBlocks = 16;  // of a cluster; a warp reads the counts of one
static_assert(kMostBlocks <= kResidentWarps);
constexpr int kSliceColumns = 2048;  // the columns of a block are a multiple
constexpr int kDigits = 3, kDigitBits = 11;
constexpr uint32_t kDigitBins = 1 << kDigitBits;
constexpr int kBinGroups = kDigitBins / 32;
constexpr uint32_t kNoKey = ~0u;  // of a column that is not there
constexpr int kMostTopk = 4096;
constexpr int kBeforeBits = 13;  // of a count up to kMostTopk
constexpr uint32_t kBefore = (1 << kBeforeBits) - 1;
static_assert(kMostTopk <= kBefore);

// ~order_key(score), of which every instruction counts here.
__device__ __forceinline__ uint32_t descending_key(float score) {
    const uint32_t bits = __float_as_uint(score + 0.0f);  // -0.0 + 0.0 is +0.0
    const uint32_t sign = static_cast<int32_t>(bits) >> 31;
    return score == score ? bits ^ (~sign & 0x7fffffffu) : ~1u;
}

// Vectors of four keys that a thread may hold in registers.
template <typename T>
constexpr int kMostHeld = sizeof(T) == 4 ? 12 : 0;

struct alignas(16) ResidentStorage {
    struct Histogram {
        uint32_t bins[kDigitBins];
        uint32_t others[4];                   // keys of no bin
        uint32_t cluster_groups[kBinGroups];  // sums of 32 bins, of all blocks,
        uint32_t cluster_bins[32];            // and the bins of the group that matters
    };
    union {
        Histogram digits[kDigits];
        int32_t chosen[kMostTopk];  // afterwards: the block's members
    };
    // What a block sends to all, itself included.
    struct alignas(16) Sent {
        uint32_t groups[2][kBinGroups];    // sums of 32 bins, of one digit and of the next
        uint32_t bins[2][32];              // of one such sum
        uint32_t members[kResidentWarps];  // of each warp the keys before the cut and, above
                                           // kBeforeBits, those equal to it
    };
    uint64_t groups_are_here[kDigits], bins_are_here[kDigits], members_are_here;  // mbarriers
    Sent received[];  // of each block; behind them the keys of this one's columns

    __host__ __device__ static constexpr int bytes(int blocks, int keys) {
        return sizeof(ResidentStorage) + blocks * sizeof(Sent) + keys * sizeof(uint32_t);
    }

    // By one thread, before any block sends.
    __device__ void init_barriers(int blocks) {
        const auto expect = [&](uint64_t* barrier, int words) {
            mbarrier_init(barrier, 1);
            mbarrier_arrive_expect(barrier, blocks * words * sizeof(uint32_t));
        };
        for (int digit = 0; digit < kDigits; ++digit) {
            expect(&groups_are_here[digit], kBinGroups);
            expect(&bins_are_here[digit], 32);
        }
        expect(&members_are_here, kResidentWarps);
        fence_mbarrier_init();
    }
};

// A block's columns: `vectors` of four a thread, of which the first ones may be held in registers.
struct Slice {
    int vectors;

    // The columns of a block, if a cluster of `blocks` shares so many; some more than are held.
    __host__ __device__ constexpr Slice(int columns, int blocks, int held)
        : vectors((columns + kSliceColumns * blocks - 1) / (kSliceColumns * blocks)) {
        if (held > 0 && vectors < held + 2) vectors = held + 2;
    }

    __host__ __device__ constexpr int columns() const { return vectors * kSliceColumns; }
    // In shared memory, of a thread: vectors, and from one thread's to the next one's.
    __host__ __device__ constexpr int shared(int held) const { return vectors - held; }
    __host__ __device__ constexpr int stride(int held) const { return shared(held) | 1; }
};

// kHeld: vectors of a thread that stay in registers; of fp32 rows only.
template <typename T, int kHeld>
struct Resident {
    static constexpr int kVector = 16 / sizeof(T);
    static_assert(kHeld == 0 || kVector == 4);
    static constexpr int kInFlight = 4;  // vectors that a thread loads at a time
    union Vector {
        uint4 raw;
        T value[kVector];
    };

    const Row<T>& row;
    ResidentStorage& s;
    const int rank = cluster_rank();
    const int blocks = cluster_size();
    const Slice slice{row.end, blocks, kHeld};
    const int first = rank * slice.columns();  // this block's first one
    uint4* keys = reinterpret_cast<uint4*>(s.received + blocks);
    uint4* own = keys + threadIdx.x * slice.stride(kHeld);
    const ThreadGroup<kResidentThreads> group{static_cast<int>(threadIdx.x), 0};
    uint4 held[kHeld > 0 ? kHeld : 1];

    // Calls f(keys) for this thread's vectors.
    template <class F>
    __device__ __forceinline__ void for_each_own(const F& f) {
#pragma unroll
        for (int i = 0; i < kHeld; ++i) f(held[i]);
#pragma unroll 2
        for (int i = 0; i < slice.shared(kHeld); ++i) f(own[i]);
    }

    // The keys of four scores from a column on, which are counted by their first digit.
    __device__ uint4 keys_of(const T* scores, int column) {
        uint32_t keys[4];
#pragma unroll
        for (int v = 0; v < 4; ++v) keys[v] = descending_key(static_cast<float>(scores[v]));
        if (column < row.begin || row.end < column + 4) {
#pragma unroll
            for (int v = 0; v < 4; ++v)
                if (column + v < row.begin || row.end <= column + v) keys[v] = kNoKey;
        }
#pragma unroll
        for (int v = 0; v < 4; ++v) count(s.digits[0], keys[v] >> (32 - kDigitBits));
        return {keys[0], keys[1], keys[2], keys[3]};
    }

    // The keys of the block's columns, and the counts of their first digit. All threads call
    // meanwhile() while the first of them come.
    template <class Meanwhile>
    __device__ void load(const Meanwhile& meanwhile) {
        const auto* source = reinterpret_cast<const uint4*>(row.scores + first);
        const auto column_of = [&](int vector) { return first + vector * kVector; };
        const auto fetch = [&](int vector, bool there) {
            there = there && column_of(vector) < row.end;
            return there ? load_once(source + vector) : uint4{0, 0, 0, 0};
        };
        // Neighbouring threads load neighbouring vectors of those in shared memory. Whose one is: a
        // division, as a product.
        const int shared = slice.shared(kHeld), vectors = kResidentThreads * shared * 4 / kVector;
        const uint32_t inverse = ~0u / shared + 1, gaps = shared % 2 ? 0 : inverse;
        const auto with_held = [&](int i) {
            return kHeld == 0 ? i : i + kHeld * (1 + static_cast<int>(__umulhi(i, inverse)));
        };
        if constexpr (kHeld > 0) {
            const int own_first = threadIdx.x * slice.vectors;
#pragma unroll
            for (int i = 0; i < kHeld; ++i) held[i] = fetch(own_first + i, true);
            meanwhile();
#pragma unroll
            for (int i = 0; i < kHeld; ++i) {
                const Vector vector{held[i]};
                held[i] = keys_of(vector.value, column_of(own_first + i));
            }
        }
        const auto fill = [&](Vector(&vector)[kInFlight], int begin) {
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) {
                const int i = begin + threadIdx.x + u * kResidentThreads;
                vector[u].raw = fetch(with_held(i), i < vectors);
            }
        };
        const auto keep = [&](const Vector(&vector)[kInFlight], int begin) {
#pragma unroll
            for (int u = 0; u < kInFlight; ++u) {
                const int i = begin + threadIdx.x + u * kResidentThreads;
                if (i >= vectors) break;
#pragma unroll
                for (int v = 0; v < kVector; v += 4) {
                    const int four = (i * kVector + v) / 4;
                    keys[four + __umulhi(four, gaps)] =
                        keys_of(vector[u].value + v, column_of(with_held(i)) + v);
                }
            }
        };
        constexpr int kStep = kResidentThreads * kInFlight;
        Vector even[kInFlight];
        if constexpr (kHeld == 0) {
#pragma unroll 1
            for (int begin = 0; begin < vectors; begin += kStep) {
                fill(even, begin);
                if (begin == 0) meanwhile();
                keep(even, begin);
            }
        } else {  // registers for twice as many
            Vector odd[kInFlight];
            fill(even, 0);
#pragma unroll 1
            for (int begin = 0; begin < vectors; begin += 2 * kStep) {
                fill(odd, begin + kStep);
                keep(even, begin);
                fill(even, begin + 2 * kStep);
                keep(odd, begin + kStep);
            }
        }
    }

    __device__ void count(ResidentStorage::Histogram& h, uint32_t bin) {
        shared_add(shared_address(h.bins) + bin * 4, 1);
    }

    // A key that, with all before it and the first of those equal to it, makes up `wanted`: of all
    // digits, or of fewer if a bin belongs as a whole.
    __device__ Cut find_cut(int wanted) {
        Cut cut = find_bin(0, wanted);
        int shift = 32 - kDigitBits;
        cut.value <<= shift;
#pragma unroll 1
        for (int digit = 1; digit < kDigits; ++digit) {
            const uint32_t end = cut.value + (1u << shift);
            if (cut.wanted == cut.count && end != 0) return {end, 0, 0};
            shift = max(shift - kDigitBits, 0);
            for_each_own([&](uint4 four) {
                const auto bin = [&](uint32_t key) {
                    return min((key - cut.value) >> shift, kDigitBins);
                };
                const uint4 bins{bin(four.x), bin(four.y), bin(four.z), bin(four.w)};
                const uint32_t first_bin = min(min(bins.x, bins.y), min(bins.z, bins.w));
                if (digit == kDigits - 1 && first_bin == kDigitBins) return;  // most of them
                for (uint32_t b : {bins.x, bins.y, bins.z, bins.w}) count(s.digits[digit], b);
            });
            const Cut bin = find_bin(digit, cut.wanted);
            cut = {cut.value + (bin.value << shift), bin.wanted, bin.count};
        }
        return cut;
    }

    // The bin of the cluster's counts that reaches `wanted`.
    __device__ Cut find_bin(int digit, int wanted) {
        auto& h = s.digits[digit];
        auto& groups = s.received->groups[digit % 2];
        auto& bins = s.received->bins[digit % 2];
        __syncthreads();
        if (digit == 0) cluster_wait();  // all barriers are there
        const auto* fours = reinterpret_cast<const uint4*>(h.bins);
        send_groups(fours[threadIdx.x], groups, &s.groups_are_here[digit]);
        mbarrier_wait(&s.groups_are_here[digit], 0);
        const Cut outer = reach(sum_blocks(groups, h.cluster_groups), wanted);
        if (const int to = threadIdx.x / 8, four = threadIdx.x % 8; to < blocks)
            cluster_push(of_block(bins, rank) + 4 * four, fours[8 * outer.value + four], to,
                         &s.bins_are_here[digit]);
        mbarrier_wait(&s.bins_are_here[digit], 0);
        const Cut inner = reach(sum_blocks(bins, h.cluster_bins), outer.wanted);
        return {32 * outer.value + inner.value, inner.wanted, inner.count};
    }

    // Where block `rank` has sent what `counts` are of the first one.
    template <int n>
    __device__ static uint32_t* of_block(uint32_t (&counts)[n], int rank) {
        return counts + rank * (sizeof(ResidentStorage::Sent) / sizeof(uint32_t));
    }

    // Sums of 32 bins, eight lanes' fours, to all blocks.
    __device__ void send_groups(uint4 four, uint32_t (&groups)[kBinGroups], uint64_t* barrier) {
        static_assert(kDigitBins == 4 * kResidentThreads);
        uint32_t sum = four.x + four.y + four.z + four.w;
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        const uint4 sums{__shfl_sync(~0u, sum, 0), __shfl_sync(~0u, sum, 8),
                         __shfl_sync(~0u, sum, 16), __shfl_sync(~0u, sum, 24)};
        if (group.lane() < blocks)
            cluster_push(of_block(groups, rank) + 4 * group.warp(), sums, group.lane(), barrier);
    }

    // This lane's two of n counts.
    __device__ uint2 two_of(const uint32_t* counts, int n) {
        const int i = 2 * group.lane();
        return i < n ? uint2{counts[i], counts[i + 1]} : uint2{0, 0};
    }

    // The same of their sums over the blocks; every warp adds the counts of one.
    template <int n>
    __device__ uint2 sum_blocks(uint32_t (&counts)[n], uint32_t (&sums)[n]) {
        const int i = 2 * group.lane();
        if (group.warp() < blocks && i < n) {
            const uint2 two = two_of(of_block(counts, group.warp()), n);
            shared_add(shared_address(sums + i), two.x);
            shared_add(shared_address(sums + i + 1), two.y);
        }
        __syncthreads();
        return two_of(sums, n);
    }

    // Which of the counts, two of each lane, reaches `wanted`.
    __device__ Cut reach(uint2 two, int wanted) {
        const int one = two.x, both = two.x + two.y;
        const int rest = wanted - (sum_up_to(both) - both);  // wanted of this lane and later
        const uint32_t here = __ballot_sync(~0u, 0 < rest && rest <= both);
        const uint32_t first = 2 * group.lane();
        const Cut bin =
            rest <= one ? Cut{first, rest, one} : Cut{first + 1, rest - one, both - one};
        const int source = __ffs(here) - 1;
        return {__shfl_sync(~0u, bin.value, source), __shfl_sync(~0u, bin.wanted, source),
                __shfl_sync(~0u, bin.count, source)};
    }

    // Of eight vectors, a bit each: keys before the cut, and keys equal to it.
    struct Marks {
        uint32_t before = 0, equal = 0;

        __device__ void add(uint4 four, uint32_t cut, int shift) {
            before |=
                ((four.x < cut) | (four.y < cut) << 1 | (four.z < cut) << 2 | (four.w < cut) << 3)
                << shift;
            equal |= ((four.x == cut) | (four.y == cut) << 1 | (four.z == cut) << 2 |
                      (four.w == cut) << 3)
                     << shift;
        }
        // How many keys lie before the cut and, above kBeforeBits, how many equal it.
        __device__ uint32_t count() const {
            return __popc(before) + (__popc(equal) << kBeforeBits);
        }
    };

    // Writes the positions of the block's members, ascending.
    __device__ void write(Cut cut) {
        const uint32_t wanted = cut.wanted;
        uint32_t members = 0;
        Marks held_marks[(kHeld + 8) / 8];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) held_marks[i / 8].add(held[i], cut.value, i % 8 * 4);
#pragma unroll
        for (const Marks& marks : held_marks) members += marks.count();
        // Those of the vectors in shared memory take the place of the first of these.
        const int shared = slice.shared(kHeld);
        const auto own_marks = [&](int i) -> Marks& { return reinterpret_cast<Marks&>(own[i]); };
#pragma unroll 1
        for (int i = 0; 8 * i < shared; ++i) {
            Marks marks;
            const int last = min(shared - 8 * i, 8);
#pragma unroll 2
            for (int j = 0; j < last; ++j) marks.add(own[8 * i + j], cut.value, 4 * j);
            members += marks.count();
            own_marks(i) = marks;
        }
        const uint32_t up_to = sum_up_to(static_cast<int>(members));
        const uint32_t all_of_warp = __shfl_sync(~0u, up_to, 31);
        if (group.lane() < blocks)
            cluster_push(&s.received[rank].members[group.warp()], all_of_warp, group.lane(),
                         &s.members_are_here);
        mbarrier_wait(&s.members_are_here, 0);
        uint32_t before = 0, equal = 0;  // members of the blocks before this: half a block a lane
        if (const int block = group.lane() / 2; block < rank) {
            const uint32_t* half =
                s.received[block].members + group.lane() % 2 * kResidentWarps / 2;
#pragma unroll
            for (int i = 0; i < kResidentWarps / 2; ++i)
                before += half[i] & kBefore, equal += half[i] >> kBeforeBits;
        }
        before = __reduce_add_sync(~0u, before), equal = __reduce_add_sync(~0u, equal);
        // Where the member goes that `of_block` of the block's come before.
        const auto place = [&](uint32_t of_block) {
            return before + (of_block & kBefore) + min(equal + (of_block >> kBeforeBits), wanted);
        };
        const uint32_t of_warp =
            group.lane() < kResidentWarps ? s.received[rank].members[group.lane()] : 0;
        const uint32_t earlier =
            __reduce_add_sync(~0u, group.lane() < group.warp() ? of_warp : 0) + up_to - members;
        const uint32_t begin = place(0), end = place(__reduce_add_sync(~0u, of_warp));
        int32_t* next = s.chosen + (place(earlier) - begin);
        int ties = wanted - min(equal + (earlier >> kBeforeBits), wanted);  // that still belong
        int position = first + 4 * threadIdx.x * slice.vectors - row.begin;
        const auto put = [&](const Marks& marks, int columns) {
            uint32_t equal = ties > 0 ? marks.equal : 0;
#pragma unroll 1
            while (__popc(equal) > ties) equal ^= 0x80000000u >> __clz(equal);  // only the first
            ties -= __popc(equal);
#pragma unroll 1
            for (uint32_t left = marks.before | equal; left != 0; left &= left - 1)
                *next++ = position + __ffs(left) - 1;
            position += columns;
        };
#pragma unroll
        for (int i = 0; i < kHeld; i += 8) put(held_marks[i / 8], 4 * min(kHeld - i, 8));
#pragma unroll 1
        for (int i = 0; 8 * i < shared; ++i) put(own_marks(i), 32);
        __syncthreads();
#pragma unroll 1
        for (uint32_t i = begin + threadIdx.x; i < end; i += kResidentThreads)
            row.out[i] = s.chosen[i - begin];
    }
};

template <typename T, int kHeld>
__global__ void __launch_bounds__(kResidentThreads, kHeld > 0 ? 1 : 3)
    topk_select_resident_kernel(const TopkSelectParams p) {
    extern __shared__ __align__(16) uint8_t shared[];
    ResidentStorage& s = *reinterpret_cast<ResidentStorage*>(shared);
    constexpr int kFirst = sizeof(ResidentStorage::Histogram) / 16;
    constexpr int kClear = sizeof(ResidentStorage::digits) / 16;
    const auto clear = [&](int first, int end) {
#pragma unroll 1
        for (int i = first + threadIdx.x; i < end; i += kResidentThreads)
            reinterpret_cast<uint4*>(shared)[i] = {0, 0, 0, 0};
    };
    const int blocks = cluster_size(), rank = cluster_rank();
    if (threadIdx.x == 0) s.init_barriers(blocks);
    cluster_arrive();
    clear(0, kFirst);
    wait_for_kernels_before();
    const Row<T> row(p, blockIdx.x / blocks);
    const int thread = rank * kResidentThreads + threadIdx.x;
    if (row.take_all(p.topk, thread, blocks * kResidentThreads)) return;
    Resident<T, kHeld> resident{row, s};
    if (threadIdx.x == 0) look_up_page(row.out);
    resident.load([&] {
        clear(kFirst, kClear);
        __syncthreads();
    });
    resident.write(resident.find_cut(p.topk));
}

}  // namespace dsa
