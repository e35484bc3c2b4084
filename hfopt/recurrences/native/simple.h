/* The simple recurrence h_t = f(a_t), a_t = p_t + [h_{t-1}, x_t] K, with a linear readout o_t = [h_t, 1] K_o if there is one:
   forward, tangent and adjoint of some of the sequences. A tile of sequences goes through all time steps before the next one
   starts, so that its state never leaves the cache; with the readout inside, neither R_h nor the cotangents of H ever go
   through memory.
   Formulas: hfopt/recurrences/loops.py. A ? marks pointers that may be NULL, which means zero, or not wanted. */

/* out <- f'(a) out, f' as a function of h = f(a). */
static inline void NAME(scale)(REAL *restrict out, const REAL *restrict h, long count, long f) {
  switch (f) {
    case 0: for (long i = 0; i < count; i++) out[i] *= 1 - h[i] * h[i]; break;
    case 1: for (long i = 0; i < count; i++) out[i] *= h[i] * (1 - h[i]); break;
    case 2: for (long i = 0; i < count; i++) out[i] = h[i] > 0 ? out[i] : 0; break;
  }
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

/* n: T, B, h, V, first and last + 1 sequence, f, rows of a tile.
   p: P (T, B, h)?, X (T, B, V), h0 (B, h), K (h + V, h), H (T, B, h). */
EXPORT long NAME(simple_forward)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], first = n[4], last = n[5], f = n[6], tile = n[7];
  const REAL *P = p[0], *X = p[1], *h0 = p[2], *K = p[3];
  REAL *H = p[4];
  const long square = NAME(packed_size)(h, h);
  REAL *W = NAME(workspace)(square + NAME(packed_size)(V, h));
  if (!W) return 1;
  REAL *Wx = W + square;
  NAME(pack)(W, K, h, 1, h, h);
  NAME(pack)(Wx, K + h * h, h, 1, V, h);
  for (long row = first; row < last; row += tile) {
    const long m = last - row < tile ? last - row : tile;
    const REAL *before = h0 + row * h;
    for (long t = 0; t < T; t++) {
      const long now = (t * B + row) * h;
      const NAME(term) terms[2] = {NAME(packed_term)(before, h, h, W), NAME(packed_term)(X + (t * B + row) * V, V, V, Wx)};
      if (P) NAME(copy)(H + now, P + now, m * h);
      NAME(multiply)(H + now, h, P != NULL, m, h, terms, V ? 2 : 1, P && t + 1 < T ? SPAN(P + now + B * h, m * h) : NOTHING);
      NAME(apply)(H + now, m * h, f);
      before = H + now;
    }
  }
  return 0;
}

/* n: T, B, h, V, N (vectors), O, first and last + 1 sequence, f, rows of a tile.
   p: dP (T, N, B, h)?, dX (T, N, B, V)?, dK (N, h + V, h)?, dh0 (N, B, h)?, dK_o (N, h + 1, O)?, X, H, h0 (B, h), K, K_o (h + 1, O)?,
   R (T, N, B, h)?, R_a (T, N, B, h)?, R_o (T, N, B, O)?. */
EXPORT long NAME(simple_tangent)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], N = n[4], O = n[5], first = n[6], last = n[7], f = n[8], tile = n[9];
  const REAL *dP = p[0], *dX = p[1], *dK = p[2], *dh0 = p[3], *dKo = p[4], *X = p[5], *H = p[6], *h0 = p[7], *K = p[8], *Ko = p[9];
  REAL *R = p[10], *Ra = p[11], *Ro = p[12];
  const long square = NAME(packed_size)(h, h), wide = NAME(packed_size)(V, h), out = NAME(packed_size)(h, O);
  REAL *W = NAME(workspace)(2 * (square + wide + out) + 2 * tile * h);
  if (!W) return 1;
  REAL *Wx = W + square, *dW = Wx + wide, *dWx = dW + square, *Wo = dWx + wide, *dWo = Wo + out, *local = dWo + out;
  const int few = O <= FEW;
  NAME(pack)(W, K, h, 1, h, h);
  NAME(pack)(Wx, K + h * h, h, 1, V, h);
  if (Ro && few) NAME(transpose)(Wo, Ko, h, O);
  if (Ro && !few) NAME(pack)(Wo, Ko, O, 1, h, O);
  for (long v = 0; v < N; v++) {
    const REAL *dKo_v = dKo ? dKo + v * (h + 1) * O : NULL;
    if (dK) {
      NAME(pack)(dW, dK + v * (h + V) * h, h, 1, h, h);
      NAME(pack)(dWx, dK + (v * (h + V) + h) * h, h, 1, V, h);
    }
    if (dKo && few) NAME(transpose)(dWo, dKo_v, h, O);
    if (dKo && !few) NAME(pack)(dWo, dKo_v, O, 1, h, O);
    for (long row = first; row < last; row += tile) {
      const long m = last - row < tile ? last - row : tile, at = v * B + row;
      const REAL *before = dh0 ? dh0 + at * h : NULL;
      for (long t = 0; t < T; t++) {
        const long now = t * N * B + at;
        const REAL *H_t = H + (t * B + row) * h;
        REAL *r = R ? R + now * h : local + (t % 2) * tile * h, *a = Ra ? Ra + now * h : r;
        NAME(term) terms[4];
        int count = 0;
        if (dK) {
          terms[count++] = NAME(packed_term)((t ? H + (t - 1) * B * h : h0) + row * h, h, h, dW);
          if (V) terms[count++] = NAME(packed_term)(X + (t * B + row) * V, V, V, dWx);
        }
        if (dX) terms[count++] = NAME(packed_term)(dX + now * V, V, V, Wx);
        if (before) terms[count++] = NAME(packed_term)(before, h, h, W);
        if (dP) NAME(copy)(a, dP + now * h, m * h);
        NAME(multiply)(a, h, dP != NULL, m, h, terms, count, SPAN(H_t, m * h));
        if (Ra) NAME(copy)(r, a, m * h);
        NAME(scale)(r, H_t, m * h, f);
        before = r;
        if (!Ro) continue;
        REAL *o = Ro + now * O;
        if (few) {
          NAME(few_outputs)(o, r, H_t, Wo, dKo ? dWo : NULL, m, h, O);
        } else {
          const NAME(term) read[2] = {NAME(packed_term)(r, h, h, Wo), NAME(packed_term)(H_t, h, h, dWo)};
          NAME(multiply)(o, O, 0, m, O, read, dKo ? 2 : 1, NOTHING);
        }
        if (dKo)
          for (long i = 0; i < m; i++) NAME(add)(o + i * O, dKo_v + h * O, O);
      }
    }
  }
  return 0;
}

/* sums (O, n) += u (m, O)' h (m, n). */
static void NAME(few_sums)(REAL *restrict sums, const REAL *u, const REAL *restrict h, long m, long n, long O) {
  for (long i = 0; i < m; i++)
    for (long k = 0; k < O; k++) {
      const REAL x = u[i * O + k];
      for (long j = 0; j < n; j++) sums[k * n + j] += x * h[i * n + j];
    }
}

/* n: as above, then ld and ld_o, the lengths of the rows of dK and dK_o (whole panels), and the steps that the sums are put off.
   p: U (T, N, B, h)?, U_a (T, N, B, h)?, U_o (T, N, B, O)?, X, H, h0, K, K_o?, dP (T, N, B, h)?, dX (T, N, B, V)?, dh0 (N, B, h),
   dK (N, h + V, ld) and dK_o (N, h + 1, ld_o)?, both added to. */
EXPORT long NAME(simple_adjoint)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], N = n[4], O = n[5], first = n[6], last = n[7], f = n[8], tile = n[9],
             ld = n[10], ld_o = n[11], slots = n[12];
  const REAL *U = p[0], *Ua = p[1], *Uo = p[2], *X = p[3], *H = p[4], *h0 = p[5], *K = p[6], *Ko = p[7];
  REAL *dP = p[8], *dX = p[9], *dh0 = p[10], *dK = p[11], *dKo = p[12];
  const long square = NAME(packed_size)(h, h), wide = NAME(packed_size)(h, V), out = NAME(packed_size)(O, h);
  const long slot = tile * ld, few = O <= FEW, sums_o = few ? O * h : tile * ld_o;
  REAL *Wt = NAME(workspace)(square + wide + out + sums_o + (slots + 1) * slot);
  if (!Wt) return 1;
  REAL *Wxt = Wt + square, *Wot = Wxt + wide, *spare = Wot + out, *ring = spare + sums_o;
  NAME(pack)(Wt, K, 1, h, h, h);
  if (dX) NAME(pack)(Wxt, K + h * h, 1, h, h, V);
  if (Uo) NAME(pack)(Wot, Ko, 1, O, O, h);
  NAME(zero)(spare, sums_o + (slots + 1) * slot);
  for (long v = 0; v < N; v++) {
    REAL *sums = dK + v * (h + V) * ld, *read = dKo ? dKo + v * (h + 1) * ld_o : NULL;
    for (long row = first; row < last; row += tile) {
      const long m = last - row < tile ? last - row : tile, at = v * B + row;
      REAL *after = NULL, *oldest = ring;
      long held = 0; /* steps from `oldest` on, going back in time, that the sums lack yet */
      for (long t = T - 1; t >= 0; t--) {
        const long now = t * N * B + at;
        const REAL *H_t = H + (t * B + row) * h;
        REAL *a = oldest + held++ * slot;
        NAME(term) terms[2];
        int count = 0;
        if (after) terms[count++] = NAME(packed_term)(after, ld, h, Wt);
        if (Uo) terms[count++] = NAME(packed_term)(Uo + now * O, O, O, Wot);
        if (U)
          for (long i = 0; i < m; i++) NAME(copy)(a + i * ld, U + (now + i) * h, h);
        NAME(multiply)(a, ld, U != NULL, m, h, terms, count, SPAN(H_t, m * h));
        for (long i = 0; i < m; i++) {
          NAME(scale)(a + i * ld, H_t + i * h, h, f);
          if (Ua) NAME(add)(a + i * ld, Ua + (now + i) * h, h);
          if (dP) NAME(copy)(dP + (now + i) * h, a + i * ld, h);
        }
        after = a;
        if (dX) {
          const NAME(term) on_X = NAME(packed_term)(a, ld, h, Wxt);
          NAME(multiply)(dX + now * V, V, 0, m, V, &on_X, 1, NOTHING);
        }
        if (Uo && few) {
          NAME(few_sums)(spare, Uo + now * O, H_t, m, h, O);
        } else if (Uo) {
          for (long i = 0; i < m; i++) NAME(copy)(spare + i * ld_o, Uo + (now + i) * O, O);
          NAME(correlate)(read, ld_o, h, O, 1, m, H_t, h, 0, spare, ld_o, 0);
        }
        if (Uo)
          for (long i = 0; i < m; i++) NAME(add)(read + h * ld_o, Uo + (now + i) * O, O);
        if (held == slots || t <= 1) {
          const long newest = t + held - 1;
          NAME(correlate)(sums, ld, h, h, held, m, (t ? H + (newest - 1) * B * h : h0) + row * h, h, -B * h, oldest, ld, slot);
          NAME(correlate)(sums + h * ld, ld, V, h, held, m, X + (newest * B + row) * V, V, -B * V, oldest, ld, slot);
          held = 0;
          oldest = a == ring ? ring + slot : ring; /* the next step reads this one */
        }
      }
      const NAME(term) start = NAME(packed_term)(after, ld, h, Wt);
      NAME(multiply)(dh0 + at * h, h, 0, m, h, &start, 1, NOTHING);
    }
    if (!Uo || !few) continue;
    for (long k = 0; k < O; k++)
      for (long j = 0; j < h; j++) read[j * ld_o + k] += spare[k * h + j];
    NAME(zero)(spare, sums_o);
  }
  return 0;
}
