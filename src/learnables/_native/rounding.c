/* Between bfloat16 and float32 and back, one pass over each of many arrays. Called by rounding.py
 * through ctypes; the twin in torch is in ../policy/rounding.py and gives the same bits.
 *
 *   WIDEN       float32 from bfloat16, with the lower half that an earlier NARROW cut off
 *   NARROW      bfloat16 to the nearest, and the lower half into an array of its own
 *   STOCHASTIC  bfloat16 up or down, by sixteen bits of noise that are a function of place and seed
 *
 * Work is handed out in chunks; as each element depends on itself alone, the result does not depend
 * on the number of threads. Threads live for one call: no pool, nothing to break at fork. */

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

enum { CHUNK = 1 << 16, MAX_THREADS = 256 };
enum operation { WIDEN, NARROW, STOCHASTIC };
enum { BASELINE, AVX2, AVX512 };

#define INLINE static inline __attribute__((always_inline))
#define NAN_BITS 0x7fc00000u
#define INFINITY_BITS 0x7f800000u
#define HALF 0x8000u /* of a unit of the upper half */

typedef uint32_t word __attribute__((may_alias));
typedef uint16_t half __attribute__((may_alias));

typedef struct {
  enum operation operation;
  int64_t rows;
  word *const *wide;
  half *const *narrow;
  half *const *lower; /* NULL entries: nothing was cut off */
  const int64_t *counts, *starts;
  uint32_t seed;
  int level;
  int64_t chunks, next;
} job;

/* One NaN for all, as torch's nan_to_num writes it: others would overflow when half is added. */
INLINE uint32_t sound(uint32_t bits) {
  return (bits & 0x7fffffffu) > INFINITY_BITS ? NAN_BITS : bits;
}

/* "lowbias32" of Wellons' hash prospector: each input bit changes each output bit in half of cases. */
INLINE uint32_t mixed(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du;
  x ^= x >> 15, x *= 0x846ca68bu;
  return x ^ x >> 16;
}

INLINE void widen(word *wide, const half *narrow, const half *lower, int64_t n) {
  if (lower == NULL) {
    for (int64_t i = 0; i < n; i++) wide[i] = (uint32_t)narrow[i] << 16;
    return;
  }
  for (int64_t i = 0; i < n; i++) {
    uint32_t upper = (uint32_t)narrow[i] << 16;
    int32_t error = (int16_t)lower[i];
    /* Below 0, where somebody wrote 0, lie the bits of NaN. NaN itself compares unequal to 0. */
    wide[i] = upper + (uint32_t)(upper << 1 ? error : 0);
  }
}

INLINE void narrow_(const word *wide, half *narrow, half *lower, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    uint32_t bits = sound(wide[i]);
    lower[i] = (half)bits;
    narrow[i] = (half)((bits + HALF) >> 16);
  }
}

/* `start` is even: two elements share the 32 bits of one place. */
INLINE void stochastic(const word *wide, half *narrow, int64_t n, uint32_t start, uint32_t seed) {
  uint32_t place = (start >> 1) + seed;
  int64_t pairs = n / 2;
  for (int64_t i = 0; i < pairs; i++) {
    uint32_t noise = mixed(place + (uint32_t)i) ^ 0x80008000u; /* signed halves, plus half a unit */
    narrow[2 * i] = (half)((sound(wide[2 * i]) + (noise & 0xffffu)) >> 16);
    narrow[2 * i + 1] = (half)((sound(wide[2 * i + 1]) + (noise >> 16)) >> 16);
  }
  if (n & 1) {
    uint32_t noise = mixed(place + (uint32_t)pairs) ^ 0x80008000u;
    narrow[n - 1] = (half)((sound(wide[n - 1]) + (noise & 0xffffu)) >> 16);
  }
}

INLINE void piece(const job *j, int64_t row, int64_t from, int64_t n) {
  word *wide = j->wide[row] + from;
  half *narrow = j->narrow[row] + from;
  half *lower = j->lower[row] == NULL ? NULL : j->lower[row] + from;
  switch (j->operation) {
    case WIDEN: widen(wide, narrow, lower, n); break;
    case NARROW: narrow_(wide, narrow, lower, n); break;
    case STOCHASTIC: stochastic(wide, narrow, n, (uint32_t)(j->starts[row] + from), j->seed); break;
  }
}

#define VERSION(name, target)                                                                    \
  target static void name(const job *j, int64_t row, int64_t from, int64_t n) {                  \
    piece(j, row, from, n);                                                                      \
  }

VERSION(piece_baseline, )
#if defined(__x86_64__) && defined(__GNUC__)
VERSION(piece_avx2, __attribute__((target("avx2"))))
VERSION(piece_avx512, __attribute__((target("avx512f,avx512bw,prefer-vector-width=512"))))
#endif

static void (*chosen(int level))(const job *, int64_t, int64_t, int64_t) {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (level >= AVX512 && __builtin_cpu_supports("avx512bw")) return piece_avx512;
  if (level >= AVX2 && __builtin_cpu_supports("avx2")) return piece_avx2;
#endif
  (void)level;
  return piece_baseline;
}

static void *work(void *argument) {
  job *j = argument;
  void (*run)(const job *, int64_t, int64_t, int64_t) = chosen(j->level);
  int64_t row = 0, before = 0; /* chunks of the rows before this one */
  for (;;) {
    int64_t chunk = __atomic_fetch_add(&j->next, 1, __ATOMIC_RELAXED);
    if (chunk >= j->chunks) return NULL;
    for (;;) {
      int64_t here = (j->counts[row] + CHUNK - 1) / CHUNK;
      if (chunk < before + here) break;
      before += here, row++;
    }
    int64_t from = (chunk - before) * CHUNK, left = j->counts[row] - from;
    run(j, row, from, left < CHUNK ? left : CHUNK);
  }
}

#if defined(_WIN32)
__declspec(dllexport)
#else
__attribute__((visibility("default")))
#endif
void learnables_rounding(int operation, int64_t rows, word *const *wide, half *const *narrow,
                         half *const *lower, const int64_t *counts, const int64_t *starts,
                         uint32_t seed, int threads, int level) {
  job j = {(enum operation)operation, rows, wide, narrow, lower, counts, starts, seed, level, 0, 0};
  for (int64_t row = 0; row < rows; row++) j.chunks += (counts[row] + CHUNK - 1) / CHUNK;
  pthread_t others[MAX_THREADS];
  int started = 0;
  int wanted = threads < MAX_THREADS ? threads : MAX_THREADS;
  while (started < wanted - 1 && started < j.chunks - 1)
    if (pthread_create(&others[started], NULL, work, &j)) break;
    else started++;
  work(&j);
  for (int i = 0; i < started; i++) pthread_join(others[i], NULL);
}
