/* Multiplicative recurrence: e_t = x_t W_xf, g_t = h_{t-1} W_hf, f_t = e_t g_t, a_t = [f_t, x_t] K, h_t = f(a_t).
   Tangent and adjoint of some of the sequences; formulas: hfopt/recurrences/mrnn.py. A ? marks pointers that may be NULL. */

/* n: T, B, h, V, F, N (vectors), first and last + 1 sequence, f, rows of a tile.
   p: dX (T, N, B, V)?, dW_xf (N, V, F)?, dW_hf (N, h, F)?, dK (N, F + V, h)?, dh0 (N, B, h)?, X, W_xf, W_hf, K, h0, H, E (T, B, F), G (T, B, F),
   R (T, N, B, h), R_a (T, N, B, h)?. */
EXPORT long NAME(mrnn_tangent)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], F = n[4], N = n[5], first = n[6], last = n[7], f = n[8], tile = n[9];
  const REAL *dX = p[0], *dWxf = p[1], *dWhf = p[2], *dK = p[3], *dh0 = p[4], *X = p[5], *Wxf = p[6], *Whf = p[7], *K = p[8], *h0 = p[9];
  const REAL *H = p[10], *E = p[11], *G = p[12];
  REAL *R = p[13], *Ra = p[14];
  const long hF = NAME(packed_size)(h, F), VF = NAME(packed_size)(V, F), Fh = NAME(packed_size)(F, h), Vh = NAME(packed_size)(V, h);
  REAL *pool = NAME(workspace)(2 * (hF + VF + Fh + Vh) + 3 * tile * F);
  if (!pool) return 1;
  REAL *W_g = pool, *W_e = W_g + hF, *K_f = W_e + VF, *K_x = K_f + Fh, *dW_g = K_x + Vh, *dW_e = dW_g + hF, *dK_f = dW_e + VF,
       *dK_x = dK_f + Fh, *de = dK_x + Vh, *dg = de + tile * F, *factors = dg + tile * F;
  NAME(pack)(W_g, Whf, F, 1, h, F);
  NAME(pack)(W_e, Wxf, F, 1, V, F);
  NAME(pack)(K_f, K, h, 1, F, h);
  NAME(pack)(K_x, K + F * h, h, 1, V, h);
  for (long v = 0; v < N; v++) {
    if (dWhf) NAME(pack)(dW_g, dWhf + v * h * F, F, 1, h, F);
    if (dWxf) NAME(pack)(dW_e, dWxf + v * V * F, F, 1, V, F);
    if (dK) {
      NAME(pack)(dK_f, dK + v * (F + V) * h, h, 1, F, h);
      NAME(pack)(dK_x, dK + (v * (F + V) + F) * h, h, 1, V, h);
    }
    for (long row = first; row < last; row += tile) {
      const long m = last - row < tile ? last - row : tile, at = v * B + row;
      const REAL *before = dh0 ? dh0 + at * h : NULL;
      for (long t = 0; t < T; t++) {
        const long now = t * N * B + at, here = t * B + row, then = here - B;
        const REAL *x = X + here * V, *dx = dX ? dX + now * V : NULL, *e = E + here * F, *g = G + here * F;
        NAME(term) terms[4];
        int count = 0;
        if (dWhf) terms[count++] = NAME(packed_term)(t ? H + then * h : h0 + row * h, h, h, dW_g);
        if (before) terms[count++] = NAME(packed_term)(before, h, h, W_g);
        NAME(multiply)(dg, F, 0, m, F, terms, count, SPAN(e, m * F));
        count = 0;
        if (dWxf && V) terms[count++] = NAME(packed_term)(x, V, V, dW_e);
        if (dx && V) terms[count++] = NAME(packed_term)(dx, V, V, W_e);
        NAME(multiply)(de, F, 0, m, F, terms, count, SPAN(g, m * F));
        for (long i = 0; i < m * F; i++) {
          de[i] = de[i] * g[i] + e[i] * dg[i];
          factors[i] = e[i] * g[i];
        }
        count = 0;
        terms[count++] = NAME(packed_term)(de, F, F, K_f);
        if (dK) terms[count++] = NAME(packed_term)(factors, F, F, dK_f);
        if (dK && V) terms[count++] = NAME(packed_term)(x, V, V, dK_x);
        if (dx && V) terms[count++] = NAME(packed_term)(dx, V, V, K_x);
        REAL *r = R + now * h, *a = Ra ? Ra + now * h : r;
        NAME(multiply)(a, h, 0, m, h, terms, count, SPAN(H + here * h, m * h));
        if (Ra) NAME(copy)(r, a, m * h);
        NAME(scale)(r, H + here * h, m * h, f);
        before = r;
      }
    }
  }
  return 0;
}

/* n: as above, then ld_h and ld_f, the lengths of rows with h and F columns (whole panels), and the steps that the sums are put off.
   p: U (T, N, B, h)?, U_a (T, N, B, h)?, X, W_xf, W_hf, K, h0, H, E, G, dX (T, N, B, V)?, dh0 (N, B, h),
   dW_xf (N, V, ld_f), dW_hf (N, h, ld_f), dK (N, F + V, ld_h), all three added to. */
EXPORT long NAME(mrnn_adjoint)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], F = n[4], N = n[5], first = n[6], last = n[7], f = n[8], tile = n[9], ld_h = n[10],
             ld_f = n[11], slots = n[12];
  const REAL *U = p[0], *Ua = p[1], *X = p[2], *Wxf = p[3], *Whf = p[4], *K = p[5], *h0 = p[6], *H = p[7], *E = p[8], *G = p[9];
  REAL *dX = p[10], *dh0 = p[11], *dWxf = p[12], *dWhf = p[13], *dK = p[14];
  const long Fh = NAME(packed_size)(F, h), hF = NAME(packed_size)(h, F), FV = NAME(packed_size)(F, V), hV = NAME(packed_size)(h, V);
  const long of_a = tile * ld_h, of_f = tile * ld_f;
  REAL *pool = NAME(workspace)(Fh + hF + FV + hV + slots * (of_a + 3 * of_f));
  if (!pool) return 1;
  REAL *W_g = pool, *K_f = W_g + Fh, *W_e = K_f + hF, *K_x = W_e + FV, *ring_a = K_x + hV, *ring_g = ring_a + slots * of_a,
       *ring_e = ring_g + slots * of_f, *ring_f = ring_e + slots * of_f;
  NAME(pack)(W_g, Whf, 1, F, F, h);
  NAME(pack)(K_f, K, 1, h, h, F);
  NAME(pack)(W_e, Wxf, 1, F, F, V);
  NAME(pack)(K_x, K + F * h, 1, h, h, V);
  NAME(zero)(ring_a, slots * (of_a + 3 * of_f));
  for (long v = 0; v < N; v++)
    for (long row = first; row < last; row += tile) {
      const long m = last - row < tile ? last - row : tile, at = v * B + row;
      REAL *gh = dh0 + at * h, *sums_K = dK + v * (F + V) * ld_h, *sums_g = dWhf + v * h * ld_f, *sums_e = dWxf + v * V * ld_f;
      long held = 0;
      NAME(zero)(gh, m * h);
      for (long t = T - 1; t >= 0; t--) {
        const long now = t * N * B + at, here = t * B + row, then = here - B;
        REAL *a = ring_a + held * of_a, *dg = ring_g + held * of_f, *de = ring_e + held * of_f, *factors = ring_f + held * of_f;
        held++;
        for (long i = 0; i < m; i++) {
          NAME(copy)(a + i * ld_h, gh + i * h, h);
          if (U) NAME(add)(a + i * ld_h, U + (now + i) * h, h);
          NAME(scale)(a + i * ld_h, H + (here + i) * h, h, f);
          if (Ua) NAME(add)(a + i * ld_h, Ua + (now + i) * h, h);
        }
        const NAME(term) on_f = NAME(packed_term)(a, ld_h, h, K_f);
        NAME(multiply)(dg, ld_f, 0, m, F, &on_f, 1, SPAN(E + here * F, m * F));
        for (long i = 0; i < m; i++) {
          const REAL *restrict e = E + (here + i) * F, *restrict g = G + (here + i) * F;
          REAL *restrict to_g = dg + i * ld_f, *restrict to_e = de + i * ld_f, *restrict both = factors + i * ld_f;
          for (long j = 0; j < F; j++) {
            to_e[j] = to_g[j] * g[j];
            to_g[j] *= e[j];
            both[j] = e[j] * g[j];
          }
        }
        const NAME(term) back = NAME(packed_term)(dg, ld_f, F, W_g);
        NAME(multiply)(gh, h, 0, m, h, &back, 1, t ? SPAN(H + then * h, m * h) : NOTHING);
        if (dX) {
          const NAME(term) on_X[2] = {NAME(packed_term)(de, ld_f, F, W_e), NAME(packed_term)(a, ld_h, h, K_x)};
          NAME(multiply)(dX + now * V, V, 0, m, V, on_X, 2, NOTHING);
        }
        if (held == slots || t <= 1) {
          const long newest = t + held - 1;
          const REAL *x = X + (newest * B + row) * V, *states = t ? H + ((newest - 1) * B + row) * h : h0 + row * h;
          NAME(correlate)(sums_g, ld_f, h, F, held, m, states, h, -B * h, ring_g, ld_f, of_f);
          NAME(correlate)(sums_e, ld_f, V, F, held, m, x, V, -B * V, ring_e, ld_f, of_f);
          NAME(correlate)(sums_K, ld_h, F, h, held, m, ring_f, ld_f, of_f, ring_a, ld_h, of_a);
          NAME(correlate)(sums_K + F * ld_h, ld_h, V, h, held, m, x, V, -B * V, ring_a, ld_h, of_a);
          held = 0;
        }
      }
    }
  return 0;
}
