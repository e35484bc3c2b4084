/* Rows of numbers: copied, set to zero, added; and readouts of few outputs. */

static inline void NAME(copy)(REAL *restrict to, const REAL *restrict from, long count) {
  __builtin_memcpy(to, from, count * sizeof(REAL));
}

static inline void NAME(zero)(REAL *to, long count) {
  for (long i = 0; i < count; i++) to[i] = 0;
}

static inline void NAME(add)(REAL *restrict to, const REAL *restrict what, long count) {
  for (long i = 0; i < count; i++) to[i] += what[i];
}

/* The inner product of two rows. */
static inline REAL NAME(dot)(const REAL *x, const REAL *y, long count) {
  VEC sum = {0};
  long i = 0;
  for (; i + LANES <= count; i += LANES) sum += NAME(load)(x + i) * NAME(load)(y + i);
  REAL total = 0;
  for (long l = 0; l < LANES; l++) total += sum[l];
  for (; i < count; i++) total += x[i] * y[i];
  return total;
}

/* o (m, O) = r K_o[:h] + h dK_o, for the few outputs where panels would be nearly empty; the matrices are given transposed. */
static void NAME(few_outputs)(REAL *o, const REAL *r, const REAL *h, const REAL *Kt, const REAL *dKt, long m, long n, long O) {
  for (long i = 0; i < m; i++)
    for (long k = 0; k < O; k++) {
      REAL sum = r ? NAME(dot)(r + i * n, Kt + k * n, n) : 0;
      if (dKt) sum += NAME(dot)(h + i * n, dKt + k * n, n);
      o[i * O + k] = sum;
    }
}

static void NAME(transpose)(REAL *to, const REAL *from, long rows, long columns) {
  for (long i = 0; i < rows; i++)
    for (long j = 0; j < columns; j++) to[j * rows + i] = from[i * columns + j];
}

/* sums (O, n) += u (m, O)' h (m, n). */
static void NAME(few_sums)(REAL *restrict sums, const REAL *u, const REAL *restrict h, long m, long n, long O) {
  for (long i = 0; i < m; i++)
    for (long k = 0; k < O; k++) {
      const REAL x = u[i * O + k];
      for (long j = 0; j < n; j++) sums[k * n + j] += x * h[i * n + j];
    }
}
