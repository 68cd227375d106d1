// A fork-join pool: the caller and its workers claim task indexes from one word until none is left.
#include <expar/pool.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <expar/error.h>

#include "src/util/processor.h"

namespace expar {
namespace {

using Task = FunctionRef<void(std::int64_t, int)>;

constexpr std::align_val_t kCacheLine{64};

// Kernels of one layer follow each other within microseconds, and waking a sleeper costs 10-20 of
// them.
constexpr auto kSpin = std::chrono::microseconds(50);
// After these pauses (about 2 us) a waiter yields between looks: where ranks share cores, the
// others must get on.
constexpr int kPauses = 64;

/// Waits until done() holds, briefly awake; false if it does not by then.
template <class Done>
bool spin_until(Done done) {
  for (int i = 0; i < kPauses; ++i) {
    if (done()) return true;
    pause();
  }
  const auto limit = std::chrono::steady_clock::now() + kSpin;
  do {
    if (done()) return true;
    std::this_thread::yield();
  } while (std::chrono::steady_clock::now() < limit);
  return done();
}

struct alignas(64) Scratch {
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kCacheLine); }
  };
  std::unique_ptr<std::byte, Free> memory;
  std::size_t bytes = 0;
};

}  // namespace

// A run is published by `claim` = (number of the run, tasks not yet claimed). A worker reads the
// run's task and size, then claims by compare-and-swap: that it succeeds proves that the run is
// still the one it read. So the caller waits only for claimed tasks, never for a worker that wakes
// late.
struct Pool::State {
  explicit State(int count) : scratch(static_cast<std::size_t>(count)) {
    const auto cores = static_cast<int>(std::thread::hardware_concurrency());
    spin = count > 1 && (cores == 0 || count <= cores);
  }

  std::vector<Scratch> scratch;  // one for each worker
  bool spin = false;
  const pid_t owner = getpid();

  alignas(64) std::atomic<std::uint64_t> claim{0};
  alignas(64) std::atomic<std::uint32_t> signal{0};  // what idle workers sleep on: changes with every run
  std::atomic<const Task*> task{nullptr};
  std::atomic<std::uint32_t> tasks{0};
  std::atomic<std::int64_t> first{0};  // index of the run's first task
  std::atomic<bool> stop{false};
  alignas(64) std::atomic<std::uint32_t> done{0};

  std::mutex failing;
  std::exception_ptr failure;

  std::vector<std::jthread> workers;  // last: they must end before what they use

  void call(const Task& run, std::int64_t index, int worker) {
    try {
      run(index, worker);
    } catch (...) {
      const std::lock_guard lock(failing);
      if (!failure) failure = std::current_exception();
    }
  }

  void work(int worker) {
    std::uint64_t word = claim.load(std::memory_order_acquire);
    while (static_cast<std::uint32_t>(word) != 0) {
      const Task* run = task.load(std::memory_order_relaxed);
      const std::uint32_t total = tasks.load(std::memory_order_relaxed);
      const std::int64_t begin = first.load(std::memory_order_relaxed);
      // Acquire on failure as well: the word may belong to a newer run.
      if (!claim.compare_exchange_weak(word, word - 1, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
      call(*run, begin + static_cast<std::int64_t>(total - static_cast<std::uint32_t>(word)), worker);
      if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == total) done.notify_one();
      word = claim.load(std::memory_order_acquire);
    }
  }

  void serve(int worker) {
    std::uint32_t seen = 0;
    while (true) {
      const auto called = [&] { return signal.load(std::memory_order_acquire) != seen; };
      if (!spin || !spin_until(called)) signal.wait(seen, std::memory_order_acquire);
      seen = signal.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_relaxed)) return;
      work(worker);
    }
  }

  void wake() {
    signal.fetch_add(1, std::memory_order_release);
    signal.notify_all();
  }

  void run_shared(const Task& run, std::int64_t begin, std::uint32_t count) {
    task.store(&run, std::memory_order_relaxed);
    tasks.store(count, std::memory_order_relaxed);
    first.store(begin, std::memory_order_relaxed);
    done.store(0, std::memory_order_relaxed);
    const std::uint64_t number = (claim.load(std::memory_order_relaxed) >> 32) + 1;
    claim.store((number << 32) | count, std::memory_order_release);
    wake();
    work(0);
    const auto ended = [&] { return done.load(std::memory_order_acquire) == count; };
    if (spin && spin_until(ended)) return;
    for (std::uint32_t now = done.load(std::memory_order_acquire); now != count;
         now = done.load(std::memory_order_acquire)) {
      done.wait(now, std::memory_order_acquire);
    }
  }
};

Pool::Pool(int threads) {
  if (threads < 1) {
    throw Error(ErrorCode::bad_argument, "a pool needs at least 1 thread, not " + std::to_string(threads));
  }
  state_ = std::make_unique<State>(threads);
  try {
    for (int worker = 1; worker < threads; ++worker) {
      state_->workers.emplace_back([state = state_.get(), worker] { state->serve(worker); });
    }
  } catch (const std::system_error&) {
    const std::size_t started = state_->workers.size();
    state_->stop.store(true, std::memory_order_relaxed);
    state_->wake();
    throw Error(ErrorCode::no_memory, "the system started " + std::to_string(started) + " of " +
                                          std::to_string(threads - 1) + " worker threads and refused the next");
  }
}

Pool::~Pool() {
  if (getpid() != state_->owner) {
    // A forked child has copies of the workers' handles without the workers: nothing can be stopped or joined.
    [[maybe_unused]] State* const copy = state_.release();
    return;
  }
  state_->stop.store(true, std::memory_order_relaxed);
  state_->wake();
}

int Pool::threads() const { return static_cast<int>(state_->scratch.size()); }

void Pool::run(std::int64_t tasks, Task task) {
  State& state = *state_;
  if (threads() == 1 || tasks <= 1) {
    for (std::int64_t index = 0; index < tasks; ++index) state.call(task, index, 0);
  } else {
    constexpr std::int64_t kSlice = std::numeric_limits<std::int32_t>::max();
    for (std::int64_t begin = 0; begin < tasks; begin += kSlice) {
      state.run_shared(task, begin, static_cast<std::uint32_t>(std::min(kSlice, tasks - begin)));
    }
  }
  if (state.failure) std::rethrow_exception(std::exchange(state.failure, nullptr));
}

std::byte* Pool::scratch(int worker, std::size_t bytes) {
  Scratch& own = state_->scratch[static_cast<std::size_t>(worker)];
  if (own.bytes < bytes || own.memory == nullptr) {
    own.memory.reset();
    own.bytes = 0;
    // A half more than asked, so that a slowly growing need does not allocate at every step.
    const std::size_t wanted = std::max<std::size_t>(bytes + bytes / 2, 4096);
    void* memory = ::operator new(wanted, kCacheLine, std::nothrow);
    if (memory == nullptr) {
      throw Error(ErrorCode::no_memory, "no memory for " + std::to_string(wanted) + " bytes of a worker's scratch");
    }
    own.memory.reset(static_cast<std::byte*>(memory));
    own.bytes = wanted;
  }
  return own.memory.get();
}

}  // namespace expar
