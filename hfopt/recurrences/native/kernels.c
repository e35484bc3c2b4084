/* One pass on several threads of an OpenMP runtime that is there already: torch's own. A second pool of threads would fight with
   torch's for the cores, since OpenMP's threads keep their cores busy for a while after each piece of work. */

#include "common.h"

typedef long pass(const long *sizes, void *const *pointers);

typedef struct {
  pass *function;
  long calls, sizes_each, pointers_each;
  const long *sizes;       /* (calls, sizes_each) */
  void *const *pointers;   /* (calls, pointers_each) */
  int (*number)(void);     /* omp_get_thread_num */
  int (*members)(void);    /* omp_get_num_threads */
  long failed;
} job;

static void work(void *data) {
  job *j = data;
  const int members = j->members();
  for (long c = j->number(); c < j->calls; c += members)
    if (j->function(j->sizes + c * j->sizes_each, j->pointers + c * j->pointers_each))
      __atomic_fetch_add(&j->failed, 1, __ATOMIC_RELAXED);
}

/* Runs the calls of j; parallel is GOMP_parallel. Returns how many failed. */
EXPORT long run_in_team(job *j, void (*parallel)(void (*)(void *), void *, unsigned, unsigned)) {
  j->failed = 0;
  parallel(work, j, (unsigned)j->calls, 0);
  return j->failed;
}
