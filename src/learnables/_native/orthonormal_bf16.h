/* E² from E in bfloat16, by the instruction that multiplies pairs and adds up in float: a small
 * term beside E, which needs three digits. Included by orthonormal.c.
 *
 * A pair is one 32-bit element, moved about as a float. */

#include <immintrin.h>

#undef TARGET
#undef SUFFIX
#undef ADD
#define PAIRS
#define TARGET __attribute__((target("avx512f,avx512bf16,fma")))
#define SUFFIX bf16
#define ADD(sum, a, b)                                                                            \
  (lanes_bf16)_mm512_dpbf16_ps((__m512)(sum),                                                     \
                               (__m512bh)_mm512_castps_si512(_mm512_set1_ps(a)), (__m512bh)(b))
#include "orthonormal.h"

/* s = e e for a symmetric e in panels of `padded` rows; `pairs` has room for half of e. */
TARGET static double square_bf16(const float *e, int64_t padded, int64_t side, float *pairs,
                                 float *s) {
  for (int64_t at = 0; at < padded * padded; at += 2 * WIDTH)
    for (int64_t j = 0; j < WIDTH; j += LANES) {
      const __m512 upper = _mm512_loadu_ps(e + at + j), lower = _mm512_loadu_ps(e + at + WIDTH + j);
      const __m512i one = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(upper));
      const __m512i other = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(lower));
      _mm512_storeu_si512(pairs + at / 2 + j, _mm512_or_si512(one, _mm512_slli_epi32(other, 16)));
    }
  return symmetric_bf16(pairs, padded / 2 * WIDTH, WIDTH, padded / 2, side, 0, INT64_MAX, s);
}
