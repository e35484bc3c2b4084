/* tanh and the logistic function of a vector of numbers, within 4 units in the last place of the exact value (but for logistic
   functions below exp(-87) or, in double precision, exp(-700), which are 0).

   exp(x) = 2^n exp(r), |r| <= ln(2) / 2, with the polynomial (float) or the rational function (double) of exp, and those of
   tanh near 0, of Moshier's Cephes library. Comparisons are such that NaN goes through. */

#if SINGLE
typedef int NAME(whole_number) __attribute__((vector_size(VECTOR_BYTES)));
#else
typedef long long NAME(whole_number) __attribute__((vector_size(VECTOR_BYTES)));
#endif
#define INTEGER NAME(whole_number)

static inline __attribute__((always_inline)) VEC NAME(choose)(INTEGER where, VEC yes, VEC no) {
  return (VEC)((where & (INTEGER)yes) | (~where & (INTEGER)no));
}

static inline __attribute__((always_inline)) VEC NAME(magnitude)(VEC x) { return NAME(choose)(x < 0, -x, x); }

/* exp(x), |x| <= 87 (float), 700 (double). */
static inline __attribute__((always_inline)) VEC NAME(exponential)(VEC x) {
  const VEC one = (VEC){0} + 1;
#if SINGLE
  const VEC shift = (VEC){0} + 0x1.8p23f;
  const VEC lifted = x * 1.44269504088896341f + shift, n = lifted - shift;
  const VEC r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VEC y = one * 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = (y * r) * r + (r + 1);
  const INTEGER power = (INTEGER)lifted << 23; /* n stands in the last bits of `lifted` */
#else
  const VEC shift = (VEC){0} + 0x1.8p52;
  const VEC lifted = x * 1.4426950408889634073599 + shift, n = lifted - shift;
  const VEC r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6, rr = r * r;
  VEC p = one * 1.26177193074810590878e-4, q = one * 3.00198505138664455042e-6;
  p = (p * rr + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1;
  q = ((q * rr + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr + 2;
  p = p * r;
  const VEC y = 1 + 2 * (p / (q - p));
  const INTEGER power = (INTEGER)lifted << 52;
#endif
  return NAME(choose)(y == y, (VEC)((INTEGER)y + power), y);
}

static inline __attribute__((always_inline)) VEC NAME(tanh)(VEC x) {
  const VEC size = NAME(magnitude)(x), z = x * x;
  const INTEGER small = size < (REAL)0.625, far = size > 22;
#if SINGLE
  VEC y = (VEC){0} - 5.70498872745e-3f;
  y = y * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
#else
  VEC y = (VEC){0} - 9.64399179425052238628e-1, q = z + 1.12811678491632931402e2;
  y = (y * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  q = (q * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  y = y / q;
#endif
  const VEC near = (y * z) * x + x;
  const VEC bounded = NAME(choose)(far, (VEC){0} + 22, size);
  const VEC away = 1 - 2 / (NAME(exponential)(bounded + bounded) + 1);
  return NAME(choose)(small, near, NAME(choose)(x < 0, -away, away));
}

static inline __attribute__((always_inline)) VEC NAME(logistic)(VEC x) {
  const REAL most = SINGLE ? 87 : 700;
  const VEC size = NAME(magnitude)(x), zero = {0};
  const INTEGER far = size > most;
  const VEC e = NAME(choose)(far, zero, NAME(exponential)(-NAME(choose)(far, zero, size)));
  return NAME(choose)(x < 0, e, zero + 1) / (1 + e);
}

static inline __attribute__((always_inline)) VEC NAME(rectified)(VEC x) { return NAME(choose)(x < 0, (VEC){0}, x); }

static inline __attribute__((always_inline)) VEC NAME(step_of)(VEC x) { return NAME(choose)(x > 0, (VEC){0} + 1, (VEC){0}); }

static inline __attribute__((always_inline)) VEC NAME(sign_of)(VEC x) {
  return NAME(choose)(x > 0, (VEC){0} + 1, NAME(choose)(x < 0, (VEC){0} - 1, x));
}

/* exp(x) of any x. */
static inline VEC NAME(exponential_of)(VEC x) {
  for (long l = 0; l < LANES; l++) x[l] = SINGLE ? (REAL)expf((float)x[l]) : (REAL)exp((double)x[l]);
  return x;
}

/* The first `count` numbers from x on, the rest zero. */
static inline VEC NAME(load_some)(const REAL *x, long count) {
  VEC v = {0};
  __builtin_memcpy(&v, x, count * sizeof(REAL));
  return v;
}

static inline void NAME(store_some)(REAL *x, VEC v, long count) { __builtin_memcpy(x, &v, count * sizeof(REAL)); }
#undef INTEGER
