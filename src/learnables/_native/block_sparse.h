/* The inner loops of block_sparse.c for one element type and one instruction set. Included there
 * once for each, with
 *
 *   REAL     the element type
 *   LANES    how many of them a register holds
 *   REGS     registers in one row of the widest tile
 *   ADD      (sum, a, b): sum + a * b, with a in every lane
 *   NAME(x)  the name of x in this inclusion
 *   TARGET   the attribute that switches the instruction set on
 *   PAIRS    defined where an element is a pair of bfloat16: sums are float, products are elsewhere
 *
 * A tile of the result stays in registers while its sum runs: each step multiplies ROWS numbers,
 * each spread over a register, with REGS registers. */

typedef REAL NAME(lanes) __attribute__((vector_size(LANES * sizeof(REAL)), may_alias));
/* The same, anywhere in memory. */
typedef REAL NAME(loose)
    __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));

/* c[i][j] = start + sum over the pieces and k of a[i * down + k * along] * b[k * b_step + j], for
 * `rows` rows and `regs` registers of columns. One of `down` and `along` is 1. The sum runs through
 * all pieces before it is stored: a small block alone would not pay for that. */
TARGET INLINE void NAME(tile)(const int rows, const int regs, int64_t pieces, const piece *piece,
                              const REAL *a, int64_t down, int64_t along, int64_t j,
                              int64_t b_step, REAL *c, int64_t c_step, enum start start,
                              const REAL *bias) {
  NAME(lanes) sum[8][4];
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int r = 0; r < regs; r++) {
    if (start == FROM_RESULT)
      sum[i][r] = *(const NAME(loose) *)(c + i * c_step + r * LANES);
    else if (start == FROM_BIAS)
      sum[i][r] = *(const NAME(loose) *)(bias + r * LANES);
    else
      sum[i][r] = (NAME(lanes)){0};
  }
  for (int64_t t = 0; t < pieces; t++, piece++) {
    const REAL *b = (const REAL *)piece->b + j;
    const REAL *at[3]; /* three rows each: more pointers than that do not stay in registers */
    UNROLL for (int i = 0; i < (rows + 2) / 3; i++) at[i] = a + piece->a + 3 * i * down;
    if (along == 1) /* rows may lie pages apart, where no processor looks ahead by itself */
      UNROLL for (int i = 0; i < rows; i++) for (int64_t k = 0; k < piece->depth; k += 64 / sizeof(REAL))
          __builtin_prefetch(at[0] + (i + rows) * down + k);
    for (int64_t k = 0; k < piece->depth; k++) {
      NAME(lanes) row[4];
      UNROLL for (int r = 0; r < regs; r++) row[r] = *(const NAME(loose) *)(b + r * LANES);
      UNROLL for (int i = 0; i < rows; i++) {
        const REAL one = at[i / 3][i % 3 * down];
        UNROLL for (int r = 0; r < regs; r++) sum[i][r] = ADD(sum[i][r], one, row[r]);
      }
      if (along != 1) { /* each step is another row: ask for those to come */
        __builtin_prefetch(at[0] + AHEAD * along);
        UNROLL for (int r = 0; r < regs; r++) __builtin_prefetch(b + AHEAD * b_step + r * LANES);
      }
      b += b_step;
      UNROLL for (int i = 0; i < (rows + 2) / 3; i++) at[i] += along;
    }
  }
  UNROLL for (int i = 0; i < rows; i++) UNROLL for (int r = 0; r < regs; r++)
      *(NAME(loose) *)(c + i * c_step + r * LANES) = sum[i][r];
}

/* A column of tiles, `regs` registers wide, over all rows. `along_rows` says which of the two steps
 * through a is 1, so that the compiler knows. */
TARGET INLINE void NAME(column)(const int most, const int regs, const int along_rows, int64_t m,
                                int64_t pieces, const piece *piece, const REAL *a, int64_t a_step,
                                int64_t j, int64_t b_step, REAL *c, int64_t c_step,
                                enum start start, const REAL *bias) {
  int64_t i = 0;
#define TILES(rows)                                                                               \
  for (; rows <= most && i + rows <= m; i += rows)                                                \
    NAME(tile)(rows, regs, pieces, piece, along_rows ? a + i * a_step : a + i,                    \
               along_rows ? a_step : 1, along_rows ? 1 : a_step, j, b_step, c + i * c_step,       \
               c_step, start, bias);
  TILES(8) TILES(6) TILES(4) TILES(2) TILES(1)
#undef TILES
}

/* c (m x n) = start + a · b, or aᵀ · b where along_rows is 0. The last columns, where n is no whole
 * number of registers, go through a copy that is. The pieces are no deeper than DEPTH together. */
TARGET INLINE void NAME(multiply)(const int along_rows, int64_t m, int64_t n, int64_t pieces,
                                  const piece *piece, const REAL *a, int64_t a_step,
                                  int64_t b_step, REAL *c, int64_t c_step, enum start start,
                                  const REAL *bias) {
  int64_t j = 0;
#define COLUMNS(most, regs)                                                                       \
  for (; regs <= REGS && j + regs * LANES <= n; j += regs * LANES)                                \
    NAME(column)(most, regs, along_rows, m, pieces, piece, a, a_step, j, b_step, c + j, c_step,   \
                 start, bias + j);
  COLUMNS(6, 4) COLUMNS(REGS == 4 ? 8 : 6, 2) COLUMNS(8, 1)
#undef COLUMNS
  if (j == n) return;
  REAL b_copy[DEPTH][LANES], c_copy[8][LANES], bias_copy[LANES] = {0};
  struct piece copied[DEPTH];
  const int64_t width = n - j;
  if (start == FROM_BIAS) memcpy(bias_copy, bias + j, width * sizeof(REAL));
  memset(b_copy, 0, sizeof b_copy);
  for (int64_t t = 0, k = 0; t < pieces; t++) {
    copied[t] = (struct piece){piece[t].a, piece[t].depth, b_copy[k]};
    for (int64_t d = 0; d < piece[t].depth; d++)
      memcpy(b_copy[k++], (const REAL *)piece[t].b + d * b_step + j, width * sizeof(REAL));
  }
  for (int64_t i = 0; i < m; i += 8) {
    const int64_t high = m - i < 8 ? m - i : 8;
    REAL *out = c + i * c_step + j;
    if (start == FROM_RESULT)
      for (int64_t r = 0; r < high; r++)
        memcpy(c_copy[r], out + r * c_step, width * sizeof(REAL));
    NAME(column)(8, 1, along_rows, high, pieces, copied, along_rows ? a + i * a_step : a + i,
                 a_step, 0, LANES, c_copy[0], LANES, start, bias_copy);
    for (int64_t r = 0; r < high; r++) memcpy(out + r * c_step, c_copy[r], width * sizeof(REAL));
  }
}

/* One copy of each for all that call them. */
TARGET static NOINLINE void NAME(multiply_rows)(int64_t m, int64_t n, int64_t pieces,
                                                const piece *piece, const REAL *a, int64_t a_step,
                                                int64_t b_step, REAL *c, int64_t c_step,
                                                enum start start, const REAL *bias) {
  NAME(multiply)(1, m, n, pieces, piece, a, a_step, b_step, c, c_step, start, bias);
}
TARGET static NOINLINE void NAME(multiply_columns)(int64_t m, int64_t n, const piece *piece,
                                                   const REAL *a, int64_t a_step, int64_t b_step,
                                                   REAL *c, int64_t c_step, enum start start) {
  NAME(multiply)(0, m, n, 1, piece, a, a_step, b_step, c, c_step, start, NULL);
}

#ifndef PAIRS

/* y of a few samples, four outputs at a time, from rows of blocks as they lie in memory. */
TARGET INLINE void NAME(dots)(const int samples, const job *it, int64_t r, const REAL *x,
                              const REAL *bias, REAL *y) {
  const int64_t p = it->p, q = it->q, high = extent(r, p, it->out);
  for (int64_t j = 0; j < high; j += 4) {
    NAME(lanes) sum[4][4];
    REAL rest[4][4];
    UNROLL for (int s = 0; s < samples; s++) UNROLL for (int o = 0; o < 4; o++) {
      sum[s][o] = (NAME(lanes)){0};
      rest[s][o] = 0;
    }
    for (int64_t e = it->row_starts[r]; e < it->row_starts[r + 1]; e++) {
      const int64_t c = it->columns[e], depth = extent(c, q, it->in);
      const REAL *block = (const REAL *)it->w + e * p * q, *row[4];
      UNROLL for (int o = 0; o < 4; o++) row[o] = block + (j + o < high ? j + o : j) * q;
      int64_t k = 0;
      for (; k + LANES <= depth; k += LANES) UNROLL for (int s = 0; s < samples; s++) {
        NAME(lanes) one = *(const NAME(loose) *)(x + s * it->in + c * q + k);
        UNROLL for (int o = 0; o < 4; o++) sum[s][o] += one * *(const NAME(loose) *)(row[o] + k);
      }
      for (; k < depth; k++) UNROLL for (int s = 0; s < samples; s++)
          UNROLL for (int o = 0; o < 4; o++) rest[s][o] += x[s * it->in + c * q + k] * row[o][k];
    }
    for (int s = 0; s < samples; s++)
      for (int64_t o = 0; o < 4 && j + o < high; o++) {
        REAL total = rest[s][o] + (bias ? bias[j + o] : 0);
        for (int l = 0; l < LANES; l++) total += sum[s][o][l];
        y[s * it->out + j + o] = total;
      }
  }
}

#endif

/* A part of a block turned: to[k][j] = from[j][k]. */
TARGET INLINE void NAME(turn)(const REAL *from, int64_t step, int64_t rows, int64_t columns,
                              REAL *to) {
  int64_t j = 0;
#ifdef SHUFFLES
  for (; sizeof(REAL) == 4 && j + 4 <= rows; j += 4) {
    int64_t k = 0;
    for (; k + 4 <= columns; k += 4) {
      four a[4], b[4];
      UNROLL for (int i = 0; i < 4; i++) memcpy(a + i, from + (j + i) * step + k, sizeof *a);
      b[0] = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5);
      b[1] = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7);
      b[2] = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5);
      b[3] = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
      a[0] = __builtin_shufflevector(b[0], b[2], 0, 1, 4, 5);
      a[1] = __builtin_shufflevector(b[0], b[2], 2, 3, 6, 7);
      a[2] = __builtin_shufflevector(b[1], b[3], 0, 1, 4, 5);
      a[3] = __builtin_shufflevector(b[1], b[3], 2, 3, 6, 7);
      UNROLL for (int i = 0; i < 4; i++) memcpy(to + (k + i) * rows + j, a + i, sizeof *a);
    }
    for (; k < columns; k++)
      for (int i = 0; i < 4; i++) to[k * rows + j + i] = from[(j + i) * step + k];
  }
#endif
  for (; j < rows; j++)
    for (int64_t k = 0; k < columns; k++) to[k * rows + j] = from[j * step + k];
}

#ifndef PAIRS

/* ---- the three products, one unit of work each ---------------------------------------------- */

/* Samples first … last of one block row: y = x · wᵀ + bias. The blocks are transposed on the way,
 * so that a register holds neighbouring outputs; a few samples are not worth that. */
TARGET static void NAME(product)(const job *it, int64_t r, int64_t first, int64_t last) {
  const REAL *x = (const REAL *)it->x + first * it->in, *w = it->w, *bias = it->bias;
  const int64_t p = it->p, q = it->q, m = last - first, high = extent(r, p, it->out);
  REAL *y = (REAL *)it->y + first * it->out + r * p;
  bias = bias ? bias + r * p : NULL;
  if (m <= 8) {
    int64_t s = 0;
    for (; s + 4 <= m; s += 4) NAME(dots)(4, it, r, x + s * it->in, bias, y + s * it->out);
    if (m - s == 3) NAME(dots)(3, it, r, x + s * it->in, bias, y + s * it->out);
    if (m - s == 2) NAME(dots)(2, it, r, x + s * it->in, bias, y + s * it->out);
    if (m - s == 1) NAME(dots)(1, it, r, x + s * it->in, bias, y + s * it->out);
    return;
  }
  if (it->row_starts[r] == it->row_starts[r + 1])
    for (int64_t s = 0; s < m; s++) {
      memset(y + s * it->out, 0, high * sizeof(REAL));
      if (bias) memcpy(y + s * it->out, bias, high * sizeof(REAL));
    }
  REAL turned[DEPTH * WIDTH] __attribute__((aligned(64)));
  struct piece piece[DEPTH];
  for (int64_t j = 0; j < high; j += WIDTH) {
    const int64_t wide = high - j < WIDTH ? high - j : WIDTH;
    enum start start = bias ? FROM_BIAS : FROM_NOTHING;
    int64_t pieces = 0, filled = 0;
    for (int64_t e = it->row_starts[r]; e < it->row_starts[r + 1]; e++) {
      const int64_t c = it->columns[e], depth = extent(c, q, it->in);
      for (int64_t k = 0, deep; k < depth; k += deep) {
        deep = depth - k < DEPTH ? depth - k : DEPTH;
        if (filled + deep > DEPTH) {
          NAME(multiply_rows)(m, wide, pieces, piece, x, it->in, wide, y + j, it->out, start,
                              bias ? bias + j : NULL);
          start = FROM_RESULT;
          pieces = filled = 0;
        }
        piece[pieces++] = (struct piece){c * q + k, deep, turned + filled * wide};
        NAME(turn)(w + e * p * q + j * q + k, q, wide, deep, turned + filled * wide);
        filled += deep;
      }
    }
    if (pieces)
      NAME(multiply_rows)(m, wide, pieces, piece, x, it->in, wide, y + j, it->out, start,
                          bias ? bias + j : NULL);
  }
}

/* Samples first … last of one block column: gx = g · w. */
TARGET static void NAME(transposed)(const job *it, int64_t c, int64_t first, int64_t last) {
  const REAL *g = (const REAL *)it->x + first * it->out, *w = it->w;
  const int64_t p = it->p, q = it->q, m = last - first, wide = extent(c, q, it->in);
  REAL *gx = (REAL *)it->y + first * it->in + c * q;
  if (it->column_starts[c] == it->column_starts[c + 1])
    for (int64_t s = 0; s < m; s++) memset(gx + s * it->in, 0, wide * sizeof(REAL));
  struct piece piece[DEPTH];
  enum start start = FROM_NOTHING;
  int64_t pieces = 0, filled = 0;
  for (int64_t e = it->column_starts[c]; e < it->column_starts[c + 1]; e++) {
    const int64_t r = it->rows[e], depth = extent(r, p, it->out);
    for (int64_t k = 0, deep; k < depth; k += deep) {
      deep = depth - k < DEPTH ? depth - k : DEPTH;
      if (filled + deep > DEPTH) {
        NAME(multiply_rows)(m, wide, pieces, piece, g, it->out, q, gx, it->in, start, NULL);
        start = FROM_RESULT;
        pieces = filled = 0;
      }
      piece[pieces++] = (struct piece){r * p + k, deep, w + it->order[e] * p * q + k * q};
      filled += deep;
    }
  }
  if (pieces) NAME(multiply_rows)(m, wide, pieces, piece, g, it->out, q, gx, it->in, start, NULL);
}

/* Samples first … last of one stored block: gw (+)= gᵀ · x. */
TARGET static void NAME(sampled)(const job *it, int64_t r, int64_t e, int64_t first,
                                 int64_t last) {
  const int64_t p = it->p, q = it->q, c = it->columns[e];
  const int64_t high = extent(r, p, it->out), wide = extent(c, q, it->in);
  const REAL *g = (const REAL *)it->x + r * p, *x = (const REAL *)it->w + c * q;
  REAL *gw = (REAL *)it->y + e * p * q;
  if (first == 0 && (high < p || wide < q || last == 0)) memset(gw, 0, p * q * sizeof(REAL));
  for (int64_t s = first; s < last; s += DEPTH) {
    const int64_t deep = last - s < DEPTH ? last - s : DEPTH;
    const struct piece piece = {0, deep, x + s * it->in};
    NAME(multiply_columns)(high, wide, &piece, g + s * it->out, it->out, it->in, gw, q,
                           s ? FROM_RESULT : FROM_NOTHING);
  }
}

#endif
