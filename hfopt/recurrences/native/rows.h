/* Rows of numbers: copied, set to zero, added. */

static inline void NAME(copy)(REAL *restrict to, const REAL *restrict from, long count) {
  __builtin_memcpy(to, from, count * sizeof(REAL));
}

static inline void NAME(zero)(REAL *to, long count) {
  for (long i = 0; i < count; i++) to[i] = 0;
}

static inline void NAME(add)(REAL *restrict to, const REAL *restrict what, long count) {
  for (long i = 0; i < count; i++) to[i] += what[i];
}
