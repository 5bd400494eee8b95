// The PTX instructions of Hopper that the kernels use, one function each. Section numbers are those
// of the PTX ISA 8.7.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace dsa {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 9.7.13.1 barrier.sync.aligned: `threads` threads of the block, whole warps, meet at barrier `id`.
// Lanes that are still apart after a branch come together first. (The form for lanes on their own
// takes ten instructions more.)
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
    __syncwarp();
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// 9.7.17.5 setmaxnreg: registers a thread of this warpgroup from here on.
template <int kRegisters>
__device__ __forceinline__ void give_registers_back() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 9.7.13.4 barrier.cluster: all threads of the cluster meet; between arrival and wait they need not
// stand still. Of what was written before it only mbarriers, by their fence, are sure to be there:
// a release would be a MEMBAR of the whole GPU.
__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// 10: this block's place in its cluster, and the cluster's size.
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

// 9.7.9.23 mapa and 9.7.9.12 st.async: a word, or four, into the shared memory of block `rank` of
// the cluster, where this block has `words`. The barrier that expects the bytes is where this block
// has `barrier`; who waits there sees them. (To acquire from the cluster would only empty L1, where
// no shared memory is.)
__device__ __forceinline__ void cluster_push(uint32_t* words, uint32_t value, int rank,
                                             uint64_t* barrier) {
    asm volatile(
        "{ .reg .b32 address, signal; mapa.shared::cluster.u32 address, %0, %2; "
        "mapa.shared::cluster.u32 signal, %1, %2; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 "
        "[address], %3, [signal]; }" ::"r"(shared_address(words)),
        "r"(shared_address(barrier)), "r"(rank), "r"(value)
        : "memory");
}

__device__ __forceinline__ void cluster_push(uint32_t* words, uint4 value, int rank,
                                             uint64_t* barrier) {
    asm volatile(
        "{ .reg .b32 address, signal; mapa.shared::cluster.u32 address, %0, %2; "
        "mapa.shared::cluster.u32 signal, %1, %2; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
        "[address], {%3, %4, %5, %6}, [signal]; }" ::"r"(shared_address(words)),
        "r"(shared_address(barrier)), "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z),
        "r"(value.w)
        : "memory");
}

// 9.7.9.15 prefetch: asks for a line that will be written, so that its page has been looked up.
__device__ __forceinline__ void look_up_page(const void* line) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
}

// 9.7.13.13 griddepcontrol.wait: until the kernels before this one, if it was launched to start
// before their end, are over and what they wrote can be read.
__device__ __forceinline__ void wait_for_kernels_before() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// 9.7.13.13 griddepcontrol.launch_dependents: the kernel after this one, if launched so, may start
// once every block of this one has said this.
__device__ __forceinline__ void let_next_kernel_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// 9.7.13.15 mbarrier.init and the fence that shows it to the asynchronous proxy.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(arrivals));
}

__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// 9.7.13.15 mbarrier.arrive, with and without bytes that are still to come.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

// 9.7.13.15 mbarrier.try_wait: whether the phase of this parity is over; and until it is.
__device__ __forceinline__ bool mbarrier_is_over(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; "
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    while (!mbarrier_is_over(barrier, parity)) {
    }
}

// 9.7.13.4 membar: shared memory written by ordinary stores, before wgmma or TMA reads it; or read
// by ordinary loads, before TMA writes it.
__device__ __forceinline__ void fence_proxy_async() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// 9.7.9.25 cp.async: 16 bytes into shared memory; the wait for all of this thread; groups of them,
// and the wait for all but the last kPending groups.
__device__ __forceinline__ void copy_async(uint32_t target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

__device__ __forceinline__ void copy_async(void* target, const void* source) {
    copy_async(shared_address(target), source);
}

// The same for 4 bytes.
__device__ __forceinline__ void copy_word_async(void* target, const void* source) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(target)),
                 "l"(source)
                 : "memory");
}

__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void copy_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 9.7.13.15 cp.async.mbarrier.arrive: this thread arrives when its copies so far are there.
__device__ __forceinline__ void copy_async_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}

// How long L2 keeps what is loaded, as 9.7.9.16 createpolicy words it. What is read once goes
// first, before what others left there: nothing dirty has to be written back to make room for it.
constexpr uint64_t kReadOnce = 0x12f0000000000000;  // evict_first

// 9.7.9.8 ld: 16 bytes that nobody writes and that are read once.
__device__ __forceinline__ uint4 load_once(const uint4* source) {
    uint4 value;
    asm volatile("ld.global.nc.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(source), "l"(kReadOnce));
    return value;
}

// 9.7.9.25 cp.async.bulk: `bytes`, a multiple of 16, between addresses on 16 bytes, into shared
// memory.
__device__ __forceinline__ void bulk_load(void* target, const void* source, uint32_t bytes,
                                          uint64_t* barrier, bool read_once) {
    if (read_once) {
        asm volatile(
            "{ .reg .b64 policy; mov.b64 policy, %4; "
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
            "[%0], [%1], %2, [%3], policy; }" ::"r"(shared_address(target)),
            "l"(source), "r"(bytes), "r"(shared_address(barrier)), "n"(kReadOnce)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1], %2, [%3];" ::"r"(shared_address(target)),
            "l"(source), "r"(bytes), "r"(shared_address(barrier))
            : "memory");
    }
}

// 9.7.9.25.4.4 cp.async.bulk.prefetch.L2: multiples of 16 bytes on 16 bytes.
__device__ __forceinline__ void prefetch_into_l2(const void* source, uint32_t bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(bytes) : "memory");
}

// 9.7.9.27 cp.async.bulk.prefetch.tensor: the box of a tensor map at (x, y) into L2.
__device__ __forceinline__ void prefetch_into_l2(const CUtensorMap& map, int x, int y) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(&map), "r"(x),
                 "r"(y)
                 : "memory");
}

// 9.7.9.27.1.3 prefetch.tensormap: a map, before the first load through it.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap& map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// 9.7.9.27 cp.async.bulk.tensor: the box of a tensor map at x, (x, y) or (x, y, z), into shared
// memory.
__device__ __forceinline__ void tma_load(const CUtensorMap& map, uint64_t* barrier, void* target,
                                         int x) {
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3}], [%2];" ::"r"(shared_address(target)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x)
        : "memory");
}

__device__ __forceinline__ void tma_load(const CUtensorMap& map, uint64_t* barrier, void* target,
                                         int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(target)),
        "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y)
        : "memory");
}

__device__ __forceinline__ void tma_load(const CUtensorMap& map, uint64_t* barrier, void* target,
                                         int x, int y, int z, bool read_once) {
    if (read_once) {
        asm volatile(
            "{ .reg .b64 policy; mov.b64 policy, %6; "
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
            ".L2::cache_hint [%0], [%1, {%3, %4, %5}], [%2], policy; }" ::"r"(
                shared_address(target)),
            "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "n"(kReadOnce)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(target)),
            "l"(&map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z)
            : "memory");
    }
}

// 9.7.13.14 red: adds to a word at an address in shared memory, or sets bits of it. (With a
// predicate ptxas makes a branch of each; so what should not count goes to a word of no meaning, or
// sets no bit.)
__device__ __forceinline__ void shared_add(uint32_t word, uint32_t value) {
    asm volatile("red.shared::cta.add.u32 [%0], %1;" ::"r"(word), "r"(value) : "memory");
}

__device__ __forceinline__ void shared_or(uint32_t word, uint32_t bits) {
    asm volatile("red.shared::cta.or.b32 [%0], %1;" ::"r"(word), "r"(bits) : "memory");
}

// 9.7.9.8 ld: four floats at an address in shared memory.
__device__ __forceinline__ float4 shared_load_four(uint32_t address) {
    float4 four;
    asm volatile("ld.shared::cta.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(four.x), "=f"(four.y), "=f"(four.z), "=f"(four.w)
                 : "r"(address)
                 : "memory");
    return four;
}

// 9.7.9.11 st: a word, or two, to an address in shared memory where `active`, without a branch.
__device__ __forceinline__ void shared_store(uint32_t address, int value, bool active) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.shared::cta.b32 [%0], %1; }" ::"r"(address),
        "r"(value), "r"(int{active})
        : "memory");
}

__device__ __forceinline__ void shared_store(uint32_t address, float first, int second,
                                             bool active) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.shared::cta.v2.b32 [%0], {%1, %2}; }" ::"r"(
            address),
        "r"(__float_as_int(first)), "r"(second), "r"(int{active})
        : "memory");
}

// The same for the lower half of a word; then the address is that of the next half.
__device__ __forceinline__ void shared_append(uint32_t& address, uint32_t value, uint32_t active) {
    asm volatile(
        "{ .reg .pred p; .reg .b16 half; setp.ne.b32 p, %2, 0; cvt.u16.u32 half, %1; "
        "@p st.shared::cta.b16 [%0], half; @p add.u32 %0, %0, 2; }"
        : "+r"(address)
        : "r"(value), "r"(active)
        : "memory");
}

// 9.7.9.11 st: a word, or two, to an address in global memory where `active`, without a branch.
__device__ __forceinline__ void global_store(float* pointer, float value, bool active) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %2, 0; @p st.global.b32 [%0], %1; }" ::"l"(pointer),
        "f"(value), "r"(int{active})
        : "memory");
}

__device__ __forceinline__ void global_store(void* pointer, float first, int second, bool active) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2}; }" ::"l"(
            pointer),
        "r"(__float_as_int(first)), "r"(second), "r"(int{active})
        : "memory");
}

// 9.7.15.5 the descriptor of a K-major operand in shared memory whose rows are `row_bytes` long, 64
// or 128, swizzled over as many bytes, in groups of 8 rows.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int row_bytes) {
    const uint64_t swizzle = row_bytes == 128 ? 1 : 2;
    return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 |
           static_cast<uint64_t>(8 * row_bytes >> 4) << 32 | swizzle << 62;
}

// 9.7.15.7 wgmma.fence, commit_group, wait_group.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: keeps the compiler from moving uses of the sums across it, as it knows nothing of
// their arrival.
template <int N>
__device__ __forceinline__ void wgmma_pin(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// No instruction: the address stays in registers instead of being computed again for each use.
template <typename T>
__device__ __forceinline__ void keep_address(T*& pointer) {
    asm volatile("" : "+l"(pointer));
}

__device__ __forceinline__ void keep_address(uint32_t& address) {
    asm volatile("" : "+r"(address));
}

// 9.7.3.11 max: NaN if one of the two is.
__device__ __forceinline__ float max_nan(float x, float y) {
    float z;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}

// 9.7.15.5 wgmma.mma_async: d[64 x N] = a[64 x 32] b[N x 32]^T, plus d where `add`; e4m3, fp32
// sums. Thread 32 w + l holds of row 16 w + l / 4 the columns 8 j + 2 (l % 4) + {0, 1} in d[4 j +
// {0, 1}], of row 16 w + l / 4 + 8 in the next two.
__device__ __forceinline__ void wgmma_e4m3(float (&d)[8], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %10, 0; "
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 { "
        "%0, %1, %2, %3, %4, %5, %6, %7 }, "
        "%8, %9, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7])
        : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_e4m3(float (&d)[16], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %18, 0; "
        "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 { "
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15 }, "
        "%16, %17, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15])
        : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_e4m3(float (&d)[32], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %34, 0; "
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 { "
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31 }, "
        "%32, %33, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], uint64_t a, uint64_t b, int add) {
    asm volatile(
        "{ .reg .pred p; setp.ne.b32 p, %66, 0; "
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 { "
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
        "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
        "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "
        "%60, %61, %62, %63 }, "
        "%64, %65, p, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),
          "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]),
          "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]),
          "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
          "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]),
          "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]),
          "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]),
          "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
}

}  // namespace dsa
