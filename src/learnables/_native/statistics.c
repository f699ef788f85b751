/* One pass over many arrays: moments, extrema, zeros, non-finite values, and a histogram by sign
 * and exponent. Called by statistics.py through ctypes; the pure-torch twin is in ../stats.py.
 *
 * Everything but the two sums is read off the bits. As integers, the bits of floats of one sign
 * are in the order of their magnitudes, so four integer reductions (signed and unsigned, minimum
 * and maximum) give min, max, the largest and the smallest magnitude, whether there is a zero,
 * whether there is an inf or NaN, and whether all values share one bin. Only a block that holds
 * a zero or something non-finite is looked at again, while it is in the L1 cache.
 *
 * The histogram is bound by its stores, so one store counts two values: nearly all exponents of a
 * chunk lie in a window of 31, hence sign and exponent fit into 6 bits, and a pair of values into a
 * table of 4096. What lies below the window is counted one by one.
 *
 * Arrays are cut into chunks at fixed places and each chunk's sums are added in order: the result
 * does not depend on the number of threads. Threads live for one call: no pool, nothing to break
 * at fork, and no second OpenMP runtime beside the one that torch brings. */

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines; the twin in torch serves the others"
#endif

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK = 2048, CHUNK = 1 << 17, BINS = 512, COPIES = 2, MAX_THREADS = 256 };
enum { WINDOW = 31, SLOTS = 64, WORTH_A_TABLE = 1 << 14 };
enum kind { FLOAT32, FLOAT64, FLOAT16, BFLOAT16 };

#define INLINE static inline __attribute__((always_inline))
#define SIGN 0x80000000u

/* The same memory is read as floats and as bits. */
typedef uint32_t word __attribute__((may_alias));
typedef uint64_t word64 __attribute__((may_alias));
typedef float real __attribute__((may_alias));
typedef double real64 __attribute__((may_alias));

typedef struct {
  double sum, squares, min, max; /* of the finite values */
  int64_t zeros, nonfinite;
} moments;

/* Two counts per increment: table[slot of one | slot of the other << 6][copy]. A slot is the sign
 * (32) plus the exponent above `base`, 1 to 31; slots 0 and 32 stand for "at or below base", which
 * is counted elsewhere. Two copies, because an increment waits for the one before it to the same
 * place; side by side, because addresses 4096 apart look the same to the processor's store queue. */
typedef struct {
  uint32_t table[SLOTS * SLOTS][COPIES];
  int base; /* the exponent below the window; NO_TABLE: count one by one; EMPTY: not yet chosen */
} window;
enum { NO_TABLE = -2, EMPTY = -1 };

/* ---- one block, in L1: moments ----------------------------------------------------------------- */

INLINE void lower(double *x, double y) { *x = y < *x ? y : *x; }
INLINE void lift(double *x, double y) { *x = y > *x ? y : *x; }

#define NAME(x) x##_float32
#define REAL real
#define WORD word
#define SIGNED int32_t
#define NEGATIVE SIGN
#define INF 0x7f800000u
#include "statistics_reader.h"

#define NAME(x) x##_float64
#define REAL real64
#define WORD word64
#define SIGNED int64_t
#define NEGATIVE 0x8000000000000000u
#define INF 0x7ff0000000000000u
#include "statistics_reader.h"

/* ---- other dtypes, as the bits of floats ----------------------------------------------------- */

/* The exponent of a double brought into 0..255, and its sign: all that the histogram looks at. */
INLINE word narrowed(uint32_t high_half) {
  uint32_t exponent = high_half >> 20 & 0x7ff;
  uint32_t clamped = exponent > 1023 - 127 ? exponent - (1023 - 127) : 0;
  return (clamped < 255 ? clamped : 255) << 23 | (high_half & SIGN);
}

INLINE void narrow_float64(const word *halves, size_t m, word *bits) {
  for (size_t k = 0; k < m; k++) bits[k] = narrowed(halves[2 * k + 1]); /* little-endian */
}

/* Narrowing keeps the order of the bits, so it maps the reductions to the reductions. */
INLINE span_float32 narrow_span(span_float64 s) {
  return (span_float32){narrowed(s.smin >> 32), narrowed(s.smax >> 32), narrowed(s.umin >> 32),
                           narrowed(s.umax >> 32)};
}

INLINE void widen_bfloat16(const uint16_t *x, size_t m, word *bits) {
  for (size_t k = 0; k < m; k++) bits[k] = (uint32_t)x[k] << 16;
}

/* Integer arithmetic but for one subtraction that turns a subnormal half into a normal float;
 * no instruction set is asked for. */
INLINE void widen_float16(const uint16_t *x, size_t m, word *bits) {
  for (size_t k = 0; k < m; k++) {
    uint32_t half = x[k], magnitude = (half & 0x7fffu) << 13, exponent = magnitude & 0x0f800000u;
    uint32_t normal = magnitude + (112u << 23);
    uint32_t special = magnitude + (224u << 23);
    uint32_t raised = magnitude + (113u << 23), lifted;
    float value;
    memcpy(&value, &raised, 4);
    value -= 0x1p-14f;
    memcpy(&lifted, &value, 4);
    uint32_t wide = exponent == 0 ? lifted : exponent == 0x0f800000u ? special : normal;
    bits[k] = wide | (half & 0x8000u) << 16;
  }
}

/* ---- histogram ------------------------------------------------------------------------------ */

INLINE void count_singly(uint32_t *bins, const word *bits, size_t m) {
  for (size_t k = 0; k < m; k++) bins[bits[k] >> 23]++;
}

INLINE void empty(window *w, uint32_t *bins) {
  if (w->base < 0) return;
  uint32_t slots[SLOTS] = {0};
  for (int other = 0; other < SLOTS; other++)
    for (int slot = 0; slot < SLOTS; slot++) {
      const uint32_t *copies = w->table[other << 6 | slot];
      uint32_t pairs = copies[0] + copies[1];
      slots[slot] += pairs;
      slots[other] += pairs;
    }
  for (int slot = 1; slot <= WINDOW; slot++) {
    if (slots[slot]) bins[w->base + slot] += slots[slot];
    if (slots[slot + 32]) bins[256 + w->base + slot] += slots[slot + 32];
  }
  memset(w->table, 0, sizeof w->table);
  w->base = EMPTY;
}

INLINE void count_pairs(window *w, const word *bits, size_t m, const char *ahead) {
  const word *second = bits + m / 2;
  uint16_t pair[BLOCK / 2], under = (uint16_t)(w->base << 7);
  for (size_t k = 0; k < m / 2; k++) {
    uint16_t a = (uint16_t)(bits[k] >> 16), b = (uint16_t)(second[k] >> 16);
    uint16_t x = a & 0x7fff, y = b & 0x7fff;
    x = x > under ? x : under;
    y = y > under ? y : under;
    x = (uint16_t)(x - under) >> 7;
    y = (uint16_t)(y - under) >> 7;
    pair[k] = (uint16_t)(x | a >> 15 << 5 | y << 6 | b >> 15 << 11);
  }
  size_t k = 0;
  for (; k + 8 <= m / 2; k += 8) {
    __builtin_prefetch(ahead + 8 * k); /* the next block, while this one keeps the stores busy */
    for (int j = 0; j < 8; j++) w->table[pair[k + j]][j % COPIES]++;
  }
  for (; k < m / 2; k++) w->table[pair[k]][0]++;
}

/* Values at or below the window's base: nearly always only zeros. */
INLINE void count_low(uint32_t *bins, const word *bits, size_t m, int base) {
  uint32_t limit = (uint32_t)(base + 1) << 23, low = 0, zeros = 0, negative = 0;
  for (size_t k = 0; k < m; k++) {
    low += (bits[k] & ~SIGN) < limit;
    zeros += (bits[k] & ~SIGN) == 0;
    negative += bits[k] == SIGN;
  }
  bins[0] += zeros - negative;
  bins[256] += negative;
  if (low == zeros) return;
  for (size_t k = 0; k < m; k++)
    if ((bits[k] & ~SIGN) - 1 < limit - 1) bins[bits[k] >> 23]++; /* 0 - 1 is large */
}

INLINE void count(window *w, uint32_t *bins, const word *bits, size_t m, span_float32 s,
                  const char *ahead) {
  if (s.umin >> 23 == s.umax >> 23) {
    bins[s.umin >> 23] += (uint32_t)m;
    return;
  }
  int top = (int)(largest_float32(s) >> 23);
  if (w->base == NO_TABLE || m < BLOCK || top == 255) {
    count_singly(bins, bits, m);
    return;
  }
  if (w->base == EMPTY || top > w->base + WINDOW || top < w->base + WINDOW / 2) {
    empty(w, bins);
    w->base = top + 1 > WINDOW ? top + 1 - WINDOW : 0; /* room for one exponent more */
  }
  count_pairs(w, bits, m, ahead);
  if ((int)(smallest_float32(s) >> 23) <= w->base) count_low(bins, bits, m, w->base);
}

/* ---- one chunk ------------------------------------------------------------------------------ */

INLINE void chunk(const char *data, size_t n, enum kind kind, moments *out, uint32_t *bins) {
  static const size_t sizes[] = {4, 8, 2, 2};
  size_t size = sizes[kind];
  word buffer[BLOCK];
  window w;
  w.base = bins && n >= WORTH_A_TABLE ? EMPTY : NO_TABLE;
  if (w.base == EMPTY) memset(w.table, 0, sizeof w.table);
  for (size_t i = 0; i < n; i += BLOCK) {
    size_t m = n - i < BLOCK ? n - i : BLOCK;
    const char *here = data + i * size;
    const word *bits = buffer;
    span_float32 s;
    if (kind == FLOAT64) {
      s = narrow_span(add_float64(out, (const real64 *)here, m));
      if (bins) narrow_float64((const word *)here, m, buffer);
    } else {
      if (kind == FLOAT32) bits = (const word *)here;
      if (kind == FLOAT16) widen_float16((const uint16_t *)here, m, buffer);
      if (kind == BFLOAT16) widen_bfloat16((const uint16_t *)here, m, buffer);
      s = add_float32(out, (const real *)bits, m);
    }
    if (bins) count(&w, bins, bits, m, s, here + BLOCK * size);
  }
  if (bins) empty(&w, bins);
}

/* The same code for the instruction sets that are worth it, chosen when it runs. */
#define VERSION(name, target)                                                                   \
  target static void name(const char *data, size_t n, enum kind kind, moments *out,             \
                          uint32_t *bins) {                                                     \
    if (kind == FLOAT32) chunk(data, n, FLOAT32, out, bins);                                    \
    if (kind == FLOAT64) chunk(data, n, FLOAT64, out, bins);                                    \
    if (kind == FLOAT16) chunk(data, n, FLOAT16, out, bins);                                    \
    if (kind == BFLOAT16) chunk(data, n, BFLOAT16, out, bins);                                  \
  }
typedef void version(const char *, size_t, enum kind, moments *, uint32_t *);

VERSION(chunk_baseline, )
#if defined(__x86_64__)
VERSION(chunk_avx2, __attribute__((target("avx2,fma"))))
#endif

static version *best(int baseline) {
  (void)baseline; /* where there is only one */
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!baseline && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return chunk_avx2;
#endif
  return chunk_baseline;
}

/* ---- many arrays, many threads -------------------------------------------------------------- */

typedef struct {
  int64_t row;
  const char *data;
  size_t n;
  enum kind kind;
} task;

typedef struct {
  const task *tasks;
  moments *partial;
  int64_t total, next;
  int64_t *histogram;
  version *run;
} work;

static void *labour(void *argument) {
  work *w = argument;
  for (;;) {
    int64_t i = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED);
    if (i >= w->total) return NULL;
    const task *t = w->tasks + i;
    uint32_t bins[BINS];
    if (w->histogram) memset(bins, 0, sizeof bins);
    w->run(t->data, t->n, t->kind, w->partial + i, w->histogram ? bins : NULL);
    if (!w->histogram) continue;
    int64_t *row = w->histogram + t->row * BINS;
    for (int b = 0; b < BINS; b++) /* integers: the order of the threads changes nothing */
      if (bins[b]) __atomic_fetch_add(row + b, bins[b], __ATOMIC_RELAXED);
  }
}

/* `moment` has five rows of `rows` doubles: sum, sum of squares, absmax, min, max. `integer` has
 * two rows: zeros, non-finite. `histogram` has `rows` times 512 zeros, or is NULL. Returns 0, or 1
 * when there is no memory for the lists. */
__attribute__((visibility("default"))) int learnables_statistics(
    int64_t rows, const void *const *data, const int64_t *counts, const uint8_t *kinds,
    double *moment, int64_t *integer, int64_t *histogram, int threads, int baseline) {
  static const size_t sizes[] = {4, 8, 2, 2};
  int64_t total = 0;
  for (int64_t r = 0; r < rows; r++) total += (counts[r] + CHUNK - 1) / CHUNK;
  task *tasks = malloc(sizeof *tasks * (size_t)(total + 1));
  moments *partial = malloc(sizeof *partial * (size_t)(total + 1));
  if (!tasks || !partial) {
    free(tasks);
    free(partial);
    return 1;
  }
  int64_t i = 0;
  for (int64_t r = 0; r < rows; r++)
    for (int64_t from = 0; from < counts[r]; from += CHUNK, i++) {
      size_t n = (size_t)(counts[r] - from < CHUNK ? counts[r] - from : CHUNK);
      tasks[i] = (task){r, (const char *)data[r] + (size_t)from * sizes[kinds[r]], n, kinds[r]};
      partial[i] = (moments){0, 0, 1.0 / 0.0, -1.0 / 0.0, 0, 0};
    }

  work w = {tasks, partial, total, 0, histogram, best(baseline)};
  pthread_t helpers[MAX_THREADS];
  int started = 0;
  if (threads > total) threads = (int)total;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  while (started < threads - 1 && !pthread_create(helpers + started, NULL, labour, &w)) started++;
  labour(&w); /* a thread that could not be had only makes it slower */
  while (started) pthread_join(helpers[--started], NULL);

  i = 0;
  for (int64_t r = 0; r < rows; r++) {
    moments all = {0, 0, 1.0 / 0.0, -1.0 / 0.0, 0, 0};
    for (int64_t from = 0; from < counts[r]; from += CHUNK, i++) {
      all.sum += partial[i].sum;
      all.squares += partial[i].squares;
      lower(&all.min, partial[i].min);
      lift(&all.max, partial[i].max);
      all.zeros += partial[i].zeros;
      all.nonfinite += partial[i].nonfinite;
    }
    double absmax = all.max > -all.min ? all.max : -all.min;
    moment[r] = all.sum;
    moment[rows + r] = all.squares;
    moment[2 * rows + r] = absmax > 0 ? absmax : 0; /* no finite value: max is -inf */
    moment[3 * rows + r] = all.min + 0.0;
    moment[4 * rows + r] = all.max + 0.0;
    integer[r] = all.zeros;
    integer[rows + r] = all.nonfinite;
  }
  free(tasks);
  free(partial);
  return 0;
}
