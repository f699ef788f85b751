/* The arithmetic of orthonormal.c for one instruction set. Included there once for each, with
 *
 *   LANES    floats in a register
 *   REGS     registers in a row of a tile; WIDTH is a multiple of REGS * LANES
 *   ROWS     rows of a tile; WIDTH is a multiple of it
 *   NAME(x)  the name of x in this inclusion
 *   TARGET   the attribute that switches the instruction set on
 *   ADD      sum + a * b, for a number a and a register b
 *   PAIRS    defined where a number is a pair in bfloat16: the symmetric product only
 *
 * Matrices are kept in panels: WIDTH columns side by side, row after row, with zeros where the
 * matrix has no columns left. A symmetric product reads the same panels from both sides. */

typedef float NAME(lanes) __attribute__((vector_size(LANES * 4), may_alias));
typedef float NAME(loose) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* sum[i][j] = sum over k of a[i * down + k * along] * b[k * pitch + j], for the first `regs`
 * registers of each row; it stays in registers. */
TARGET INLINE void NAME(tile)(int64_t depth, const float *a, int64_t down, int64_t along,
                              const float *b, int64_t pitch, const int regs,
                              NAME(lanes) sum[ROWS][REGS]) {
  NAME(lanes) s[ROWS][REGS];
  UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int r = 0; r < REGS; r++)
      s[i][r] = (NAME(lanes)){0};
  const float *at[(ROWS + 2) / 3]; /* more pointers than that do not stay in registers */
  UNROLL for (int i = 0; i < (ROWS + 2) / 3; i++) at[i] = a + 3 * i * down;
  for (int64_t k = 0; k < depth; k++) {
    NAME(lanes) row[REGS];
    UNROLL for (int r = 0; r < regs; r++) row[r] = *(const NAME(loose) *)(b + r * LANES);
    UNROLL for (int i = 0; i < ROWS; i++) {
      const float one = at[i / 3][i % 3 * down];
      UNROLL for (int r = 0; r < regs; r++) s[i][r] = ADD(s[i][r], one, row[r]);
    }
    b += pitch;
    UNROLL for (int i = 0; i < (ROWS + 2) / 3; i++) at[i] += along;
  }
  UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int r = 0; r < REGS; r++) sum[i][r] = s[i][r];
}

/* How many of `columns` columns of a panel are computed: whole registers. */
INLINE int64_t NAME(edge)(int64_t columns) {
  return columns < WIDTH ? (columns + LANES - 1) / LANES * LANES : WIDTH;
}

/* A tile of a symmetric matrix of which only the upper part is computed, at column j of a block of
 * panels that needs columns up to `edge`, a multiple of LANES; returns its width in registers. */
TARGET INLINE int NAME(tile_above)(int64_t depth, const float *a, const float *b, int64_t pitch,
                                   int64_t j, int64_t edge, NAME(lanes) sum[ROWS][REGS]) {
  if (j + REGS * LANES <= edge) {
    NAME(tile)(depth, a, 1, pitch, b, pitch, REGS, sum);
    return REGS;
  }
  NAME(tile)(depth, a, 1, pitch, b, pitch, 1, sum); /* REGS is 2 */
  return 1;
}

/* Rows of registers turned into columns: to[c * ROWS + k] = from[k][c]. Interleaving the first half
 * of all numbers with the second half turns the bits of their places round by one. */
TARGET INLINE void NAME(turn)(NAME(lanes) from[ROWS], float *to) {
#ifdef INTERLEAVED
  NAME(lanes) a[ROWS], b[ROWS];
  UNROLL for (int k = 0; k < ROWS; k++) a[k] = from[k];
  UNROLL for (int done = 1; done < ROWS; done *= 2) {
    UNROLL for (int k = 0; k < ROWS / 2; k++) {
      b[2 * k] = INTERLEAVED(a[k], a[k + ROWS / 2], JOIN(LOW, LANES));
      b[2 * k + 1] = INTERLEAVED(a[k], a[k + ROWS / 2], JOIN(HIGH, LANES));
    }
    UNROLL for (int k = 0; k < ROWS; k++) a[k] = b[k];
  }
  UNROLL for (int k = 0; k < ROWS; k++) memcpy(to + k * LANES, &a[k], sizeof a[k]);
#else
  for (int k = 0; k < ROWS; k++)
    for (int c = 0; c < LANES; c++) to[c * ROWS + k] = from[k][c];
#endif
}

/* That tile into the panels, and its mirror image below the diagonal; returns its sum of squares,
 * with the image. */
TARGET INLINE double NAME(store)(float *out, int64_t padded, int64_t I, int64_t J, int64_t i,
                                 int64_t j, int regs, NAME(lanes) sum[ROWS][REGS]) {
  float *to = out + J * padded * WIDTH + (I * WIDTH + i) * WIDTH + j;
  float *image = out + I * padded * WIDTH + (J * WIDTH + j) * WIDTH + i;
  const int from = I == J && j <= i ? 1 : 0; /* the square on the diagonal is its own image */
  NAME(lanes) once = {0}, twice = {0};
  UNROLL for (int r = 0; r < REGS; r++) {
    if (r == regs) break;
    NAME(lanes) column[ROWS], squares = {0};
    UNROLL for (int k = 0; k < ROWS; k++) {
      column[k] = sum[k][r];
      *(NAME(loose) *)(to + k * WIDTH + r * LANES) = column[k];
      squares += column[k] * column[k];
    }
    if (r < from) {
      once += squares;
      continue;
    }
    twice += squares;
    float turned[LANES * ROWS];
    NAME(turn)(column, turned);
    for (int c = 0; c < LANES; c++)
      memcpy(image + (r * LANES + c) * WIDTH, turned + c * ROWS, ROWS * sizeof *turned);
  }
  once += twice + twice;
  float total = 0;
  for (int l = 0; l < LANES; l++) total += once[l];
  return total;
}

/* out = xᵀ x in panels, less the unit matrix where `unit`; returns the sum of its squares. Only
 * what is on and above the diagonal is computed. A panel of x begins `apart` numbers after the one
 * before, a row `pitch` after its own. Sums of more than `piece` terms are run in pieces of that
 * many, which are added in double. */
TARGET static NOINLINE double NAME(symmetric)(const float *x, int64_t apart, int64_t pitch,
                                              int64_t length, int64_t side, int unit, int64_t piece,
                                              float *out) {
  const int64_t panels = (side + WIDTH - 1) / WIDTH, padded = panels * WIDTH;
  float one[2 * LANES - 1] = {0}; /* from LANES - 1 - c on: the unit vector c */
  one[LANES - 1] = 1;
  double total = 0;
  for (int64_t J = 0; J < panels; J++)
    for (int64_t I = 0; I <= J; I++) {
      const float *a = x + I * apart, *b = x + J * apart;
      const int64_t high = side - I * WIDTH < WIDTH ? side - I * WIDTH : WIDTH;
      const int64_t edge = NAME(edge)(side - J * WIDTH);
      double whole[WIDTH][WIDTH];
      if (length > piece) { /* a piece of both panels stays in the cache */
        memset(whole, 0, sizeof whole);
        for (int64_t k = 0; k < length; k += piece)
          for (int64_t i = 0; i < high; i += ROWS)
            for (int64_t j = I == J ? i / LANES * LANES : 0, regs; j < edge; j += regs * LANES) {
              NAME(lanes) sum[ROWS][REGS];
              regs = NAME(tile_above)(length - k < piece ? length - k : piece, a + k * pitch + i,
                                      b + k * pitch + j, pitch, j, edge, sum);
              for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < regs * LANES; c++)
                  whole[i + r][j + c] += (double)((const float *)sum[r])[c];
            }
        for (int64_t i = 0; unit && I == J && i < high; i++) whole[i][i] -= 1;
      }
      for (int64_t i = 0; i < high; i += ROWS)
        for (int64_t j = I == J ? i / LANES * LANES : 0, regs; j < edge; j += regs * LANES) {
          NAME(lanes) sum[ROWS][REGS];
          if (length > piece) {
            regs = j + REGS * LANES <= edge ? REGS : 1;
            for (int r = 0; r < ROWS; r++)
              for (int c = 0; c < regs * LANES; c++)
                ((float *)sum[r])[c] = (float)whole[i + r][j + c];
          } else {
            regs = NAME(tile_above)(length, a + i, b + j, pitch, j, edge, sum);
            for (int64_t r = 0; unit && I == J && j <= i && r < ROWS && i + r < high; r++)
              sum[r][0] -= *(const NAME(loose) *)(one + LANES - 1 - (i + r - j));
          }
          total += NAME(store)(out, padded, I, J, i, j, (int)regs, sum);
        }
    }
  return total;
}

#ifndef PAIRS
/* out = xᵀ y + yᵀ x in panels. */
TARGET static NOINLINE void NAME(between)(const float *x, const float *y, int64_t length,
                                          int64_t side, float *out) {
  const int64_t panels = (side + WIDTH - 1) / WIDTH, padded = panels * WIDTH;
  for (int64_t J = 0; J < panels; J++)
    for (int64_t I = 0; I <= J; I++)
      for (int64_t i = 0; i < WIDTH && I * WIDTH + i < side; i += ROWS) {
        const int64_t edge = NAME(edge)(side - J * WIDTH);
        for (int64_t j = I == J ? i / LANES * LANES : 0, regs; j < edge; j += regs * LANES) {
          const int64_t a = I * length * WIDTH + i, b = J * length * WIDTH + j;
          NAME(lanes) one[ROWS][REGS], other[ROWS][REGS];
          NAME(tile_above)(length, x + a, y + b, WIDTH, j, edge, one);
          regs = NAME(tile_above)(length, y + a, x + b, WIDTH, j, edge, other);
          for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < REGS; c++) one[r][c] += other[r][c];
          NAME(store)(out, padded, I, J, i, j, (int)regs, one);
        }
      }
}

/* c += sum, for the rows and columns of the tile that the matrix has. */
TARGET INLINE void NAME(add)(float *c, int64_t step, int64_t high, int64_t wide,
                             NAME(lanes) sum[ROWS][REGS]) {
  if (high >= ROWS && wide >= REGS * LANES) {
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int r = 0; r < REGS; r++)
        *(NAME(loose) *)(c + i * step + r * LANES) += sum[i][r];
    return;
  }
  const float *plain = (const float *)sum;
  for (int i = 0; i < ROWS && i < high; i++)
    for (int j = 0; j < REGS * LANES && j < wide; j++) c[i * step + j] += plain[i * REGS * LANES + j];
}

/* to += w p, where `to` may be w: the rows of a tall matrix one after the other. */
TARGET static NOINLINE void NAME(apply_tall)(const float *w, float *to, int64_t n, int64_t k,
                                             const float *p, float *rows) {
  const int64_t panels = (k + WIDTH - 1) / WIDTH, padded = panels * WIDTH, pitch = k + 16;
  for (int64_t first = 0; first < n; first += TOGETHER) {
    const int64_t high = n - first < TOGETHER ? n - first : TOGETHER;
    for (int64_t r = 0; r < high; r++)
      memcpy(rows + r * pitch, w + (first + r) * k, (size_t)k * sizeof *w);
    for (int64_t r = high; r % ROWS; r++) memset(rows + r * pitch, 0, (size_t)k * sizeof *w);
    for (int64_t J = 0; J < panels; J++)
      for (int64_t j = 0; j < WIDTH && J * WIDTH + j < k; j += REGS * LANES)
        for (int64_t r = 0; r < high; r += ROWS) {
          NAME(lanes) sum[ROWS][REGS];
          NAME(tile)(k, rows + r * pitch, pitch, 1, p + J * padded * WIDTH + j, WIDTH, REGS, sum);
          NAME(add)(to + (first + r) * k + J * WIDTH + j, k, high - r, k - J * WIDTH - j, sum);
        }
  }
}

/* to += p w, where `to` may be w: the columns of a wide matrix WIDTH at a time. */
TARGET static NOINLINE void NAME(apply_wide)(const float *w, float *to, int64_t n, int64_t k,
                                             const float *p, float *columns) {
  const int64_t padded = (n + WIDTH - 1) / WIDTH * WIDTH;
  for (int64_t first = 0; first < k; first += WIDTH) {
    const int64_t wide = k - first < WIDTH ? k - first : WIDTH;
    if (wide < WIDTH) memset(columns, 0, (size_t)(n * WIDTH) * sizeof *w);
    for (int64_t r = 0; r < n; r++)
      memcpy(columns + r * WIDTH, w + r * k + first, (size_t)wide * sizeof *w);
    for (int64_t r = 0; r < n; r += ROWS)
      for (int64_t j = 0; j < wide; j += REGS * LANES) {
        NAME(lanes) sum[ROWS][REGS];
        const float *a = p + r / WIDTH * padded * WIDTH + r % WIDTH;
        NAME(tile)(n, a, 1, WIDTH, columns + j, WIDTH, REGS, sum);
        NAME(add)(to + r * k + first + j, k, n - r, wide - j, sum);
      }
  }
}

/* p = linear * e + square * s, over the panels of both. */
TARGET static NOINLINE void NAME(mix)(int64_t size, float linear, const float *e, float square,
                                      const float *s, float *p) {
  for (int64_t i = 0; i < size; i++) p[i] = linear * e[i] + (square ? square * s[i] : 0);
}

/* ‖xᵀx v − v‖ for the random signs v: about the norm of xᵀx − 1, from two passes over x. */
TARGET static NOINLINE double NAME(glance)(const float *x, int64_t length, int64_t side,
                                           const float *v, float *y) {
  const int64_t panels = (side + WIDTH - 1) / WIDTH;
  double total = 0;
  memset(y, 0, (size_t)length * sizeof *y);
  for (int64_t J = 0; J < panels; J++)
    for (int64_t r = 0; r < length; r++) {
      float dot = 0;
      for (int64_t c = 0; c < WIDTH; c++) dot += x[(J * length + r) * WIDTH + c] * v[J * WIDTH + c];
      y[r] += dot;
    }
  for (int64_t J = 0; J < panels; J++) {
    float z[WIDTH];
    for (int64_t c = 0; c < WIDTH; c++) z[c] = -v[J * WIDTH + c];
    for (int64_t r = 0; r < length; r++)
      for (int64_t c = 0; c < WIDTH; c++) z[c] += x[(J * length + r) * WIDTH + c] * y[r];
    for (int64_t c = 0; c < WIDTH; c++) total += (double)z[c] * z[c];
  }
  return total;
}
#endif
