/* Passes over time in C, for float and double. Vector types of the compiler are used, so that the same source serves every
   processor; the sizes of a block of registers follow from the instruction set that is compiled for. No fast-math: NaN and
   infinity go through. */

#include "common.h"
#include "team.h"

#define REAL float
#define SINGLE 1
#define NAME(x) x##_float32
static REAL *NAME(workspace)(long count) { return workspace((count + 64) * sizeof(REAL)); }
#include "gemm.h"
#include "nonlinear.h"
#include "rows.h"
#include "simple.h"
#include "lstm.h"
#include "gru.h"
#include "mrnn.h"
#undef REAL
#undef SINGLE
#undef NAME

#define REAL double
#define SINGLE 0
#define NAME(x) x##_float64
static REAL *NAME(workspace)(long count) { return workspace((count + 64) * sizeof(REAL)); }
#include "gemm.h"
#include "nonlinear.h"
#include "rows.h"
#include "simple.h"
#include "lstm.h"
#include "gru.h"
#include "mrnn.h"
