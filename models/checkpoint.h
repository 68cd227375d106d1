// Saves a training so that it can go on, on any number of ranks and any mesh of them, as if it had never stopped.
#pragma once

#include <cstdint>
#include <string>

#include "models/trainer.h"

namespace expar {

/// A checkpoint is a directory:
///   config.json           as Qwen3-MoE's or DeepSeek-V3's: expar and transformers read the MoE blocks by it
///   model.safetensors     every parameter in the dtype that works, experts under their global index; its metadata says
///                         which step this is, how the training was set up and which file goes with it
///   optimizer-N.safetensors  AdamW's moments after step N and, in bf16, the f32 parameters
/// The bytes do not depend on the number of ranks, nor on how they hold the model. model.safetensors comes last and in
/// one piece: whatever happens while a checkpoint is written, the directory holds the one before it or the new one,
/// whole.
struct SavedTraining {
  TrainOptions options;  // without files
  std::int64_t step = 0;
  std::string optimizer;  // name of the file in the directory
};

/// Not collective: one rank asks. Throws Error: io (no such directory, not a checkpoint of `expar train`), naming the
/// file.
SavedTraining read_checkpoint(const std::string& directory);

/// Makes `directory` if it is not there. Throws Error: bad_argument (it holds the checkpoint of a model with other
/// extents; a model that neither family can tell), io (it cannot be written). Not collective.
void check_checkpoint_directory(const std::string& directory, const TextModelOptions& model);

/// Writes what `model` and `optimizer` hold. Rank 0 writes; what it does not hold, others bring.
/// Collective. Throws Error: io (a full disk, with the system's reason), as every collective.
/// Cost: one write of every parameter and its state.
void save_checkpoint(const Parallel& ranks, const std::string& directory, TextModel& model, AdamW& optimizer,
                     const TrainOptions& options);

/// Reads this rank's part. `model` has the options of the checkpoint.
/// Collective. Throws Error: io (a tensor is missing or has another shape, naming it).
/// Cost: one read of this rank's parameters and their state.
void load_checkpoint(const Parallel& ranks, const std::string& directory, TextModel& model, AdamW& optimizer);

}  // namespace expar
