// A rank's own threads. Each rank has one pool, so that P ranks never start P x cores threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

namespace expar {

/// A reference to a callable that lives at least as long as the call it is passed to. Never allocates.
template <class Signature>
class FunctionRef;
template <class R, class... Args>
class FunctionRef<R(Args...)> {
 public:
  template <class F>
  requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>) FunctionRef(F&& f)  // NOLINT: implicit by design
      : object_(const_cast<void*>(static_cast<const void*>(&f))), call_([](void* object, Args... args) -> R {
          return (*static_cast<std::remove_reference_t<F>*>(object))(static_cast<Args>(args)...);
        }) {}
  R operator()(Args... args) const { return call_(object_, static_cast<Args>(args)...); }

 private:
  void* object_;
  R (*call_)(void*, Args...);
};

/// The cores that this process may use.
struct Cores {
  int allowed = 1;                                         // that it may run on
  double quota = std::numeric_limits<double>::infinity();  // cores' worth of time that its control groups grant
  /// How many can work at a time; a part of a core counts as one.
  int usable() const;
};
/// Reads the affinity mask and the control groups as they are now; what cannot be read limits nothing. Never throws
/// Error.
Cores available_cores();

/// `threads` workers, the caller among them as worker 0; the others sleep between calls.
/// One caller at a time.
class Pool {
 public:
  /// Throws Error: bad_argument (below 1 thread), no_memory (the system refuses a thread; none is left behind).
  explicit Pool(int threads = 1);
  /// Ends the workers. In a forked child, which has none, it leaves them be.
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const;

  /// Calls task(index, worker) once for every index in [0, tasks), in no particular order; returns when all have
  /// returned. A task must not call run() of the same pool.
  /// Throws the first exception of a task, after all tasks have ended.
  /// Cost: no allocation; about a microsecond to wake sleeping workers.
  void run(std::int64_t tasks, FunctionRef<void(std::int64_t index, int worker)> task);

  /// At least `bytes` of 64-byte aligned memory that only `worker` uses, until it asks again; contents do not survive
  /// the task. Throws Error: no_memory. Cost: allocates only where the worker has never asked for as much.
  std::byte* scratch(int worker, std::size_t bytes);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace expar
