/* The three products of a block-sparse matrix on the CPU. Called by block_sparse.py through ctypes;
 * the twin in plain torch is ../sparse/reference.py.
 *
 *   y  = x · wᵀ + bias   samples x in  ->  samples x out
 *   gx = g · w           samples x out ->  samples x in
 *   gw = gᵀ · x          at the stored blocks only
 *
 * with w as blocks of p x q, row by row. Every index is checked before it is used. The arithmetic
 * is in block_sparse.h, compiled for each instruction set that is worth it and chosen when it runs.
 *
 * The work is cut into units that write to places of their own, each summed in a fixed order: the
 * result does not depend on the number of threads. Threads live for one call: no pool, nothing to
 * break at fork, and no second OpenMP runtime beside the one that torch brings. */

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

enum {
  PANEL = 528,  /* samples that are looked at together; a multiple of 24, of all tiles' rows */
  DEPTH = 256,  /* terms of a sum that run together: with WIDTH columns, they fit into the cache */
  WIDTH = 64,
  AHEAD = 12,   /* rows that are fetched before they are needed */
  CACHE = 1 << 20, /* bytes of a core's cache */
  MAX_THREADS = 256
};
enum product { PRODUCT, TRANSPOSED, SAMPLED };
enum start { FROM_NOTHING, FROM_RESULT, FROM_BIAS };
enum kind { FLOAT32, FLOAT64, BFLOAT16_PAIRS };
enum { DONE, BAD_INDEX, NO_KERNEL };

typedef struct {
  int64_t samples, out, in, p, q, R, C, E;
  const int64_t *row_starts, *columns, *column_starts, *rows, *order;
  const void *x, *w, *bias; /* g instead of x for TRANSPOSED; g and x for SAMPLED */
  void *y;
} job;

/* Some terms of a sum: where they begin in each row of a, how many, and their rows of b. */
typedef struct piece {
  int64_t a, depth;
  const void *b;
} piece;

/* How much of block number `at` of size `step` lies inside `size`. */
INLINE int64_t extent(int64_t at, int64_t step, int64_t size) {
  return size - at * step < step ? size - at * step : step;
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
typedef float four __attribute__((vector_size(16), may_alias));
#endif
#endif

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(x) JOIN(x, SUFFIX)

#define ADD(sum, a, b) ((sum) + (a) * (b))
#define REAL float
#define TARGET
#define SUFFIX f32
#define LANES 4
#define REGS 2
#include "block_sparse.h"
#undef REAL
#undef SUFFIX
#undef LANES
#define REAL double
#define SUFFIX f64
#define LANES 2
#include "block_sparse.h"
#undef TARGET
#undef REAL
#undef SUFFIX
#undef LANES

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define REAL float
#define SUFFIX f32_avx2
#define LANES 8
#include "block_sparse.h"
#undef REAL
#undef SUFFIX
#undef LANES
#define REAL double
#define SUFFIX f64_avx2
#define LANES 4
#include "block_sparse.h"
#undef TARGET
#undef REAL
#undef SUFFIX
#undef LANES
#undef REGS
#define REGS 4
#define TARGET __attribute__((target("avx512f,fma")))
#define REAL float
#define SUFFIX f32_avx512
#define LANES 16
#include "block_sparse.h"
#undef REAL
#undef SUFFIX
#undef LANES
#define REAL double
#define SUFFIX f64_avx512
#define LANES 8
#include "block_sparse.h"
#if defined(__clang__) || __GNUC__ >= 12
#define BFLOAT16
#include "block_sparse_bf16.h"
#endif
#endif

typedef struct {
  void (*product)(const job *, int64_t, int64_t, int64_t);
  void (*transposed)(const job *, int64_t, int64_t, int64_t);
  void (*sampled)(const job *, int64_t, int64_t, int64_t, int64_t);
} kernels;

#define KERNELS(suffix) \
  (kernels) { product_##suffix, transposed_##suffix, sampled_##suffix }

#define NONE \
  (kernels) { NULL, NULL, NULL }

/* level: 0 the processor's baseline, 1 AVX2, 2 AVX-512; less where the processor has less, and where
 * half a wide register would stay empty. */
static kernels choose(enum kind kind, int level, int64_t width) {
  const int is_double = kind == FLOAT64;
#ifdef BFLOAT16
  if (kind == BFLOAT16_PAIRS && level >= 2 && __builtin_cpu_supports("avx512bf16"))
    return KERNELS(bf16);
#endif
  if (kind == BFLOAT16_PAIRS) return NONE;
#if defined(__x86_64__)
  const int64_t lanes = is_double ? 8 : 16;
  if (level >= 2 && width % lanes != 0 && width % lanes <= lanes / 2) level = 1;
  if (level >= 2 && __builtin_cpu_supports("avx512f"))
    return is_double ? KERNELS(f64_avx512) : KERNELS(f32_avx512);
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return is_double ? KERNELS(f64_avx2) : KERNELS(f32_avx2);
#else
  (void)level, (void)width;
#endif
  return is_double ? KERNELS(f64) : KERNELS(f32);
}

/* ---- many units, many threads ---------------------------------------------------------------- */

typedef struct {
  job it;
  kernels kernel;
  enum product which;
  int64_t units, panels, step; /* step: samples of a panel, or that SAMPLED looks at together */
  atomic_llong next;
} work;

static void *labour(void *argument) {
  work *w = argument;
  for (;;) {
    const int64_t unit = atomic_fetch_add_explicit(&w->next, 1, memory_order_relaxed);
    if (unit >= w->units) return NULL;
    if (w->which == SAMPLED) {
      const int64_t top = w->it.R * unit / w->units, end = w->it.R * (unit + 1) / w->units;
      for (int64_t s = 0; s == 0 || s < w->it.samples; s += w->step)
        for (int64_t r = top; r < end; r++)
          for (int64_t e = w->it.row_starts[r]; e < w->it.row_starts[r + 1]; e++)
            w->kernel.sampled(&w->it, r, e, s,
                              s + w->step < w->it.samples ? s + w->step : w->it.samples);
      continue;
    }
    /* Neighbouring units share a panel of samples, which stays in the cache they share. */
    const int64_t groups = w->which == PRODUCT ? w->it.R : w->it.C;
    const int64_t first = unit / groups * w->step;
    const int64_t last = first + w->step < w->it.samples ? first + w->step : w->it.samples;
    (w->which == PRODUCT ? w->kernel.product : w->kernel.transposed)(&w->it, unit % groups, first,
                                                                     last);
  }
}

static int ascends(const int64_t *starts, int64_t n, int64_t end) {
  if (starts[0] != 0 || starts[n] != end) return 0;
  for (int64_t i = 0; i < n; i++)
    if (starts[i] > starts[i + 1]) return 0;
  return 1;
}

static int below(const int64_t *values, int64_t n, int64_t limit) {
  int good = 1;
  for (int64_t i = 0; i < n; i++) good &= values[i] >= 0 && values[i] < limit;
  return good;
}

/* Whether the blocks by columns are those by rows, for tensors that are in range each by itself. */
static int same_blocks(const job *it) {
  for (int64_t c = 0; c < it->C; c++)
    for (int64_t j = it->column_starts[c]; j < it->column_starts[c + 1]; j++) {
      const int64_t r = it->rows[j], e = it->order[j];
      if (it->columns[e] != c || e < it->row_starts[r] || e >= it->row_starts[r + 1]) return 0;
      if (j > it->column_starts[c] && it->rows[j - 1] >= r) return 0;
    }
  return 1;
}

__attribute__((visibility("default"))) int learnables_block_sparse(
    int which, int kind, int level, int threads, int64_t samples, int64_t out, int64_t in,
    int64_t p, int64_t q, int64_t E, const int64_t *row_starts, const int64_t *columns,
    const int64_t *column_starts, const int64_t *rows, const int64_t *order, const void *x,
    const void *weight, const void *bias, void *y) {
  work w = {.which = (enum product)which};
  w.it = (job){samples, out,     in,            p,    q,     (out + p - 1) / p, (in + q - 1) / q,
               E,       row_starts, columns, column_starts, rows, order, x,
               weight,  bias,    y};
  if (!ascends(row_starts, w.it.R, E) || !below(columns, E, w.it.C)) return BAD_INDEX;
  if (which == TRANSPOSED && (!ascends(column_starts, w.it.C, E) || !below(rows, E, w.it.R) ||
                              !below(order, E, E) || !same_blocks(&w.it)))
    return BAD_INDEX;
  w.kernel = choose((enum kind)kind, level, which == PRODUCT ? p : q);
  if (!w.kernel.product) return NO_KERNEL;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (which == SAMPLED) {
    /* Samples that fit into a core's cache go past all blocks before the next ones come. */
    w.step = CACHE / ((kind == FLOAT64 ? 8 : 4) * (in + out));
    w.step = w.step < 128 ? 128 : w.step / 8 * 8;
    if (kind == BFLOAT16_PAIRS) w.step = samples ? samples : 1;
    w.units = threads < 2 ? 1 : w.it.R < 4 * threads ? w.it.R : 4 * threads;
  } else {
    w.panels = (samples + PANEL - 1) / PANEL;
    w.step = w.panels ? (samples + w.panels - 1) / w.panels : 1;
    w.step = w.step > 24 ? (w.step + 23) / 24 * 24 : w.step;
    w.units = w.panels * (which == PRODUCT ? w.it.R : w.it.C);
  }
  pthread_t helpers[MAX_THREADS];
  int started = 0;
  if (threads > w.units) threads = (int)w.units;
  while (started < threads - 1 && !pthread_create(helpers + started, NULL, labour, &w)) started++;
  labour(&w);
  while (started) pthread_join(helpers[--started], NULL);
  return DONE;
}
