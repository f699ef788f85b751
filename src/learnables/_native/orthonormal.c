/* Brings matrices that one optimizer step has moved back to orthonormal columns (rows, where they
 * are wide), in place. Called by orthonormal.py through ctypes; its twin in torch, with the reasons
 * for the series, is `_seen` in ../sets/polar.py.
 *
 * One matrix at a time, while it is in the cache: the Gram matrix, its square where the step was
 * large, the sum of both applied. Nothing is stacked and nothing copied back. The arithmetic is in
 * orthonormal.h, compiled for each instruction set that is worth it and chosen when it runs; the
 * square, a small term, is taken in bfloat16 where the processor multiplies that (orthonormal_bf16.h).
 *
 * A matrix is the work of one thread: the result does not depend on their number. Threads live for
 * one call: no pool, nothing to break at fork, no second OpenMP runtime beside torch's. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

enum {
  WIDTH = 32,     /* columns of a panel */
  TOGETHER = 64,  /* rows that share a panel of p while it is in the cache; a multiple of ROWS */
  SHORT = 128,    /* terms of a sum whose rounding in fp32 does not show */
  ROUGH = 64,     /* terms that run together in fp32 where the series will leave more, */
  FINE = 16,      /* and where their rounding is all that it leaves */
  PASSES = 6,
  MAX_THREADS = 256
};
#define ROUNDED 8e-3 /* of E² from E in bfloat16, relative: 2⁻⁷ at most where nothing cancels */
enum code { DONE = 0, NONFINITE = 1, FAR = 4 }; /* FAR: untouched, needs a decomposition */

#ifdef __has_builtin
#if __has_builtin(__builtin_shufflevector)
#define INTERLEAVED __builtin_shufflevector
#define LOW_4 0, 4, 1, 5
#define HIGH_4 2, 6, 3, 7
#define LOW_8 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH_8 4, 12, 5, 13, 6, 14, 7, 15
#define LOW_16 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH_16 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#endif
#endif

#define JOIN2(a, b) a##_##b
#define JOIN(a, b) JOIN2(a, b)
#define NAME(x) JOIN(x, SUFFIX)

#define ADD(sum, a, b) ((sum) + (a) * (b))
#define TARGET
#define SUFFIX baseline
#define LANES 4
#define REGS 2
#define ROWS 4
#include "orthonormal.h"
#undef TARGET
#undef SUFFIX
#undef LANES
#undef ROWS

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma")))
#define SUFFIX avx2
#define LANES 8
#define ROWS 4
#include "orthonormal.h"
#undef TARGET
#undef SUFFIX
#undef LANES
#undef ROWS
#define TARGET __attribute__((target("avx512f,fma")))
#define SUFFIX avx512
#define LANES 16
#define ROWS 8
#include "orthonormal.h"
#include "orthonormal_bf16.h"
#endif

typedef struct {
  double (*symmetric)(const float *, int64_t, int64_t, int64_t, int64_t, int, int64_t, float *);
  double (*glance)(const float *, int64_t, int64_t, const float *, float *);
  void (*between)(const float *, const float *, int64_t, int64_t, float *);
  void (*tall)(const float *, float *, int64_t, int64_t, const float *, float *);
  void (*wide)(const float *, float *, int64_t, int64_t, const float *, float *);
  void (*mix)(int64_t, float, const float *, float, const float *, float *);
  double (*square)(const float *, int64_t, int64_t, float *, float *); /* NULL: none in bfloat16 */
} arithmetic;

#define ALL(suffix)                                                                          \
  {symmetric_##suffix,  glance_##suffix,     between_##suffix,                               \
   apply_tall_##suffix, apply_wide_##suffix, mix_##suffix,     NULL}

static arithmetic best(int level) {
  (void)level; /* where there is only one */
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level >= 2 && __builtin_cpu_supports("avx512f")) {
    arithmetic found = ALL(avx512);
    if (level >= 3 && __builtin_cpu_supports("avx512bf16")) found.square = square_bf16;
    return found;
  }
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return (arithmetic)ALL(avx2);
#endif
  return (arithmetic)ALL(baseline);
}

typedef struct {
  int64_t count, n, k, next, room;
  float *const *data;
  float *const *gradients; /* NULL: bring the matrices back; else take these to the tangent space */
  float *scratch;
  uint8_t *codes;
  double near, attainable, goal;
  arithmetic run;
  int free; /* which part of the scratch the next thread takes */
} work;

/* The columns of a tall matrix, or the rows of a wide one, in panels. */
static void pack(const float *w, int64_t n, int64_t k, float *x) {
  const int tall = n >= k;
  const int64_t side = tall ? k : n, length = tall ? n : k;
  for (int64_t at = 0; at < side; at += WIDTH, x += length * WIDTH) {
    const int64_t wide = side - at < WIDTH ? side - at : WIDTH;
    if (wide < WIDTH) memset(x, 0, (size_t)(length * WIDTH) * sizeof *x);
    if (tall) {
      for (int64_t r = 0; r < length; r++)
        memcpy(x + r * WIDTH, w + r * k + at, (size_t)wide * sizeof *x);
    } else {
      for (int64_t from = 0; from < length; from += 16) /* a cache line of w at a time */
        for (int64_t c = 0; c < wide; c++)
          for (int64_t r = from; r < length && r < from + 16; r++)
            x[r * WIDTH + c] = w[(at + c) * k + r];
    }
  }
}

/* What the series up to the square leaves, 5/8 ‖E³ − aE‖ and its next term, at most: of all spectra
 * with given p2 = Σλ² and p4 = Σλ⁴, Σλ⁶ is largest for one large λ² and the others equal. */
static double bound(double p2, double p4, double side) {
  if (side == 1) return 0.55 * p4;
  const double rest = side - 1, root = sqrt(fmax(p2 * p2 - side * (p2 * p2 - rest * p4), 0));
  const double a = fmin((p2 + root) / side, p2), b = p2 - a;
  const double p6 = a * a * a + b * b * b / (rest * rest);
  return 0.625 * sqrt(fmax(p6 - p4 * p4 / p2, 0)) * (1 + 0.5 * sqrt(sqrt(p4))) + 0.55 * p4;
}

/* Signs that look random, the same in every call. */
static void signs(int64_t side, int64_t padded, float *v) {
  uint32_t random = 2463534242u;
  for (int64_t i = 0; i < padded; i++) {
    random ^= random << 13;
    random ^= random >> 17;
    random ^= random << 5;
    v[i] = i < side ? (random >> 31 ? 1.0f : -1.0f) : 0.0f;
  }
}

/* y = m v for a symmetric matrix in panels, whose columns are its rows. */
static void times(const float *m, int64_t side, const float *v, float *y) {
  const int64_t padded = (side + WIDTH - 1) / WIDTH * WIDTH;
  for (int64_t from = 0; from < padded; from += WIDTH) {
    float sum[WIDTH] = {0};
    for (int64_t i = 0; i < side; i++, m += WIDTH)
      for (int c = 0; c < WIDTH; c++) sum[c] += v[i] * m[c];
    m += (padded - side) * WIDTH;
    memcpy(y + from, sum, sizeof sum);
  }
}

/* The same as seen in one direction of random signs, with what rounding does to the square s:
 * 5/8 (E³ − aE) + 3/4 (s − E²). Sharper where the spectrum is spread out. */
static double probed(const float *e, const float *s, int64_t side, double a, float *v) {
  const int64_t padded = (side + WIDTH - 1) / WIDTH * WIDTH;
  float *ev = v + padded, *eev = ev + padded, *sv = eev + padded, *sev = sv + padded;
  double sum = 0;
  signs(side, padded, v);
  times(e, side, v, ev);
  times(e, side, ev, eev);
  times(s, side, v, sv);
  times(s, side, ev, sev);
  for (int64_t i = 0; i < side; i++) {
    const double left = 0.625 * (sev[i] - a * ev[i]) + 0.75 * ((double)sv[i] - eev[i]);
    sum += left * left;
  }
  return sqrt(sum);
}

static enum code bring(const work *job, float *w, float *scratch) {
  const int tall = job->n >= job->k;
  const int64_t side = tall ? job->k : job->n, length = tall ? job->n : job->k;
  const int64_t padded = (side + WIDTH - 1) / WIDTH * WIDTH;
  float *e = scratch, *s = e + padded * padded, *x = s + padded * padded;
  float *rest = x + padded * length;
  const arithmetic *run = &job->run;
  for (int pass = 0; pass < PASSES; pass++) {
    /* a tall matrix of whole panels can be read where it lies, while rows are near one another */
    const int here = tall && side == padded && length <= SHORT;
    if (!here) pack(w, job->n, job->k, x);
    int64_t piece = SHORT;
    if (length > SHORT) {
      signs(side, padded, rest);
      const double seen = run->glance(x, length, side, rest, rest + padded);
      const double expected = 0.625 * seen * sqrt(seen) / (double)side; /* of a spread spectrum */
      piece = expected <= job->attainable / 4 ? FINE : ROUGH;
    }
    const double p2 = here ? run->symmetric(w, WIDTH, side, length, side, 1, piece, e)
                           : run->symmetric(x, length * WIDTH, WIDTH, length, side, 1, piece, e);
    const double size = sqrt(p2);
    if (!(p2 < INFINITY)) return NONFINITE;
    if (size >= job->near) return FAR;
    if (size <= job->attainable / 4) return DONE;
    double left = 0;
    if (0.75 * p2 <= job->attainable / 10) {
      run->mix(padded * padded, -0.5f, e, 0, s, s);
    } else {
      if (padded > side) /* the product reads whole rows */
        for (int64_t J = 0; J < padded / WIDTH; J++)
          memset(e + (J * padded + side) * WIDTH, 0, (size_t)((padded - side) * WIDTH) * sizeof *e);
      const double p4 =
          run->square ? run->square(e, padded, side, x, s)
                      : run->symmetric(e, padded * WIDTH, WIDTH, padded, side, 0, INT64_MAX, s);
      const double a = p4 / p2, rounded = run->square ? 0.75 * ROUNDED * sqrt(p4) : 0;
      left = bound(p2, p4, (double)side) + rounded;
      if (left > job->goal && left <= 4 * job->goal && side >= 32)
        left = 1.5 * probed(e, s, side, a, rest);
      run->mix(padded * padded, (float)(-0.5 - 0.3125 * a), e, 0.375f, s, s);
    }
    (tall ? run->tall : run->wide)(w, w, job->n, job->k, s, rest);
    if (left <= job->goal) return DONE;
  }
  return DONE;
}

/* g less its part across the set: g − w sym(wᵀg), or g − sym(gwᵀ) w where w is wide. */
static void flatten(const work *job, const float *w, float *g, float *scratch) {
  const int tall = job->n >= job->k;
  const int64_t side = tall ? job->k : job->n, length = tall ? job->n : job->k;
  const int64_t padded = (side + WIDTH - 1) / WIDTH * WIDTH;
  float *s = scratch, *x = s + padded * padded, *y = x + padded * length;
  float *rest = y + padded * length;
  pack(w, job->n, job->k, x);
  pack(g, job->n, job->k, y);
  job->run.between(x, y, length, side, s);
  job->run.mix(padded * padded, -0.5f, s, 0, s, s);
  (tall ? job->run.tall : job->run.wide)(w, g, job->n, job->k, s, rest);
}

static void *labour(void *argument) {
  work *job = argument;
  float *mine = job->scratch + __atomic_fetch_add(&job->free, 1, __ATOMIC_RELAXED) * job->room;
  for (;;) {
    const int64_t i = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (i >= job->count) return NULL;
    if (job->gradients)
      flatten(job, job->data[i], job->gradients[i], mine);
    else
      job->codes[i] = (uint8_t)bring(job, job->data[i], mine);
  }
}

/* Floats of scratch that one thread needs for an n x k matrix. */
__attribute__((visibility("default"))) int64_t learnables_orthonormal_room(int64_t n, int64_t k) {
  const int64_t side = n < k ? n : k, length = n < k ? k : n;
  const int64_t padded = (side + WIDTH - 1) / WIDTH * WIDTH;
  int64_t rest = TOGETHER * (side + 16);
  if (rest < padded * WIDTH) rest = padded * WIDTH;
  if (rest < padded + length) rest = padded + length;
  if (rest < 5 * padded) rest = 5 * padded;
  return (2 * padded * padded + 2 * padded * length + rest + 15) / 16 * 16;
}

static void all(work *job, int threads) {
  pthread_t helpers[MAX_THREADS];
  int started = 0;
  if (threads > job->count) threads = (int)job->count;
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  while (started < threads - 1 && !pthread_create(helpers + started, NULL, labour, job)) started++;
  labour(job); /* a thread that could not be had only makes it slower */
  while (started) pthread_join(helpers[--started], NULL);
}

/* `count` matrices of n x k floats, each in one piece at data[i]. `scratch`: `threads` times the
 * room above, at a multiple of 64 bytes. Writes one code a matrix; returns the largest. */
__attribute__((visibility("default"))) int learnables_orthonormal(
    int64_t count, float *const *data, int64_t n, int64_t k, float *scratch, uint8_t *codes,
    double near, double attainable, double goal, int threads, int level) {
  work job = {.count = count, .n = n, .k = k, .room = learnables_orthonormal_room(n, k),
              .data = data, .scratch = scratch, .codes = codes, .near = near,
              .attainable = attainable, .goal = goal, .run = best(level)};
  all(&job, threads);
  int worst = 0;
  for (int64_t i = 0; i < count; i++)
    if (codes[i] > worst) worst = codes[i];
  return worst;
}

/* The same for the gradients at as many matrices, which are only read. */
__attribute__((visibility("default"))) void learnables_orthonormal_tangent(
    int64_t count, float *const *data, float *const *gradients, int64_t n, int64_t k,
    float *scratch, int threads, int level) {
  work job = {.count = count, .n = n, .k = k, .room = learnables_orthonormal_room(n, k),
              .data = data, .gradients = gradients, .scratch = scratch, .run = best(level)};
  all(&job, threads);
}
