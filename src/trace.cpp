// Trace: keeps spans up to a bound.
#include <expar/trace.h>

#include <new>

namespace expar {

void Trace::add(Span span) noexcept {
  if (spans_.size() < capacity_) {
    try {
      span.name = kept(span.name);
      span.what = kept(span.what);
      spans_.push_back(span);
      return;
    } catch (const std::bad_alloc&) {  // the work that is recorded must not fail for this
    }
  }
  ++left_out_;
}

/// Few words name very many spans, so each is kept once.
std::string_view Trace::kept(std::string_view word) {
  if (word.empty()) return {};
  const auto found = words_.find(word);
  return found != words_.end() ? *found : *words_.emplace(word).first;
}

void Phase::end() noexcept {
  span_.end = std::chrono::steady_clock::now();
  if (milliseconds_ != nullptr) {
    *milliseconds_ += std::chrono::duration<double, std::milli>(span_.end - span_.start).count();
  }
  if (trace_ != nullptr) trace_->add(span_);
}

}  // namespace expar
