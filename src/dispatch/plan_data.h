// What a plan holds, and how every offset follows from the counts of all ranks.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include <expar/operation.h>
#include <expar/plan.h>

#include "src/util/check.h"
#include "src/util/shown.h"

namespace expar {

struct Plan::Data {
  explicit Data(const Context& context) : memory(context.memory()), rank(context.rank()), ranks(context.size()) {}

  /// Makes room for the bound's tokens where there is one: what calls give each other is then of one size.
  void reserve();
  ExpertRange held_by(int r) const {
    const std::int64_t first = first_experts[at(r)];
    return {first, first_experts[at(r + 1)] - first};
  }

  /// First outbox row that the rank of `expert` holds for this rank's slots of it.
  std::int64_t slot_start_of(std::int64_t expert) const { return slot_start[at(expert + 1)]; }
  /// First outbox row here of `source`'s slots of local expert `e`.
  std::int64_t source_start_of(int source, std::int64_t e) const {
    return source_start[at(source) * rows.size() + at(e)];
  }

  std::shared_ptr<std::pmr::memory_resource> memory;
  int rank, ranks;
  std::int64_t tokens = 0, topk = 0, experts = 0, alignment = 1;
  std::int64_t bound = 0;                                      // 0: there is none
  std::pmr::vector<std::int64_t> first_experts{memory.get()};  // [P + 1]
  std::uint64_t id = 0;                                        // 0: open
  bool replicated = false;
  std::optional<Error> failure;                               // why an open plan cannot be dispatched
  std::pmr::vector<std::int32_t> ids{memory.get()};           // [T, K]
  std::pmr::vector<std::int32_t> send_tokens{memory.get()};   // destination by destination
  std::pmr::vector<std::int32_t> own{memory.get()};           // [E + P] this rank's rows per expert, tokens per rank
  std::pmr::vector<std::int64_t> send_begin{memory.get()};    // [P + 1] into send_tokens
  std::pmr::vector<std::int64_t> send_row{memory.get()};      // [P]
  std::pmr::vector<std::int32_t> counts{memory.get()};        // [P, E]
  std::pmr::vector<std::int64_t> totals{memory.get()};        // [E]
  std::pmr::vector<std::int64_t> offsets{memory.get()};       // [L + 1]
  std::pmr::vector<std::int64_t> rows{memory.get()};          // [L]
  std::pmr::vector<std::int64_t> sources{memory.get()};       // [P + 1]
  std::pmr::vector<std::int32_t> slot_start{memory.get()};    // [1 + E], from expert -1
  std::pmr::vector<std::int64_t> source_start{memory.get()};  // [P, L]
  std::pmr::vector<SlotRow> slots{memory.get()};  // [T, K]; while open, the place among this rank's of an expert
};

/// Fills what this rank knows alone: its rows per expert, the place of each slot among its expert's, and the tokens
/// that each other rank needs.
void count(ConstTensor ids, const PlanOptions& options, Plan::Data& plan);

/// From what every rank has counted, its block beginning with its `own`, to all offsets. Counts that cannot be end the
/// job.
void complete(const Operation& operation, const Reading& counted, Plan::Data& plan);

/// The same where every rank has what this one has.
void complete_replicated(Plan::Data& plan);

}  // namespace expar
