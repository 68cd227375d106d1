// The tensors of a checkpoint: their names and shapes in the files, and where each rank has its part of them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "models/text_model.h"

namespace expar {

/// A tensor of a checkpoint, and where it lies in TextModel::parameters().
struct SavedTensor {
  std::string name;  // Qwen3-MoE's where it has one
  Shape shape;
  std::string parameter;
  std::int64_t first = 0;  // element of the parameter where it is
  int owner = 0;           // rank of Parallel::data that it comes from
  bool here = true;        // this rank has it
  int axis = -1;           // along which ranks have slices of it; -1: it is whole
  ExpertRange slice = {};  // of that axis, on this rank
  bool low = false;        // works in bf16: the f32 values go with the optimizer's state
  bool trained = true;     // by the optimizer, which has moments of it
};

/// All tensors of the model, in the same order on every rank.
std::vector<SavedTensor> saved_tensors(const TextModelOptions& model, const Parallel& ranks);

// Names of what the optimizer's file has of a tensor: as PyTorch's AdamW calls them, and the f32 values.
inline std::string value_name(const SavedTensor& t) { return t.name + ".master"; }
inline std::string m_name(const SavedTensor& t) { return t.name + ".exp_avg"; }
inline std::string v_name(const SavedTensor& t) { return t.name + ".exp_avg_sq"; }

/// What this rank has, by name.
class SavedState {
 public:
  SavedState(TextModel& model, AdamW& optimizer);
  Tensor value(const SavedTensor& t) const { return piece(t, part(t).parameter.value); }
  Tensor low(const SavedTensor& t) const { return piece(t, part(t).parameter.low); }
  Tensor m(const SavedTensor& t) const { return piece(t, part(t).moments.m); }
  Tensor v(const SavedTensor& t) const { return piece(t, part(t).moments.v); }

 private:
  struct Part {
    Parameter parameter;
    AdamWMoments moments;
  };
  const Part& part(const SavedTensor& t) const { return parts_.at(t.parameter); }
  static Tensor piece(const SavedTensor& t, const Tensor& all);

  std::map<std::string, Part> parts_;
};

/// The whole of a tensor from the slices of all ranks of ranks.tensor, in `whole`. Collective over these.
Tensor whole_of(const Parallel& ranks, const SavedTensor& t, const Tensor& mine, Buffer& joined, Buffer& whole);
/// The columns of a whole tensor [N, M] that this rank has, [N, slice], to where it has them.
void copy_slice(const SavedTensor& t, const Tensor& whole, const Tensor& mine);

}  // namespace expar
