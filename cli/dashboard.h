// What expar train shows of a training in TensorBoard.
#pragma once

#include <string>
#include <vector>

#include "io/events.h"
#include "models/trainer.h"

namespace expar::cli {

/// Curves and histograms of one model's training, step by step. Times and rates are those of the rank that writes.
class Dashboard {
 public:
  /// Throws Error: io (no file can be made in `directory`).
  Dashboard(const std::string& directory, const TrainOptions& options);

  /// Throws Error: io, as show_heldout.
  void show(const Progress& progress);
  void show_heldout(const TrainReport& report);

 private:
  io::EventWriter events_;
  TrainOptions options_;
};

}  // namespace expar::cli
