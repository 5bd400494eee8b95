// Dot products of bf16 rows with vdpbf16ps (AVX512-BF16): 32 products an instruction, fp32 sums,
// nothing is widened. Denormal inputs and sums count as zero.
#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include "common/simd.h"

namespace dsa::DSA_ISA {

// out[r][c] += sum over i < k of a[r][i] * b[c][i].
template <int R, int C>
inline void bf16_dot_tile(const bf16* a, int64_t lda, const bf16* const* b, int64_t k, float* out,
                          int64_t ldo) {
    __m512 sum[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
    const auto step = [&](const auto& load, int64_t i) {
        __m512bh x[R];
        for (int r = 0; r < R; ++r) x[r] = (__m512bh)load(a + r * lda + i);
        for (int c = 0; c < C; ++c) {
            const __m512bh y = (__m512bh)load(b[c] + i);
            for (int r = 0; r < R; ++r) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], x[r], y);
        }
    };
    int64_t i = 0;
    for (; i + 32 <= k; i += 32) step([](const bf16* p) { return _mm512_loadu_si512(p); }, i);
    if (i < k) {
        const __mmask32 rest = (1u << (k - i)) - 1;
        step([rest](const bf16* p) { return _mm512_maskz_loadu_epi16(rest, p); }, i);
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out[r * ldo + c] += _mm512_reduce_add_ps(sum[r][c]);
}

}  // namespace dsa::DSA_ISA

#endif
