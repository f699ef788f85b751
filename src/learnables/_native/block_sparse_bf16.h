/* The three products in bfloat16, by the instruction that multiplies pairs of them and adds up in
 * float. Included by block_sparse.c on processors that have it (AVX512_BF16).
 *
 * A pair is one 32-bit element, moved about as a float. Rows of x and g are read as pairs where
 * they lie, so all sizes are even. Sums stay in float until they are complete, and are rounded
 * once. */

#include <immintrin.h>

#undef TARGET
#undef REAL
#undef SUFFIX
#undef LANES
#undef ADD
#define PAIRS
#define TARGET __attribute__((target("avx512f,avx512bw,avx512bf16,fma")))
#define REAL float
#define SUFFIX bf16
#define LANES 16
#define ADD(sum, a, b)                                                                            \
  (lanes_bf16)_mm512_dpbf16_ps((__m512)(sum),                                                     \
                               (__m512bh)_mm512_castps_si512(_mm512_set1_ps(a)), (__m512bh)(b))
#include "block_sparse.h"

typedef uint16_t half;

/* Two rows laced into one row of pairs: to[k / 2][j] = (from[k][j], from[k + 1][j]). */
TARGET INLINE void lace(const half *from, int64_t step, int64_t rows, int64_t columns, float *to) {
  for (int64_t k = 0; k < rows; k += 2, from += 2 * step, to += columns) {
    const half *upper = from, *lower = k + 1 < rows ? from + step : NULL;
    int64_t j = 0;
    const __m512i low_pairs = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    const __m512i high_pairs = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    for (; lower && j + 32 <= columns; j += 32) {
      const __m512i a = _mm512_loadu_si512(upper + j), b = _mm512_loadu_si512(lower + j);
      const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
      _mm512_storeu_si512(to + j, _mm512_permutex2var_epi64(low, low_pairs, high));
      _mm512_storeu_si512(to + j + 16, _mm512_permutex2var_epi64(low, high_pairs, high));
    }
    for (; j < columns; j++) {
      const half pair[2] = {upper[j], lower ? lower[j] : 0};
      memcpy(to + j, pair, sizeof pair);
    }
  }
}

/* Complete sums, rounded to the nearest even. */
TARGET INLINE void round_rows(const float *from, int64_t from_step, half *to, int64_t step,
                              int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++) {
    const float *in = from + i * from_step;
    half *out = to + i * step;
    int64_t j = 0;
    for (; j + 16 <= columns; j += 16)
      _mm256_storeu_si256((__m256i *)(out + j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in + j)));
    for (; j < columns; j++) {
      const __m256bh one = _mm512_cvtneps_pbh(_mm512_set1_ps(in[j]));
      memcpy(out + j, &one, sizeof *out);
    }
  }
}

TARGET static void product_bf16(const job *it, int64_t r, int64_t first, int64_t last) {
  const int64_t p = it->p, q = it->q, m = last - first, high = extent(r, p, it->out);
  const float *x = (const float *)((const half *)it->x + first * it->in);
  const half *w = it->w, *bias = it->bias;
  half *y = (half *)it->y + first * it->out + r * p;
  float turned[DEPTH * WIDTH] __attribute__((aligned(64))), start_row[WIDTH] = {0};
  float sums[PANEL * WIDTH] __attribute__((aligned(64)));
  struct piece piece[DEPTH];
  for (int64_t j = 0; j < high; j += WIDTH) {
    const int64_t wide = high - j < WIDTH ? high - j : WIDTH;
    for (int64_t d = 0; bias && d < wide; d++) {
      const uint32_t bits = (uint32_t)bias[r * p + j + d] << 16;
      memcpy(start_row + d, &bits, sizeof bits);
    }
    enum start start = FROM_BIAS;
    int64_t pieces = 0, filled = 0;
    for (int64_t e = it->row_starts[r]; e < it->row_starts[r + 1]; e++) {
      const int64_t c = it->columns[e], depth = extent(c, q, it->in) / 2;
      for (int64_t k = 0, deep; k < depth; k += deep) {
        deep = depth - k < DEPTH ? depth - k : DEPTH;
        if (filled + deep > DEPTH) {
          multiply_rows_bf16(m, wide, pieces, piece, x, it->in / 2, wide, sums, wide, start,
                             start_row);
          start = FROM_RESULT;
          pieces = filled = 0;
        }
        piece[pieces++] = (struct piece){c * q / 2 + k, deep, turned + filled * wide};
        turn_bf16((const float *)(w + (e * p + j) * q) + k, q / 2, wide, deep,
                  turned + filled * wide);
        filled += deep;
      }
    }
    if (pieces || start == FROM_BIAS)
      multiply_rows_bf16(m, wide, pieces, piece, x, it->in / 2, wide, sums, wide, start,
                         start_row);
    round_rows(sums, wide, y + j, it->out, m, wide);
  }
}

TARGET static void transposed_bf16(const job *it, int64_t c, int64_t first, int64_t last) {
  const int64_t p = it->p, q = it->q, m = last - first, whole = extent(c, q, it->in);
  const float *g = (const float *)((const half *)it->x + first * it->out);
  const half *w = it->w;
  half *gx = (half *)it->y + first * it->in + c * q;
  float laced[DEPTH * WIDTH] __attribute__((aligned(64)));
  float sums[PANEL * WIDTH] __attribute__((aligned(64)));
  struct piece piece[DEPTH];
  for (int64_t j = 0; j < whole; j += WIDTH) {
    const int64_t wide = whole - j < WIDTH ? whole - j : WIDTH;
    enum start start = FROM_NOTHING;
    int64_t pieces = 0, filled = 0;
    for (int64_t e = it->column_starts[c]; e < it->column_starts[c + 1]; e++) {
      const int64_t r = it->rows[e], depth = extent(r, p, it->out) / 2;
      for (int64_t k = 0, deep; k < depth; k += deep) {
        deep = depth - k < DEPTH ? depth - k : DEPTH;
        if (filled + deep > DEPTH) {
          multiply_rows_bf16(m, wide, pieces, piece, g, it->out / 2, wide, sums, wide, start,
                             NULL);
          start = FROM_RESULT;
          pieces = filled = 0;
        }
        piece[pieces++] = (struct piece){r * p / 2 + k, deep, laced + filled * wide};
        lace(w + (it->order[e] * p + 2 * k) * q + j, q, 2 * deep, wide, laced + filled * wide);
        filled += deep;
      }
    }
    if (pieces || start == FROM_NOTHING)
      multiply_rows_bf16(m, wide, pieces, piece, g, it->out / 2, wide, sums, wide, start, NULL);
    round_rows(sums, wide, gx + j, it->in, m, wide);
  }
}

/* All samples at once, for the sum is rounded at its end. */
TARGET static void sampled_bf16(const job *it, int64_t r, int64_t e, int64_t first, int64_t last) {
  (void)first, (void)last;
  const int64_t p = it->p, q = it->q, c = it->columns[e];
  const int64_t whole_high = extent(r, p, it->out), whole_wide = extent(c, q, it->in);
  half *gw = (half *)it->y + e * p * q;
  float laced_g[DEPTH * WIDTH] __attribute__((aligned(64)));
  float laced_x[DEPTH * WIDTH] __attribute__((aligned(64)));
  float sums[WIDTH * WIDTH] __attribute__((aligned(64)));
  if (whole_high < p || whole_wide < q || !it->samples) memset(gw, 0, p * q * sizeof(half));
  for (int64_t i = 0; i < whole_high && it->samples; i += WIDTH)
    for (int64_t j = 0; j < whole_wide; j += WIDTH) {
      const int64_t high = whole_high - i < WIDTH ? whole_high - i : WIDTH;
      const int64_t wide = whole_wide - j < WIDTH ? whole_wide - j : WIDTH;
      for (int64_t s = 0; s < it->samples; s += 2 * DEPTH) {
        const int64_t deep = it->samples - s < 2 * DEPTH ? it->samples - s : 2 * DEPTH;
        lace((const half *)it->x + s * it->out + r * p + i, it->out, deep, high, laced_g);
        lace((const half *)it->w + s * it->in + c * q + j, it->in, deep, wide, laced_x);
        const struct piece piece = {0, (deep + 1) / 2, laced_x};
        multiply_columns_bf16(high, wide, &piece, laced_g, high, wide, sums, wide,
                              s ? FROM_RESULT : FROM_NOTHING);
      }
      round_rows(sums, wide, gw + i * q + j, q, high, wide);
    }
}
