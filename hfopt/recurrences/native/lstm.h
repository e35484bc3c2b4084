/* Long short-term memory: a_t = [h_{t-1}, x_t] K in the order i, f, g, o, c_t = f c_{t-1} + i g, y_t = tanh(c_t), h_t = o y_t.
   Tangent and adjoint of some of the sequences; formulas: hfopt/recurrences/lstm.py. A ? marks pointers that may be NULL. */

/* n: T, B, h, V, N (vectors), first and last + 1 sequence, rows of a tile.
   p: dX (T, N, B, V)?, dK (N, h + V, 4h)?, dh0 (N, B, h)?, dc0 (N, B, h)?, X, K, h0, c0, H, C, gates (T, B, 4h), Y,
   R (T, N, B, h), R_c (T, N, B, h). */
EXPORT long NAME(lstm_tangent)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], N = n[4], first = n[5], last = n[6], tile = n[7], w = 4 * h;
  const REAL *dX = p[0], *dK = p[1], *dh0 = p[2], *dc0 = p[3], *X = p[4], *K = p[5], *h0 = p[6], *c0 = p[7];
  const REAL *H = p[8], *C = p[9], *gates = p[10], *Y = p[11];
  REAL *R = p[12], *Rc = p[13];
  const long square = NAME(packed_size)(h, w), wide = NAME(packed_size)(V, w);
  REAL *W = NAME(workspace)(2 * (square + wide) + tile * w);
  if (!W) return 1;
  REAL *Wx = W + square, *dW = Wx + wide, *dWx = dW + square, *local = dWx + wide;
  NAME(pack)(W, K, w, 1, h, w);
  if (dX) NAME(pack)(Wx, K + h * w, w, 1, V, w);
  for (long v = 0; v < N; v++) {
    if (dK) {
      NAME(pack)(dW, dK + v * (h + V) * w, w, 1, h, w);
      NAME(pack)(dWx, dK + (v * (h + V) + h) * w, w, 1, V, w);
    }
    for (long row = first; row < last; row += tile) {
      const long m = last - row < tile ? last - row : tile, at = v * B + row;
      const REAL *before = dh0 ? dh0 + at * h : NULL, *memory = dc0 ? dc0 + at * h : NULL;
      for (long t = 0; t < T; t++) {
        const long now = t * N * B + at, here = t * B + row, then = here - B;
        NAME(term) terms[4];
        int count = 0;
        if (dK) {
          terms[count++] = NAME(packed_term)(t ? H + then * h : h0 + row * h, h, h, dW);
          if (V) terms[count++] = NAME(packed_term)(X + here * V, V, V, dWx);
        }
        if (dX && V) terms[count++] = NAME(packed_term)(dX + now * V, V, V, Wx);
        if (before) terms[count++] = NAME(packed_term)(before, h, h, W);
        NAME(multiply)(local, w, 0, m, w, terms, count, SPAN(gates + here * w, m * w));
        for (long i = 0; i < m; i++) {
          const REAL *restrict a = local + i * w, *restrict gate = gates + (here + i) * w, *restrict y = Y + (here + i) * h;
          const REAL *restrict c_before = t ? C + (then + i) * h : c0 + (row + i) * h;
          REAL *restrict r = R + (now + i) * h, *restrict rc = Rc + (now + i) * h;
          for (long j = 0; j < h; j++) {
            const REAL in = gate[j], forget = gate[h + j], g = gate[2 * h + j];
            rc[j] = g * in * (1 - in) * a[j] + c_before[j] * forget * (1 - forget) * a[h + j] + in * (1 - g * g) * a[2 * h + j];
          }
          if (memory)
            for (long j = 0; j < h; j++) rc[j] += gate[h + j] * memory[i * h + j];
          for (long j = 0; j < h; j++) {
            const REAL out = gate[3 * h + j];
            r[j] = y[j] * out * (1 - out) * a[3 * h + j] + out * (1 - y[j] * y[j]) * rc[j];
          }
        }
        before = R + now * h;
        memory = Rc + now * h;
      }
    }
  }
  return 0;
}

/* n: as above, then ld, the length of dK's rows (whole panels), and the steps that the sums are put off.
   p: U (T, N, B, h)?, U_c (T, N, B, h)?, X, K, h0, c0, H, C, gates, Y, dX (T, N, B, V)?, dh0 (N, B, h), dc0 (N, B, h),
   dK (N, h + V, ld), added to. */
EXPORT long NAME(lstm_adjoint)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], N = n[4], first = n[5], last = n[6], tile = n[7], ld = n[8], slots = n[9];
  const REAL *U = p[0], *Uc = p[1], *X = p[2], *K = p[3], *h0 = p[4], *c0 = p[5], *H = p[6], *C = p[7], *gates = p[8], *Y = p[9];
  REAL *dX = p[10], *dh0 = p[11], *dc0 = p[12], *dK = p[13];
  const long w = 4 * h, slot = tile * ld, square = NAME(packed_size)(w, h), wide = NAME(packed_size)(w, V);
  REAL *Wt = NAME(workspace)(square + wide + slots * slot);
  if (!Wt) return 1;
  REAL *Wxt = Wt + square, *ring = Wxt + wide;
  NAME(pack)(Wt, K, 1, w, w, h);
  if (dX) NAME(pack)(Wxt, K + h * w, 1, w, w, V);
  NAME(zero)(ring, slots * slot);
  for (long v = 0; v < N; v++)
    for (long row = first; row < last; row += tile) {
      const long m = last - row < tile ? last - row : tile, at = v * B + row;
      REAL *gh = dh0 + at * h, *gc = dc0 + at * h, *sums = dK + v * (h + V) * ld;
      long held = 0;
      NAME(zero)(gh, m * h);
      NAME(zero)(gc, m * h);
      for (long t = T - 1; t >= 0; t--) {
        const long now = t * N * B + at, here = t * B + row, then = here - B;
        REAL *a = ring + held++ * slot;
        for (long i = 0; i < m; i++) {
          const REAL *restrict gate = gates + (here + i) * w, *restrict y = Y + (here + i) * h;
          const REAL *restrict c_before = t ? C + (then + i) * h : c0 + (row + i) * h;
          REAL *restrict da = a + i * ld, *restrict g_h = gh + i * h, *restrict g_c = gc + i * h;
          if (U) NAME(add)(g_h, U + (now + i) * h, h);
          if (Uc) NAME(add)(g_c, Uc + (now + i) * h, h);
          for (long j = 0; j < h; j++) {
            const REAL in = gate[j], forget = gate[h + j], g = gate[2 * h + j], out = gate[3 * h + j];
            const REAL c = g_c[j] + out * (1 - y[j] * y[j]) * g_h[j];
            da[j] = c * g * in * (1 - in);
            da[h + j] = c * c_before[j] * forget * (1 - forget);
            da[2 * h + j] = c * in * (1 - g * g);
            da[3 * h + j] = g_h[j] * y[j] * out * (1 - out);
            g_c[j] = c * forget;
          }
        }
        const NAME(term) back = NAME(packed_term)(a, ld, w, Wt), on_X = NAME(packed_term)(a, ld, w, Wxt);
        NAME(multiply)(gh, h, 0, m, h, &back, 1, t ? SPAN(gates + then * w, m * w) : NOTHING);
        if (dX) NAME(multiply)(dX + now * V, V, 0, m, V, &on_X, 1, NOTHING);
        if (held == slots || t <= 1) {
          const long newest = t + held - 1;
          NAME(correlate)(sums, ld, h, w, held, m, t ? H + ((newest - 1) * B + row) * h : h0 + row * h, h, -B * h, ring, ld, slot);
          NAME(correlate)(sums + h * ld, ld, V, w, held, m, X + (newest * B + row) * V, V, -B * V, ring, ld, slot);
          held = 0;
        }
      }
    }
  return 0;
}
