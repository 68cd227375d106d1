// --trace: every rank records its time, and rank 0 writes what all of them have recorded.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include <expar/communicator.h>

namespace expar::cli {

/// Records what one rank does as long as it lives. Does nothing where `path` is empty.
class Tracing {
 public:
  Tracing(const Communicator& communicator, const std::string& verb, const std::string& path);
  ~Tracing();
  Tracing(const Tracing&) = delete;
  Tracing& operator=(const Tracing&) = delete;

  /// Rank 0 writes the rows of all. Collective. Throws Error: io, timeout, peer_lost.
  void finish();
  /// Instead of finish() after an error, when ranks reach each other no more: writes this rank's row to a file of its
  /// own, "<path>.rank3". The error is what matters, so what goes wrong here is not told.
  void keep() const noexcept;

 private:
  void write(const std::string& path, const std::vector<std::string>& rows) const;

  Communicator communicator_;
  std::string verb_, path_;
  std::shared_ptr<Trace> trace_;
};

/// After an error, when no rank runs any more: makes one trace of the rows that were kept. Never throws either.
void join_kept_traces(const std::string& verb, const std::string& path, int ranks) noexcept;

}  // namespace expar::cli
