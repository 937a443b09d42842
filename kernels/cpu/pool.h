// One persistent team of threads that runs a function on every thread at once.
//
// The function is a program of phases. A phase is a number of chunks, each claimed by whoever comes first and computed
// once; it is over when all chunks are done, not when all threads have arrived. So a thread that the machine has given
// to somebody else holds up nobody: the others take its share, and when it comes back it finds the phases done and
// catches up in no time. Waiting threads spin for some microseconds, then sleep.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace nibble {

struct alignas(64) Phase {
  int32_t next;  // first chunk that nobody has claimed
  int32_t done;  // chunks computed
};

struct Team;

// What one thread knows while it runs a program.
struct Worker {
  Team* team;
  Phase* phase;    // the current one
  char* scratch;   // this thread's own memory, kScratch bytes
  int32_t threads;
};

constexpr size_t kScratch = 1 << 20;

typedef void (*Program)(Worker&, void*);

Team* team_new(int threads);
void team_free(Team*);
// Runs `program` on all threads, at most max_phases phases of it, and returns when every phase is over.
void team_run(Team*, Program program, void* argument, int max_phases);
// Memory that stays until the next call: contents are undefined.
char* team_buffer(Team*, size_t bytes);
int team_threads(const Team*);
void phase_done(Worker&, int chunks, int total);
void phase_wait(Worker&, int total);

// Calls f(chunk) for the chunks that this thread gets of 0 .. total; returns when all of them are done. A thread may ask
// when the others are phases ahead: total must not depend on what a phase computes, or it waits for what never comes.
template <class F> static inline void parallel(Worker& worker, int total, F f) {
  int mine = 0;
  for (;;) {
    int chunk = __atomic_fetch_add(&worker.phase->next, 1, __ATOMIC_RELAXED);
    if (chunk >= total) break;
    f(chunk);
    mine++;
  }
  if (mine) phase_done(worker, mine, total);
  if (__atomic_load_n(&worker.phase->done, __ATOMIC_ACQUIRE) != total) phase_wait(worker, total);
  worker.phase++;
}

}  // namespace nibble
