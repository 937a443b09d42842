#include "pool.h"

#include <condition_variable>
#include <mutex>
#include <stdlib.h>
#include <string.h>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace nibble {

namespace {

constexpr int kSpinInside = 1000;   // looks at a phase that others still compute: some 20 to 50 us
constexpr int kSpinBetween = 2000;  // looks for the next program

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

struct Aligned {
  char* data = nullptr;
  size_t size = 0;
  ~Aligned() { free(data); }
  char* at_least(size_t bytes) {
    if (bytes > size) {
      free(data);
      size = (bytes + bytes / 4 + 4095) & ~size_t(4095);
      data = static_cast<char*>(aligned_alloc(4096, size));
      if (!data) { size = 0; throw std::bad_alloc(); }
    }
    return data;
  }
};

}  // namespace

// `state` holds the number of the program that may be joined (0 in its upper part: none) and how many workers are in it:
//
//     program number (48 bits) | closed (1 bit) | workers inside (15 bits)
//
// A worker joins by incrementing an open state it has not joined before, and leaves by decrementing it. The caller closes
// the program and returns when nobody is inside, for then nobody looks at its phases any more.
struct Team {
  int threads;
  uint64_t state = kClosed;
  int32_t sleepers = 0;
  bool stop = false;
  Program program = nullptr;
  void* argument = nullptr;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<std::thread> workers;
  std::vector<Aligned> scratch;
  Aligned phases, buffer;

  static constexpr uint64_t kInside = 0x7FFF, kClosed = 0x8000, kNext = 0x10000;

  explicit Team(int count) : threads(count), scratch(count) {
    for (Aligned& memory : scratch) memory.at_least(kScratch);
    for (int i = 1; i < count; i++) workers.emplace_back([this, i] { serve(i); });
  }

  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      __atomic_store_n(&stop, true, __ATOMIC_SEQ_CST);
    }
    changed.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  // Returns when ready() is true: spins first, then sleeps until somebody calls wake().
  template <class Ready> void wait(int spins, Ready ready) {
    for (int i = 0; i < spins; i++) {
      if (ready()) return;
      relax();
    }
    std::unique_lock<std::mutex> lock(mutex);
    __atomic_fetch_add(&sleepers, 1, __ATOMIC_SEQ_CST);
    while (!ready()) changed.wait(lock);
    __atomic_fetch_sub(&sleepers, 1, __ATOMIC_SEQ_CST);
  }

  // To be called after whatever ready() looks at was changed with sequential consistency.
  void wake() {
    if (__atomic_load_n(&sleepers, __ATOMIC_SEQ_CST) == 0) return;
    { std::lock_guard<std::mutex> lock(mutex); }
    changed.notify_all();
  }

  void execute(int thread) {
    Worker worker{this, reinterpret_cast<Phase*>(phases.data), scratch[thread].data, threads};
    program(worker, argument);
  }

  void serve(int thread) {
    uint64_t seen = 0;
    for (;;) {
      uint64_t now = 0;
      wait(kSpinBetween, [&] {
        now = __atomic_load_n(&state, __ATOMIC_SEQ_CST);
        return __atomic_load_n(&stop, __ATOMIC_SEQ_CST) || (!(now & kClosed) && now / kNext != seen);
      });
      if (__atomic_load_n(&stop, __ATOMIC_SEQ_CST)) return;
      if (!__atomic_compare_exchange_n(&state, &now, now + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
      seen = now / kNext;
      execute(thread);
      uint64_t after = __atomic_sub_fetch(&state, 1, __ATOMIC_SEQ_CST);
      if ((after & kClosed) && !(after & kInside)) wake();
    }
  }

  void run(Program next, void* its_argument, int max_phases) {
    memset(phases.at_least(sizeof(Phase) * max_phases), 0, sizeof(Phase) * max_phases);
    program = next;
    argument = its_argument;
    if (threads > 1) {
      uint64_t number = __atomic_load_n(&state, __ATOMIC_SEQ_CST) / kNext + 1;
      __atomic_store_n(&state, number * kNext, __ATOMIC_SEQ_CST);
      wake();
    }
    execute(0);
    if (threads > 1) {
      __atomic_fetch_or(&state, kClosed, __ATOMIC_SEQ_CST);
      wait(kSpinInside, [&] { return !(__atomic_load_n(&state, __ATOMIC_SEQ_CST) & kInside); });
    }
  }
};

Team* team_new(int threads) { return new Team(threads < 1 ? 1 : threads); }
void team_free(Team* team) { delete team; }
void team_run(Team* team, Program program, void* argument, int max_phases) { team->run(program, argument, max_phases); }
char* team_buffer(Team* team, size_t bytes) { return team->buffer.at_least(bytes); }
int team_threads(const Team* team) { return team->threads; }

void phase_done(Worker& worker, int chunks, int total) {
  if (__atomic_add_fetch(&worker.phase->done, chunks, __ATOMIC_SEQ_CST) == total) worker.team->wake();
}

void phase_wait(Worker& worker, int total) {
  worker.team->wait(kSpinInside, [&] { return __atomic_load_n(&worker.phase->done, __ATOMIC_SEQ_CST) == total; });
}

}  // namespace nibble
