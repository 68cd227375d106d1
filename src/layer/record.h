// What a layer's forward pass leaves for its backward pass, besides what MoeRecord shows.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <expar/layer.h>

namespace expar {

/// What the shared experts leave.
struct SharedRecord {
  ExpertsRecord experts;  // of T rows
  Tensor y;               // [T, H] f32
  Tensor gate;            // [T] f32, or absent
  Buffer y_memory, gate_memory;
};

struct MoeRecord::Kept {
  ConstTensor x;
  std::uint64_t seed = 0;  // what the jitter was drawn by
  std::string stream;
  std::int64_t first_token = 0;  // likewise: global number of this rank's first token
  std::vector<std::int64_t> shards;
  Buffer routed_ids;  // those of the routing, without special experts
  Inbox inbox;
  Outbox y;               // empty where the layer recomputes
  ExpertsRecord experts;  // the same
  SharedRecord shared;    // the same
};

inline MoeRecord::Kept& kept_of(MoeRecord& record) {
  if (!record.kept) record.kept = std::make_shared<MoeRecord::Kept>();
  return *record.kept;
}

}  // namespace expar
