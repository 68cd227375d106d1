// What the text in a checkpoint says: the metadata of model.safetensors, and config.json.
#pragma once

#include <string>

#include "io/safetensors.h"
#include "models/checkpoint.h"

namespace expar {

/// Of model.safetensors: the step, how the training was set up, and the file of its optimizer's state.
io::Metadata describe(const TrainOptions& options, std::int64_t step, const std::string& optimizer);
/// The same read back. Throws Error: io, naming the file and what its metadata says.
SavedTraining read_description(const io::SafetensorsFile& file);

/// Whether config.json has a family for such a model.
bool has_config(const MoeLayerOptions& moe);
/// config.json, as Qwen3-MoE's or DeepSeek-V3's.
std::string config_of(const TextModelOptions& model);

}  // namespace expar
