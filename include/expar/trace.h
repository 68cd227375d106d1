// What a rank did, and when: spans of its time, kept in memory while a job runs, for a picture of it afterwards.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace expar {

/// A stretch of one rank's time. The spans of a rank lie beside each other or one within another.
struct Span {
  using Time = std::chrono::steady_clock::time_point;  // the same clock for all ranks of a host

  enum class Kind : std::uint8_t {
    phase,      // what the rank is busy with: "dispatch"
    operation,  // its part of a collective: "start dispatch", "all_reduce"
    wait,       // waiting for others, within an operation
  };
  Kind kind = Kind::phase;
  std::string_view name = {};  // of a wait: the operation that waits
  std::string_view what = {};  // of a wait: for what, "its rows"
  int peer = -1;               // of a wait: for which rank; -1 when it is not one
  Time start = {}, end = {};
};

inline Span operation_span(std::string_view name) { return {.kind = Span::Kind::operation, .name = name}; }

/// The spans of one rank, in the order of their ends. One thread at a time uses it.
/// Cost: 72 bytes per span; about a tenth of a microsecond to add one.
class Trace {
 public:
  static constexpr std::size_t kCapacity = std::size_t{1} << 18;

  explicit Trace(std::size_t capacity = kCapacity) : capacity_(capacity) {}
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  /// Keeps a copy, words included. Spans beyond the capacity, or beyond memory, are only counted.
  void add(Span span) noexcept;

  /// Valid until the next add().
  std::span<const Span> spans() const { return spans_; }
  std::int64_t left_out() const { return left_out_; }

 private:
  std::string_view kept(std::string_view word);

  std::size_t capacity_;
  std::vector<Span> spans_;
  std::set<std::string, std::less<>> words_;
  std::int64_t left_out_ = 0;
};

/// Times what happens until its own end, exceptions included: as a span of `trace`, as milliseconds added to a number,
/// or both. `milliseconds` must live as long as this object. Never throws. Cost: two branches where both are null.
class Phase {
 public:
  Phase(Trace* trace, std::string_view name, double* milliseconds = nullptr)
      : Phase(trace, Span{.name = name}, milliseconds) {}
  /// Start and end of `span` are filled in; its words must live as long as this object.
  Phase(Trace* trace, const Span& span, double* milliseconds = nullptr)
      : trace_(trace), milliseconds_(milliseconds), span_(span) {
    if (trace_ != nullptr || milliseconds_ != nullptr) span_.start = std::chrono::steady_clock::now();
  }
  ~Phase() {
    if (trace_ != nullptr || milliseconds_ != nullptr) end();
  }
  Phase(const Phase&) = delete;
  Phase& operator=(const Phase&) = delete;

 private:
  void end() noexcept;

  Trace* trace_;
  double* milliseconds_;
  Span span_;
};

}  // namespace expar
