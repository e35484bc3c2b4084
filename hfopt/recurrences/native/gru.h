/* Gated recurrent unit in torch's form: r, z = sigmoid(x K_x + h_{t-1} K_h), m = (h_{t-1} K_h)_n + b_n,
   n = tanh((x K_x)_n + r m), h_t = (1 - z) n + z h_{t-1}; columns in the order r, z, n.
   Tangent and adjoint of some of the sequences; formulas: hfopt/recurrences/gru.py. A ? marks pointers that may be NULL. */

/* n: T, B, h, V, N (vectors), first and last + 1 sequence, rows of a tile.
   p: dX (T, N, B, V)?, dK_h (N, h, 3h)?, dK_x (N, V, 3h)?, db_n (N, h)?, dh0 (N, B, h)?, X, K_h, K_x, h0, H, gates (T, B, 3h), M,
   R (T, N, B, h). */
EXPORT long NAME(gru_tangent)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], N = n[4], first = n[5], last = n[6], tile = n[7], w = 3 * h;
  const REAL *dX = p[0], *dKh = p[1], *dKx = p[2], *dbn = p[3], *dh0 = p[4], *X = p[5], *Kh = p[6], *Kx = p[7], *h0 = p[8];
  const REAL *H = p[9], *gates = p[10], *M = p[11];
  REAL *R = p[12];
  const long square = NAME(packed_size)(h, w), wide = NAME(packed_size)(V, w);
  REAL *W = NAME(workspace)(2 * (square + wide) + 2 * tile * w);
  if (!W) return 1;
  REAL *Wx = W + square, *dW = Wx + wide, *dWx = dW + square, *by_h = dWx + wide, *by_x = by_h + tile * w;
  NAME(pack)(W, Kh, w, 1, h, w);
  if (dX) NAME(pack)(Wx, Kx, w, 1, V, w);
  for (long v = 0; v < N; v++) {
    const REAL *db = dbn ? dbn + v * h : NULL;
    if (dKh) NAME(pack)(dW, dKh + v * h * w, w, 1, h, w);
    if (dKx) NAME(pack)(dWx, dKx + v * V * w, w, 1, V, w);
    for (long row = first; row < last; row += tile) {
      const long m = last - row < tile ? last - row : tile, at = v * B + row;
      const REAL *before = dh0 ? dh0 + at * h : NULL;
      for (long t = 0; t < T; t++) {
        const long now = t * N * B + at, here = t * B + row, then = here - B;
        const REAL *h_before = t ? H + then * h : h0 + row * h;
        NAME(term) on_h[2], on_x[2];
        int of_h = 0, of_x = 0;
        if (dKh) on_h[of_h++] = NAME(packed_term)(h_before, h, h, dW);
        if (before) on_h[of_h++] = NAME(packed_term)(before, h, h, W);
        if (dKx && V) on_x[of_x++] = NAME(packed_term)(X + here * V, V, V, dWx);
        if (dX && V) on_x[of_x++] = NAME(packed_term)(dX + now * V, V, V, Wx);
        NAME(multiply)(by_h, w, 0, m, w, on_h, of_h, SPAN(gates + here * w, m * w));
        NAME(multiply)(by_x, w, 0, m, w, on_x, of_x, SPAN(M + here * h, m * h));
        for (long i = 0; i < m; i++) {
          const REAL *restrict a = by_h + i * w, *restrict b = by_x + i * w, *restrict gate = gates + (here + i) * w;
          const REAL *restrict mid = M + (here + i) * h, *restrict old = h_before + i * h;
          REAL *restrict r = R + (now + i) * h;
          for (long j = 0; j < h; j++) {
            const REAL reset = gate[j], z = gate[h + j], new = gate[2 * h + j];
            const REAL d_reset = reset * (1 - reset) * (a[j] + b[j]), d_z = z * (1 - z) * (a[h + j] + b[h + j]);
            const REAL d_mid = a[2 * h + j] + (db ? db[j] : 0);
            const REAL d_new = (1 - new * new) * (b[2 * h + j] + d_reset * mid[j] + reset * d_mid);
            r[j] = (1 - z) * d_new + d_z * (old[j] - new);
          }
          if (before)
            for (long j = 0; j < h; j++) r[j] += gate[h + j] * before[i * h + j];
        }
        before = R + now * h;
      }
    }
  }
  return 0;
}

/* A row of the ring: cotangents of (x K_x)_n, r, z, m, so that the first three are those of x K_x, in the order n, r, z, and the last
   three those of h_{t-1} K_h, in the order r, z, n.
   n: as above, then ld, the length of the ring's and dK's rows, and the steps that the sums are put off.
   p: U (T, N, B, h), X, K_h, K_x, h0, H, gates, M, dX (T, N, B, V)?, dh0 (N, B, h), dK_h (N, h, ld), dK_x (N, V, ld) with columns
   n, r, z, db_n (N, h), all three added to. */
EXPORT long NAME(gru_adjoint)(const long *n, void *const *p) {
  const long T = n[0], B = n[1], h = n[2], V = n[3], N = n[4], first = n[5], last = n[6], tile = n[7], ld = n[8], slots = n[9];
  const REAL *U = p[0], *X = p[1], *Kh = p[2], *Kx = p[3], *h0 = p[4], *H = p[5], *gates = p[6], *M = p[7];
  REAL *dX = p[8], *dh0 = p[9], *dKh = p[10], *dKx = p[11], *dbn = p[12];
  const long w = 3 * h, slot = tile * ld, square = NAME(packed_size)(w, h), part = NAME(packed_size)(h, V);
  REAL *Wt = NAME(workspace)(square + 3 * part + slots * slot + 32);
  if (!Wt) return 1;
  REAL *Wxt = Wt + square, *ring = Wxt + 3 * part;
  NAME(pack)(Wt, Kh, 1, w, w, h);
  if (dX)
    for (long k = 0; k < 3; k++) NAME(pack)(Wxt + k * part, Kx + ((k + 2) % 3) * h, 1, w, h, V);
  NAME(zero)(ring, slots * slot + 32);
  for (long v = 0; v < N; v++)
    for (long row = first; row < last; row += tile) {
      const long m = last - row < tile ? last - row : tile, at = v * B + row;
      REAL *g = dh0 + at * h, *sums_h = dKh + v * h * ld, *sums_x = dKx + v * V * ld, *db = dbn + v * h;
      long held = 0;
      NAME(zero)(g, m * h);
      for (long t = T - 1; t >= 0; t--) {
        const long now = t * N * B + at, here = t * B + row, then = here - B;
        const REAL *h_before = t ? H + then * h : h0 + row * h;
        REAL *a = ring + held++ * slot;
        for (long i = 0; i < m; i++) {
          const REAL *restrict gate = gates + (here + i) * w, *restrict mid = M + (here + i) * h, *restrict old = h_before + i * h;
          const REAL *restrict u = U + (now + i) * h;
          REAL *restrict da = a + i * ld, *restrict gi = g + i * h;
          for (long j = 0; j < h; j++) {
            const REAL reset = gate[j], z = gate[h + j], new = gate[2 * h + j], up = gi[j] + u[j];
            const REAL d_new = up * (1 - z) * (1 - new * new);
            da[j] = d_new;
            da[h + j] = d_new * mid[j] * reset * (1 - reset);
            da[2 * h + j] = up * (old[j] - new) * z * (1 - z);
            da[3 * h + j] = d_new * reset;
            gi[j] = up * z;
          }
          NAME(add)(db, da + 3 * h, h);
        }
        const NAME(term) back = NAME(packed_term)(a + h, ld, w, Wt);
        NAME(multiply)(g, h, 1, m, h, &back, 1, t ? SPAN(gates + then * w, m * w) : NOTHING);
        if (dX) {
          NAME(term) on_X[3];
          for (long k = 0; k < 3; k++) on_X[k] = NAME(packed_term)(a + k * h, ld, h, Wxt + k * part);
          NAME(multiply)(dX + now * V, V, 0, m, V, on_X, 3, NOTHING);
        }
        if (held == slots || t <= 1) {
          const long newest = t + held - 1;
          NAME(correlate)(sums_h, ld, h, w, held, m, t ? H + ((newest - 1) * B + row) * h : h0 + row * h, h, -B * h, ring + h, ld, slot);
          NAME(correlate)(sums_x, ld, V, w, held, m, X + (newest * B + row) * V, V, -B * V, ring, ld, slot);
          held = 0;
        }
      }
    }
  return 0;
}
