/* What every compiled library of passes begins with: sizes of registers, prefetching, and memory of a thread.

   Vector types of the compiler are used, so that the same source serves every processor; the sizes of a block of registers
   follow from the instruction set that is compiled for. No fast-math: NaN and infinity go through. */

#include <math.h>
#include <stdlib.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define NV 2
#define MR 12
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define NV 2
#define MR 6
#elif defined(__aarch64__)
#define VECTOR_BYTES 16
#define NV 4
#define MR 6
#else
#define VECTOR_BYTES 16
#define NV 2
#define MR 6
#endif

#define EXPORT __attribute__((visibility("default")))
#define FEW 4 /* outputs that are read out one by one, since panels would be nearly empty */
#define MOST_ROWS 512     /* of a sum over rows; `accumulation_steps` and `tile` of passes.py keep to it */
#define LONGEST_BLOCK 32 /* steps that sums over steps and sequences are put off, at most */

/* Data that will be needed soon: `bytes` from `at` on. */
typedef struct {
  const char *at;
  long bytes;
} span;

/* A length up to the next multiple of a line of the cache. */
#define ROUNDED(count) (((count) + 15) & ~15L)

#define NOTHING ((span){NULL, 0})
#define SPAN(x, count) ((span){(const char *)(x), (long)((count) * sizeof(REAL))})

static inline void fetch(span what, long from, long to) {
  if (to > what.bytes) to = what.bytes;
  for (; from < to; from += 64) __builtin_prefetch(what.at + from, 0, 2);
}

/* Memory of the calling thread, kept for its next pass: fresh memory would cost page faults each time. */
static void *workspace(size_t bytes) {
  static __thread void *memory;
  static __thread size_t size;
  if (bytes > size) {
    free(memory);
    size = bytes;
    if (posix_memalign(&memory, 64, bytes)) {
      memory = NULL;
      size = 0;
    }
  }
  return memory;
}
