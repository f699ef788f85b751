/* Included by statistics.c once for floats and once for doubles, with
 *   NAME(x)   x with a suffix for this type
 *   REAL      the type of the numbers
 *   WORD      the unsigned integer of their bits, and SIGNED the signed one
 *   NEGATIVE  the sign bit
 *   INF       the bits of infinity: magnitudes from here on are inf or NaN */

/* Reductions of the bits. Where there is a negative value, `umax` is the largest negative magnitude
 * and `smin` the smallest; where there is another, `smax` is the largest and `umin` the smallest of
 * those. */
typedef struct {
  WORD smin, smax, umin, umax;
} NAME(span);

INLINE WORD NAME(largest)(NAME(span) s) {
  WORD positive = s.smax & NEGATIVE ? 0 : s.smax;
  WORD negative = s.umax & NEGATIVE ? s.umax & ~NEGATIVE : 0;
  return positive > negative ? positive : negative;
}

INLINE WORD NAME(smallest)(NAME(span) s) {
  WORD positive = s.umin & NEGATIVE ? ~NEGATIVE : s.umin;
  WORD negative = s.smin & NEGATIVE ? s.smin & ~NEGATIVE : ~NEGATIVE;
  return positive < negative ? positive : negative;
}

INLINE double NAME(value)(WORD bits) {
  REAL value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

/* The slow road, past inf and NaN. */
INLINE void NAME(add_finite)(moments *out, const REAL *x, size_t m) {
  const WORD *bits = (const WORD *)x;
  for (size_t k = 0; k < m; k++) {
    if ((bits[k] & ~NEGATIVE) >= INF) {
      out->nonfinite++;
      continue;
    }
    double value = x[k];
    out->sum += value;
    out->squares += value * value;
    lower(&out->min, value);
    lift(&out->max, value);
    out->zeros += value == 0;
  }
}

/* One block into `out`. */
INLINE NAME(span) NAME(add)(moments *out, const REAL *x, size_t m) {
  const WORD *bits = (const WORD *)x;
  double sum = 0, squares = 0;
  SIGNED smin = (SIGNED)~NEGATIVE, smax = (SIGNED)NEGATIVE;
  WORD umin = ~(WORD)0, umax = 0;
  for (size_t k = 0; k < m; k++) {
    double value = x[k];
    sum += value;
    squares += value * value; /* exact where x is a float */
    WORD u = bits[k];
    SIGNED s = (SIGNED)u;
    smin = s < smin ? s : smin;
    smax = s > smax ? s : smax;
    umin = u < umin ? u : umin;
    umax = u > umax ? u : umax;
  }
  NAME(span) seen = {(WORD)smin, (WORD)smax, umin, umax};
  if (NAME(largest)(seen) >= INF) {
    NAME(add_finite)(out, x, m);
    return seen;
  }
  out->sum += sum;
  out->squares += squares;
  lower(&out->min, NAME(value)(umax & NEGATIVE ? umax : umin));
  lift(&out->max, NAME(value)(seen.smax & NEGATIVE ? umin : seen.smax));
  if (NAME(smallest)(seen) == 0) {
    uint32_t zeros = 0;
    for (size_t k = 0; k < m; k++) zeros += (bits[k] & ~NEGATIVE) == 0;
    out->zeros += zeros;
  }
  return seen;
}

#undef NAME
#undef REAL
#undef WORD
#undef SIGNED
#undef NEGATIVE
#undef INF
