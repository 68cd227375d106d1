// The memory of passes under way: each has its own from its start to its finish.
#pragma once

#include <memory>
#include <utility>
#include <vector>

#include "src/layer/record.h"

namespace expar {

struct ExpertsWorkspace {
  ExpertsRecord record;
  ExpertsScratch scratch;
  SharedRecord shared;
  Buffer wide, wide_dout, special, slot_weights, rerouted_ids, dweights;
  bool in_use = false;
};

class Workspaces {
 public:
  struct Return {
    void operator()(ExpertsWorkspace* workspace) const { workspace->in_use = false; }
  };
  using Loan = std::unique_ptr<ExpertsWorkspace, Return>;

  /// The first may be one that other layers use too.
  explicit Workspaces(std::shared_ptr<ExpertsWorkspace> first) { add(std::move(first)); }

  /// One that no pass has; a new one only where all are in use.
  Loan borrow() {
    for (const auto& workspace : all_) {
      if (!workspace->in_use) return lend(*workspace);
    }
    add(nullptr);
    return lend(*all_.back());
  }

 private:
  void add(std::shared_ptr<ExpertsWorkspace> workspace) {
    all_.push_back(workspace ? std::move(workspace) : std::make_shared<ExpertsWorkspace>());
  }
  static Loan lend(ExpertsWorkspace& workspace) {
    workspace.in_use = true;
    return Loan(&workspace);
  }

  std::vector<std::shared_ptr<ExpertsWorkspace>> all_;
};

}  // namespace expar
