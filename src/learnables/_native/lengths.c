/* Brings the lengths of rows between two bounds, in place: spheres, balls and what lies between.
 * Called by lengths.py through ctypes; its twins in torch are `enforce` of Sphere and Ball. A row is
 * read, measured and scaled while it is in the L1 cache: a tensor passes through the memory once.
 *
 * Threads live for one call: no pool, nothing to break at fork, no second OpenMP runtime. */

#include <math.h>
#include <pthread.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

enum { MAX_THREADS = 256 };
enum code { DONE = 0, NONFINITE = 1, DEGENERATE = 2 };

/* The sum runs in fp32 where neither it nor the smallest square can leave the dtype's range. */
INLINE double length_of(const float *x, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; i++) sum += x[i] * x[i];
  if (sum > 1e-20f && sum < 1e30f) return sqrt((double)sum);
  double wide = 0;
  for (int64_t i = 0; i < n; i++) wide += (double)x[i] * x[i];
  return sqrt(wide);
}

INLINE enum code scaled(float *x, int64_t n, double low, double high) {
  const double length = length_of(x, n);
  if (!(length < INFINITY)) return NONFINITE;
  if (length >= low && length <= high) return DONE;
  if (length == 0) return DEGENERATE;
  const float by = (float)((length < low ? low : high) / length);
  for (int64_t i = 0; i < n; i++) x[i] *= by;
  return DONE;
}

INLINE void rows(float *x, int64_t count, int64_t n, double low, double high, uint8_t *codes) {
  for (int64_t r = 0; r < count; r++) codes[r] = (uint8_t)scaled(x + r * n, n, low, high);
}

/* The same code for the instruction sets that are worth it, chosen when it runs. */
#define VERSION(name, target)                                                                  \
  target static void name(float *x, int64_t count, int64_t n, double low, double high,         \
                          uint8_t *codes) {                                                    \
    rows(x, count, n, low, high, codes);                                                       \
  }
typedef void version(float *, int64_t, int64_t, double, double, uint8_t *);

VERSION(rows_baseline, )
#if defined(__x86_64__)
VERSION(rows_avx2, __attribute__((target("avx2,fma"))))
VERSION(rows_avx512, __attribute__((target("avx512f,fma,prefer-vector-width=512"))))
#endif

static version *best(int level) {
  (void)level; /* where there is only one */
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (level >= 2 && __builtin_cpu_supports("avx512f")) return rows_avx512;
  if (level >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return rows_avx2;
#endif
  return rows_baseline;
}

typedef struct {
  int64_t count, n, from, to; /* the rows of all tensors are numbered through */
  float *const *data;
  const int64_t *counts;
  double low, high;
  uint8_t *codes;
  version *run;
} work;

static void *labour(void *argument) {
  const work *job = argument;
  int64_t first = 0;
  for (int64_t t = 0; t < job->count && first < job->to; first += job->counts[t++]) {
    const int64_t begin = job->from > first ? job->from - first : 0;
    const int64_t end = job->to - first < job->counts[t] ? job->to - first : job->counts[t];
    if (begin < end)
      job->run(job->data[t] + begin * job->n, end - begin, job->n, job->low, job->high,
               job->codes + first + begin);
  }
  return NULL;
}

/* `count` tensors of counts[i] rows of n floats, each in one piece at data[i]. Writes one code a
 * row; returns the largest. */
__attribute__((visibility("default"))) int learnables_lengths(
    int64_t count, float *const *data, const int64_t *counts, int64_t n, double low, double high,
    uint8_t *codes, int threads, int level) {
  int64_t all = 0;
  for (int64_t t = 0; t < count; t++) all += counts[t];
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (threads > all) threads = (int)all;
  if (threads < 1) threads = 1;
  work jobs[MAX_THREADS];
  pthread_t helpers[MAX_THREADS];
  int started = 0;
  for (int i = 0; i < threads; i++)
    jobs[i] = (work){count,  n,         all * i / threads, all * (i + 1) / threads, data,
                     counts, low, high, codes,             best(level)};
  for (int i = 1; i < threads; i++) {
    if (pthread_create(helpers + started, NULL, labour, jobs + i)) labour(jobs + i);
    else started++;
  }
  labour(jobs);
  while (started) pthread_join(helpers[--started], NULL);
  int worst = 0;
  for (int64_t i = 0; i < all; i++)
    if (codes[i] > worst) worst = codes[i];
  return worst;
}
