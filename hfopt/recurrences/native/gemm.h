/* Small matrix products on row-major data, for one thread: the building blocks of the passes over time.

   Included once for each REAL (float, double), with NAME(x) giving x its suffix. A product runs over panels of NR columns;
   of a panel, MR rows at a time are accumulated in registers. Matrices that are multiplied from the right at every step
   (the recurrent ones) are packed once a pass: panel after panel, each k x NR, the last one filled up with zeros. */

typedef REAL NAME(vec) __attribute__((vector_size(VECTOR_BYTES)));
#undef VEC
#undef LANES
#undef NR
#define VEC NAME(vec)
#define LANES ((long)(VECTOR_BYTES / sizeof(REAL)))
#define NR (NV * LANES)

static inline __attribute__((always_inline)) VEC NAME(load)(const REAL *x) {
  VEC v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}

static inline __attribute__((always_inline)) void NAME(store)(REAL *x, VEC v) { __builtin_memcpy(x, &v, sizeof v); }

/* One factor pair of a sum of products: A (m, k), read as a[i * rows + p * columns], and B (k, n). */
typedef struct {
  const REAL *a;
  long rows, columns, k;
  const REAL *b;    /* packed panels, or the rows of B themselves */
  long b_step;      /* from one row of a panel to the next */
  long b_panel;     /* from one panel to the next */
} NAME(term);

/* How many values the packed form of a (k, n) matrix takes. */
static inline long NAME(packed_size)(long k, long n) { return k * ((n + NR - 1) / NR) * NR; }

/* Packs B (k, n), read as b[p * rows + j * columns]: its transpose is packed by swapping the two strides. */
static void NAME(pack)(REAL *to, const REAL *b, long rows, long columns, long k, long n) {
  for (long j = 0; j < n; j += NR) {
    const long width = n - j < NR ? n - j : NR;
    for (long p = 0; p < k; p++, to += NR) {
      const REAL *from = b + p * rows + j * columns;
      long c = 0;
      for (; c < width; c++) to[c] = from[c * columns];
      for (; c < NR; c++) to[c] = 0;
    }
  }
}

static inline NAME(term) NAME(packed_term)(const REAL *a, long lda, long k, const REAL *packed) {
  return (NAME(term)){a, lda, 1, k, packed, NR, k * NR};
}

/* acc (mr, nv vectors) += the sum over the terms. mr and nv are constants where this is inlined. */
static inline __attribute__((always_inline)) void NAME(accumulate)(const int mr, const int nv, VEC acc[MR][NV],
                                                                   const NAME(term) *t, long i, long panel) {
  const REAL *restrict a = t->a + i * t->rows;
  const REAL *restrict b = t->b + panel * t->b_panel;
  const long rows = t->rows, columns = t->columns, step = t->b_step;
  for (long p = 0; p < t->k; p++, a += columns, b += step) {
    VEC column[NV];
    for (int v = 0; v < nv; v++) column[v] = NAME(load)(b + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++) {
      const REAL x = a[r * rows];
      for (int v = 0; v < nv; v++) acc[r][v] += x * column[v];
    }
  }
}

/* C[i .. i + mr, panel] = (C, if `add`) + the sum over the terms; `width` columns of the panel exist. */
static inline __attribute__((always_inline)) void NAME(block)(const int mr, const int nv, REAL *c, long ldc, int add,
                                                              const NAME(term) *terms, int count, long i, long panel,
                                                              long width) {
  VEC acc[MR][NV];
  for (int r = 0; r < mr; r++)
    for (int v = 0; v < nv; v++) acc[r][v] = (VEC){0};
  for (int t = 0; t < count; t++) NAME(accumulate)(mr, nv, acc, terms + t, i, panel);
  REAL *to = c + i * ldc + panel * NR;
  if (width == nv * LANES) {
    for (int r = 0; r < mr; r++)
      for (int v = 0; v < nv; v++) {
        REAL *place = to + r * ldc + v * LANES;
        NAME(store)(place, add ? NAME(load)(place) + acc[r][v] : acc[r][v]);
      }
  } else {
    for (int r = 0; r < mr; r++) {
      REAL row[NV * (VECTOR_BYTES / sizeof(REAL))] = {0};
      for (int v = 0; v < nv; v++) NAME(store)(row + v * LANES, acc[r][v]);
      for (long j = 0; j < width; j++) to[r * ldc + j] = add ? to[r * ldc + j] + row[j] : row[j];
    }
  }
}

#define ROWS_CASE(mr, nv) \
  case mr: \
    NAME(block)(mr, nv, c, ldc, add, terms, count, i, panel, width); \
    break;

static __attribute__((noinline)) void NAME(remainder)(REAL *c, long ldc, int add, const NAME(term) *terms, int count,
                                                      long i, long left, long panel, long width) {
  switch (left) {
    ROWS_CASE(1, NV) ROWS_CASE(2, NV) ROWS_CASE(3, NV) ROWS_CASE(4, NV) ROWS_CASE(5, NV)
#if MR > 6
    ROWS_CASE(6, NV) ROWS_CASE(7, NV)
#endif
#if MR > 8
    ROWS_CASE(8, NV) ROWS_CASE(9, NV) ROWS_CASE(10, NV) ROWS_CASE(11, NV)
#endif
  }
}

static __attribute__((noinline)) void NAME(whole)(REAL *c, long ldc, int add, const NAME(term) *terms, int count,
                                                  long m, long panel, long width) {
  long i = 0;
  for (; i + MR <= m; i += MR) NAME(block)(MR, NV, c, ldc, add, terms, count, i, panel, width);
  if (i < m) NAME(remainder)(c, ldc, add, terms, count, i, m - i, panel, width);
}

/* A last panel that a single vector holds: half the arithmetic of a whole one. */
static __attribute__((noinline)) void NAME(narrow)(REAL *c, long ldc, int add, const NAME(term) *terms, int count,
                                                   long m, long panel, long width) {
  long i = 0;
  for (; i + MR <= m; i += MR) NAME(block)(MR, 1, c, ldc, add, terms, count, i, panel, width);
  for (; i < m; i++) NAME(block)(1, 1, c, ldc, add, terms, count, i, panel, width);
}

/* C (m, n) = (C, if `add`) + the sum over terms of A B. Rows of C and of packed B may be of any length.
   `ahead`, if any, is fetched into the cache meanwhile, a piece with each panel: the next step's data. */
static void NAME(multiply)(REAL *c, long ldc, int add, long m, long n, const NAME(term) *terms, int count,
                           span ahead) {
  const long panels = (n + NR - 1) / NR, piece = (ahead.bytes + panels - 1) / panels;
  for (long panel = 0; panel < panels; panel++) {
    const long left = n - panel * NR;
    fetch(ahead, panel * piece, (panel + 1) * piece);
    if (!count && add) continue;
    if (left <= LANES)
      NAME(narrow)(c, ldc, add, terms, count, m, panel, left);
    else
      NAME(whole)(c, ldc, add, terms, count, m, panel, left < NR ? left : NR);
  }
}

/* C (n_a, n_b) += the sum over s of A_s' B_s, A_s (m, n_a) at a + s * a_step, B_s (m, n_b) at b + s * b_step; at most
   MOST_ROWS rows in all. The rows of B are as long as a whole number of panels, at least; what lies beyond n_b is read and
   not used. Each panel of B is copied together first: its rows are pages apart if they are long. */
static void NAME(correlate)(REAL *c, long ldc, long n_a, long n_b, long steps, long m, const REAL *a, long lda,
                            long a_step, const REAL *b, long ldb, long b_step) {
  NAME(term) terms[LONGEST_BLOCK];
  REAL together[MOST_ROWS * NV * (VECTOR_BYTES / sizeof(REAL))];
  if (!n_a) return;
  for (long s = 0; s < steps; s++)
    terms[s] = (NAME(term)){a + s * a_step, 1, lda, m, together + s * m * NR, NR, 0};
  for (long column = 0; column < n_b; column += NR) {
    const long left = n_b - column;
    REAL *to = together;
    for (long s = 0; s < steps; s++)
      for (long i = 0; i < m; i++, to += NR)
        for (long v = 0; v < NV; v++)
          NAME(store)(to + v * LANES, NAME(load)(b + s * b_step + i * ldb + column + v * LANES));
    if (left <= LANES)
      NAME(narrow)(c + column, ldc, 1, terms, (int)steps, n_a, 0, left);
    else
      NAME(whole)(c + column, ldc, 1, terms, (int)steps, n_a, 0, left < NR ? left : NR);
  }
}
#undef ROWS_CASE
