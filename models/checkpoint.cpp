// Saving and loading: who writes what, and the order in which files replace each other.
#include "models/checkpoint.h"

#include <filesystem>
#include <optional>
#include <vector>

#include <expar/collectives.h>
#include <expar/operation.h>

#include "io/safetensors.h"
#include "models/description.h"
#include "models/saved_tensors.h"

namespace expar {
namespace {

constexpr const char* kModelFile = "model.safetensors";
constexpr const char* kConfigFile = "config.json";
constexpr std::string_view kOptimizerFile = "optimizer-";  // and the step
constexpr std::string_view kExtension = ".safetensors";

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Error(ErrorCode::io, path + ": " + what);
}

/// Rank 0's files. What goes wrong is kept until all ranks can hear of it, for they are in the middle of sending.
class Files {
 public:
  Files(const std::string& directory, const TrainOptions& options, std::int64_t step,
        const std::vector<SavedTensor>& tensors)
      : directory_(directory),
        optimizer_name_(std::string(kOptimizerFile) + std::to_string(step) + std::string(kExtension)) {
    attempt([&] {
      std::vector<io::TensorSpec> model, state;
      for (const SavedTensor& t : tensors) {
        model.push_back({t.name, t.low ? DType::bf16 : DType::f32, t.shape});
        if (t.low) state.push_back({value_name(t), DType::f32, t.shape});
        if (!t.trained) continue;
        state.push_back({m_name(t), DType::f32, t.shape});
        state.push_back({v_name(t), DType::f32, t.shape});
      }
      check_checkpoint_directory(directory, options.model);
      io::write_text(path(kConfigFile), config_of(options.model));
      optimizer_.emplace(path(optimizer_name_), state, io::Metadata{{"format", "pt"}});
      model_.emplace(path(kModelFile), model, describe(options, step, optimizer_name_));
    });
  }

  void write_model(const std::string& name, ConstTensor tensor) {
    attempt([&] { model_->write(name, tensor); });
  }
  void write_state(const std::string& name, ConstTensor tensor) {
    attempt([&] { optimizer_->write(name, tensor); });
  }

  /// The model comes last: it names its optimizer's file, which is there by then. What no model names is removed.
  void commit() {
    if (failure_) throw *failure_;
    optimizer_->commit();
    model_->commit();
    std::error_code ignored;  // what stays lying there is removed by the next one
    for (const auto& entry : std::filesystem::directory_iterator(directory_, ignored)) {
      const std::string name = entry.path().filename();
      if (name.starts_with(kOptimizerFile) && name != optimizer_name_) std::filesystem::remove(entry.path(), ignored);
    }
  }

 private:
  template <class Work>
  void attempt(Work work) {
    if (failure_) return;
    try {
      work();
    } catch (const Error& error) {
      failure_ = error;
    } catch (const std::bad_alloc&) {
      failure_ = Error(ErrorCode::no_memory, "no memory to save a checkpoint");
    }
  }
  std::string path(std::string_view name) const { return std::filesystem::path(directory_) / name; }

  std::string directory_, optimizer_name_;
  std::optional<io::SafetensorsWriter> optimizer_, model_;
  std::optional<Error> failure_;
};

}  // namespace

SavedTraining read_checkpoint(const std::string& directory) {
  return read_description(io::SafetensorsFile(std::filesystem::path(directory) / kModelFile));
}

void check_checkpoint_directory(const std::string& directory, const TextModelOptions& model) {
  if (model.moe.capacity.rows > 0 || model.moe.capacity.scope != CapacityScope::global) {
    throw Error(ErrorCode::bad_argument, "a checkpoint tells only capacities by a factor over the global batch");
  }
  if (!has_config(model.moe)) {
    throw Error(ErrorCode::bad_argument,
                "a checkpoint holds routed SwiGLU experts without biases, weighted on their output, and a router as "
                "Qwen3-MoE's or DeepSeek-V3's");
  }
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) refuse(directory, "cannot make this directory: " + error.message());
  const std::filesystem::path file = std::filesystem::path(directory) / kModelFile;
  if (!std::filesystem::exists(file, error)) return;
  const TextModelOptions there = read_checkpoint(directory).options.model;
  if (config_of(there) == config_of(model) && there.context == model.context) return;
  throw Error(ErrorCode::bad_argument,
              directory + " holds the checkpoint of a model with other extents; choose another directory");
}

void save_checkpoint(const Parallel& ranks, const std::string& directory, TextModel& model, AdamW& optimizer,
                     const TrainOptions& options) {
  const Context& context = ranks.data;
  const Phase phase(context.trace(), "save");
  const std::vector<SavedTensor> tensors = saved_tensors(model.options(), ranks);
  const SavedState state(model, optimizer);
  std::optional<Files> files;
  if (ranks.all.rank() == 0) files.emplace(directory, options, optimizer.steps(), tensors);

  Buffer arrived, joined, whole;
  // Rank 0's own tensors are written from where they lie, the others' from here.
  const auto bring = [&](const SavedTensor& t, Tensor mine, DType dtype) {
    const bool gives = context.rank() == t.owner;
    if (gives && t.axis >= 0 && ranks.tensor) mine = whole_of(ranks, t, mine, joined, whole);
    if (t.owner == 0 || ranks.slice() != 0) return mine;
    const Tensor all = gives ? mine : arrived.view(dtype, t.shape);
    broadcast(context, all, t.owner);
    return all;
  };
  for (const SavedTensor& t : tensors) {
    const auto save = [&](Tensor (SavedState::*part)(const SavedTensor&) const, DType dtype, const std::string& name,
                          void (Files::*write)(const std::string&, ConstTensor)) {
      const Tensor tensor = bring(t, t.here ? (state.*part)(t) : Tensor(), dtype);
      if (files) ((*files).*write)(name, tensor);
    };
    if (t.low) {
      save(&SavedState::low, DType::bf16, t.name, &Files::write_model);
      save(&SavedState::value, DType::f32, value_name(t), &Files::write_state);
    } else {
      save(&SavedState::value, DType::f32, t.name, &Files::write_model);
    }
    if (!t.trained) continue;
    save(&SavedState::m, DType::f32, m_name(t), &Files::write_state);
    save(&SavedState::v, DType::f32, v_name(t), &Files::write_state);
  }

  meet(ranks.all.communicator(), Signature("save_checkpoint"), [&]() -> Operation::Words {
    if (files) files->commit();
    return {};
  });
}

void load_checkpoint(const Parallel& ranks, const std::string& directory, TextModel& model, AdamW& optimizer) {
  meet(ranks.all.communicator(), Signature("load_checkpoint"), [&]() -> Operation::Words {
    const SavedTraining saved = read_checkpoint(directory);
    const std::filesystem::path path(directory);
    const io::SafetensorsFile values(path / kModelFile);
    const io::SafetensorsFile others(path / saved.optimizer);
    const SavedState state(model, optimizer);
    Buffer whole;
    for (const SavedTensor& t : saved_tensors(model.options(), ranks)) {
      if (!t.here) continue;
      const auto read = [&](const io::SafetensorsFile& file, const std::string& name, const Tensor& to) {
        const io::StoredTensor& stored = file.at(name);
        if (stored.dtype() != to.dtype() || stored.shape() != t.shape) {
          refuse(file.path(), name + " is " + stored.str() + ", should be " + std::string(expar::name(to.dtype())) +
                                  " " + t.shape.str());
        }
        if (t.axis < 1 || to.shape() == t.shape) return stored.read_rows(t.slice.first, to);
        const Tensor all = whole.view(to.dtype(), t.shape);
        stored.read_rows(0, all);
        copy_slice(t, all, to);
      };
      read(t.low ? others : values, t.low ? value_name(t) : t.name, state.value(t));
      if (!t.trained) continue;
      read(others, m_name(t), state.m(t));
      read(others, v_name(t), state.v(t));
    }
    optimizer.go_on_from(saved.step);
    return {static_cast<std::uint64_t>(saved.step)};
  });
  model.refresh(ranks.data);
}

}  // namespace expar
