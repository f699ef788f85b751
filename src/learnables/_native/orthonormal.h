/* The arithmetic of orthonormal.c for one instruction set. Included there once for each, with
 *
 *   LANES    floats in a register
 *   REGS     registers in a row of a tile; WIDTH is a multiple of REGS * LANES
 *   ROWS     rows of a tile; WIDTH is a multiple of it
 *   NAME(x)  the name of x in this inclusion
 *   TARGET   the attribute that switches the instruction set on
 *
 * Matrices are kept in panels: WIDTH columns side by side, row after row, with zeros where the
 * matrix has no columns left. A symmetric product reads the same panels from both sides. */

typedef float NAME(lanes) __attribute__((vector_size(LANES * 4), may_alias));
typedef float NAME(loose) __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* sum[i][j] = sum over k of a[i * down + k * along] * b[k * WIDTH + j]; it stays in registers. */
TARGET INLINE void NAME(tile)(int64_t depth, const float *a, int64_t down, int64_t along,
                              const float *b, NAME(lanes) sum[ROWS][REGS]) {
  NAME(lanes) s[ROWS][REGS];
  UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int r = 0; r < REGS; r++)
      s[i][r] = (NAME(lanes)){0};
  const float *at[(ROWS + 2) / 3]; /* more pointers than that do not stay in registers */
  UNROLL for (int i = 0; i < (ROWS + 2) / 3; i++) at[i] = a + 3 * i * down;
  for (int64_t k = 0; k < depth; k++) {
    NAME(lanes) row[REGS];
    UNROLL for (int r = 0; r < REGS; r++) row[r] = *(const NAME(loose) *)(b + r * LANES);
    UNROLL for (int i = 0; i < ROWS; i++) {
      const float one = at[i / 3][i % 3 * down];
      UNROLL for (int r = 0; r < REGS; r++) s[i][r] += one * row[r];
    }
    b += WIDTH;
    UNROLL for (int i = 0; i < (ROWS + 2) / 3; i++) at[i] += along;
  }
  UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int r = 0; r < REGS; r++) sum[i][r] = s[i][r];
}

/* A tile of a symmetric matrix, and its mirror image, into the panels. */
TARGET INLINE void NAME(store)(float *out, int64_t padded, int64_t I, int64_t J, int64_t i,
                               int64_t j, float result[ROWS][REGS * LANES]) {
  for (int r = 0; r < ROWS; r++)
    memcpy(out + J * padded * WIDTH + (I * WIDTH + i + r) * WIDTH + j, result[r], sizeof result[r]);
  if (I != J)
    for (int c = 0; c < REGS * LANES; c++)
      for (int r = 0; r < ROWS; r++)
        out[I * padded * WIDTH + (J * WIDTH + j + c) * WIDTH + i + r] = result[r][c];
}

/* out = xᵀ x in panels, less the unit matrix where `unit`; returns the sum of its squares. Only
 * panels on and above the diagonal are computed. Sums of more than `piece` terms are run in pieces
 * of that many, which are added in double. */
TARGET static NOINLINE double NAME(symmetric)(const float *x, int64_t length, int64_t side, int unit,
                                              int64_t piece, float *out) {
  const int64_t panels = (side + WIDTH - 1) / WIDTH, padded = panels * WIDTH;
  double total = 0;
  for (int64_t J = 0; J < panels; J++)
    for (int64_t I = 0; I <= J; I++)
      for (int64_t i = 0; i < WIDTH && I * WIDTH + i < side; i += ROWS)
        for (int64_t j = 0; j < WIDTH && J * WIDTH + j < side; j += REGS * LANES) {
          const float *a = x + I * length * WIDTH + i, *b = x + J * length * WIDTH + j;
          NAME(lanes) sum[ROWS][REGS];
          float result[ROWS][REGS * LANES];
          if (length <= piece) {
            NAME(tile)(length, a, 1, WIDTH, b, sum);
            memcpy(result, sum, sizeof result);
            for (int r = 0; unit && r < ROWS; r++) {
              int64_t at = I * WIDTH + i + r - J * WIDTH - j;
              if (at >= 0 && at < REGS * LANES && I * WIDTH + i + r < side) result[r][at] -= 1;
            }
          } else {
            double whole[ROWS][REGS * LANES] = {0};
            for (int64_t k = 0; k < length; k += piece) {
              NAME(tile)(length - k < piece ? length - k : piece, a + k * WIDTH, 1, WIDTH,
                         b + k * WIDTH, sum);
              memcpy(result, sum, sizeof result);
              for (int r = 0; r < ROWS; r++)
                for (int c = 0; c < REGS * LANES; c++) whole[r][c] += (double)result[r][c];
            }
            for (int r = 0; unit && r < ROWS; r++) {
              int64_t at = I * WIDTH + i + r - J * WIDTH - j;
              if (at >= 0 && at < REGS * LANES && I * WIDTH + i + r < side) whole[r][at] -= 1;
            }
            for (int r = 0; r < ROWS; r++)
              for (int c = 0; c < REGS * LANES; c++)
                result[r][c] = (float)whole[r][c];
          }
          NAME(store)(out, padded, I, J, i, j, result);
          NAME(lanes) squares = {0};
          for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < REGS; c++) {
              NAME(lanes) v = *(const NAME(loose) *)(result[r] + c * LANES);
              squares += v * v;
            }
          for (int l = 0; l < LANES; l++) total += (I == J ? 1.0 : 2.0) * squares[l];
        }
  return total;
}

/* out = xᵀ y + yᵀ x in panels. */
TARGET static NOINLINE void NAME(between)(const float *x, const float *y, int64_t length,
                                          int64_t side, float *out) {
  const int64_t panels = (side + WIDTH - 1) / WIDTH, padded = panels * WIDTH;
  for (int64_t J = 0; J < panels; J++)
    for (int64_t I = 0; I <= J; I++)
      for (int64_t i = 0; i < WIDTH && I * WIDTH + i < side; i += ROWS)
        for (int64_t j = 0; j < WIDTH && J * WIDTH + j < side; j += REGS * LANES) {
          const int64_t a = I * length * WIDTH + i, b = J * length * WIDTH + j;
          NAME(lanes) one[ROWS][REGS], other[ROWS][REGS];
          float result[ROWS][REGS * LANES];
          NAME(tile)(length, x + a, 1, WIDTH, y + b, one);
          NAME(tile)(length, y + a, 1, WIDTH, x + b, other);
          for (int r = 0; r < ROWS; r++)
            for (int c = 0; c < REGS; c++) one[r][c] += other[r][c];
          memcpy(result, one, sizeof result);
          NAME(store)(out, padded, I, J, i, j, result);
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
          NAME(tile)(k, rows + r * pitch, pitch, 1, p + J * padded * WIDTH + j, sum);
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
        NAME(tile)(n, a, 1, WIDTH, columns + j, sum);
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
