// Checkpoints: which tensor lies where, and the order in which files replace each other.
#include "models/checkpoint.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include <expar/collectives.h>

#include "io/safetensors.h"

namespace expar {
namespace {

constexpr std::int64_t kBytes = 256;
constexpr const char* kModelFile = "model.safetensors";
constexpr const char* kConfigFile = "config.json";
constexpr std::string_view kOptimizerFile = "optimizer-";  // and the step
constexpr std::string_view kExtension = ".safetensors";

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
std::vector<SavedTensor> saved_tensors(const TextModelOptions& model, const Parallel& ranks) {
  const MoeLayerOptions& moe = model.moe;
  const bool low = moe.dtype == DType::bf16;
  std::vector<SavedTensor> all;
  for (std::int64_t place = 0; place < model.context; ++place) {
    const int owner = owner_of(place, ranks.data.size(), model.context);
    const std::int64_t local = place - experts_of(owner, ranks.data.size(), model.context).first;
    all.push_back({.name = "model.embed_places." + std::to_string(place) + ".weight",
                   .shape = {kBytes, moe.hidden},
                   .parameter = "embedding",
                   .first = local * kBytes * moe.hidden,
                   .owner = owner,
                   .here = owner == ranks.data.rank(),
                   .low = low});
  }
  for (std::int64_t layer = 0; layer < model.layers; ++layer) {
    const std::string block = "model.layers." + std::to_string(layer) + ".";
    const std::string parameters = "layers." + std::to_string(layer) + ".";
    all.push_back({.name = block + "post_attention_layernorm.weight",
                   .shape = {moe.hidden},
                   .parameter = "norms",
                   .first = layer * moe.hidden});
    all.push_back({.name = block + "mlp.gate.weight",
                   .shape = {moe.router.experts, moe.hidden},
                   .parameter = parameters + "router.weight"});
    if (moe.router.selection_bias) {
      all.push_back({.name = block + "mlp.gate.e_score_correction_bias",
                     .shape = {moe.router.experts},
                     .parameter = parameters + "selection_bias",
                     .trained = false});
    }
    for (std::int64_t e = 0; e < moe.router.experts; ++e) {
      const int owner = owner_of(e, ranks.experts.size(), moe.router.experts);
      const std::int64_t local = e - experts_of(owner, ranks.experts.size(), moe.router.experts).first;
      const ExpertRange slice = experts_of(ranks.slice(), ranks.slice_count(), moe.inner);
      const std::int64_t each = slice.count * moe.hidden;
      const auto matrix = [&](const char* name, Shape shape, int axis, const char* parameter, std::int64_t first) {
        all.push_back({.name = block + "mlp.experts." + std::to_string(e) + "." + name + ".weight",
                       .shape = shape,
                       .parameter = parameters + parameter,
                       .first = first,
                       .owner = ranks.holder(owner),
                       .here = owner == ranks.experts.rank(),
                       .axis = axis,
                       .slice = slice,
                       .low = low});
      };
      matrix("gate_proj", {moe.inner, moe.hidden}, 0, "experts.up", 2 * local * each);
      matrix("up_proj", {moe.inner, moe.hidden}, 0, "experts.up", (2 * local + 1) * each);
      matrix("down_proj", {moe.hidden, moe.inner}, 1, "experts.down", local * each);
    }
  }
  all.push_back(
      {.name = "model.norm.weight", .shape = {moe.hidden}, .parameter = "norms", .first = model.layers * moe.hidden});
  all.push_back({.name = "lm_head.weight", .shape = {kBytes, moe.hidden}, .parameter = "head", .low = low});
  return all;
}

// Names of what the optimizer's file has of a tensor: as PyTorch's AdamW calls them, and the f32 values.
std::string value_name(const SavedTensor& t) { return t.name + ".master"; }
std::string m_name(const SavedTensor& t) { return t.name + ".exp_avg"; }
std::string v_name(const SavedTensor& t) { return t.name + ".exp_avg_sq"; }

/// What this rank has, by name.
class State {
 public:
  State(TextModel& model, AdamW& optimizer) {
    const std::vector<Parameter> parameters = model.parameters();
    const std::vector<AdamWMoments> moments = optimizer.moments(parameters);
    for (std::size_t i = 0; i < parameters.size(); ++i) parts_[parameters[i].name] = {parameters[i], moments[i]};
    if (!model.options().moe.router.selection_bias) return;
    for (std::size_t layer = 0; layer < static_cast<std::size_t>(model.options().layers); ++layer) {
      parts_["layers." + std::to_string(layer) + ".selection_bias"].parameter.value = model.selection_bias(layer);
    }
  }
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
  static Tensor piece(const SavedTensor& t, const Tensor& all) {
    const Shape shape = t.axis == 0   ? Shape{t.slice.count, t.shape[1]}
                        : t.axis == 1 ? Shape{t.shape[0], t.slice.count}
                                      : t.shape;
    return {all.bytes() + static_cast<std::size_t>(t.first) * size_of(all.dtype()), all.dtype(), shape};
  }

  std::map<std::string, Part> parts_;
};

// ---- what the metadata says

template <class Number>
std::string text_of(Number value) {
  char text[64];
  const auto result = std::to_chars(std::begin(text), std::end(text), value);  // the shortest that reads back the same
  return {text, result.ptr};
}

/// Calls visit(name, value) for each number that a training was set up with.
template <class Options, class Visit>
void visit_numbers(Options& options, Visit visit) {
  visit_extents(options, visit);
  visit_settings(options, visit);
}

std::string key_of(std::string_view name) { return "expar." + std::string(name); }
// Only where there is a capacity.
constexpr std::string_view kCapacityFactor = "capacity_factor", kCapacityPolicy = "capacity_policy";

io::Metadata describe(const TrainOptions& options, std::int64_t step, const std::string& optimizer) {
  io::Metadata metadata{{"format", "pt"},
                        {key_of("step"), text_of(step)},
                        {key_of("optimizer"), optimizer},
                        {key_of("dtype"), std::string(name(options.model.moe.dtype))},
                        {key_of("router"), options.router}};
  visit_numbers(options, [&](const char* name, const auto& value) { metadata[key_of(name)] = text_of(value); });
  const CapacityOptions& capacity = options.model.moe.capacity;
  if (capacity.policy != CapacityPolicy::none) {
    metadata[key_of(kCapacityFactor)] = text_of(capacity.factor);
    metadata[key_of(kCapacityPolicy)] = name(capacity.policy);
  }
  return metadata;
}

[[noreturn]] void refuse(const std::string& path, const std::string& what) {
  throw Error(ErrorCode::io, path + ": " + what);
}

class Description {
 public:
  explicit Description(const io::SafetensorsFile& file) : file_(file) {}
  bool has(std::string_view name) const { return file_.metadata().contains(key_of(name)); }
  const std::string& text(std::string_view name) const {
    const auto found = file_.metadata().find(key_of(name));
    if (found == file_.metadata().end()) {
      refuse(file_.path(), "not a checkpoint of expar train: its metadata has no \"" + key_of(name) + "\"");
    }
    return found->second;
  }
  template <class Number>
  void number(std::string_view name, Number& value) const {
    const std::string& said = text(name);
    const auto result = std::from_chars(said.data(), said.data() + said.size(), value);
    if (result.ec == std::errc() && result.ptr == said.data() + said.size()) return;
    refuse(file_.path(), "its metadata says " + key_of(name) + " = \"" + said + "\", which is no such number");
  }

 private:
  const io::SafetensorsFile& file_;
};

/// The family whose names and router the blocks have.
enum class Family : std::uint8_t { qwen3_moe, deepseek_v3, none };

Family family_of(const MoeLayerOptions& moe) {
  const RouterOptions& router = moe.router;
  const bool plain_experts = !moe.bias && moe.activation == Activation::swiglu && moe.numbers == ActivationNumbers{} &&
                             moe.shared_inner == 0 && moe.weights_on == WeightsOn::output;
  // Who does not train goes by the plain logits where Sinkhorn trained, which have the order of the scores.
  const bool by_scores = router.choice == Choice::scores || router.choice == Choice::sinkhorn;
  if (!plain_experts || router.bias || !by_scores) return Family::none;
  if (router.score == Score::sigmoid && router.selection_bias) return Family::deepseek_v3;
  const bool is_plain = router.score == Score::softmax && !router.selection_bias && router.scaling == 1.0F &&
                        router.groups_used == router.groups;
  return is_plain ? Family::qwen3_moe : Family::none;
}

std::string config_of(const TextModelOptions& model) {
  const MoeLayerOptions& moe = model.moe;
  const RouterOptions& router = moe.router;
  const bool is_deepseek = family_of(moe) == Family::deepseek_v3;
  const std::string dtype = moe.dtype == DType::bf16 ? "bfloat16" : "float32";
  std::string text = "{\n";
  const auto line = [&](const char* key, const std::string& value) {
    text += "  \"" + std::string(key) + "\": " + value + ",\n";
  };
  line("architectures", is_deepseek ? "[\"DeepseekV3ForCausalLM\"]" : "[\"Qwen3MoeForCausalLM\"]");
  line("model_type", is_deepseek ? "\"deepseek_v3\"" : "\"qwen3_moe\"");
  line("hidden_size", text_of(moe.hidden));
  line("moe_intermediate_size", text_of(moe.inner));
  line(is_deepseek ? "n_routed_experts" : "num_experts", text_of(router.experts));
  line("num_experts_per_tok", text_of(router.topk));
  line("norm_topk_prob", router.renormalise ? "true" : "false");
  if (is_deepseek) {
    line("scoring_func", "\"sigmoid\"");
    line("topk_method", "\"noaux_tc\"");
    line("n_group", text_of(router.groups));
    line("topk_group", text_of(router.groups_used));
    line("routed_scaling_factor", text_of(router.scaling));
    line("n_shared_experts", "0");
    line("first_k_dense_replace", "0");
    line("moe_layer_freq", "1");
  } else {
    line("decoder_sparse_step", "1");
    line("mlp_only_layers", "[]");
  }
  line("hidden_act", "\"silu\"");
  line("num_hidden_layers", text_of(model.layers));
  line("rms_norm_eps", "1e-05");
  line("vocab_size", text_of(kBytes));
  line("tie_word_embeddings", "false");
  return text + "  \"torch_dtype\": \"" + dtype + "\"\n}\n";
}

// ---- slices

/// Columns [first, first + part.size(1)) of `whole` stand in `part`: copies them there, or from there.
void copy_columns(const Tensor& whole, const Tensor& part, std::int64_t first, bool into_whole) {
  const std::size_t size = size_of(whole.dtype());
  const auto bytes = [&](std::int64_t elements) { return static_cast<std::size_t>(elements) * size; };
  for (std::int64_t row = 0; row < part.size(0); ++row) {
    std::byte* const in_whole = whole.bytes() + bytes(row * whole.size(1) + first);
    std::byte* const in_part = part.bytes() + bytes(row * part.size(1));
    std::memcpy(into_whole ? in_whole : in_part, into_whole ? in_part : in_whole, bytes(part.size(1)));
  }
}

/// The whole of a tensor from the slices of all ranks of ranks.tensor. Collective over these.
Tensor join_slices(const Parallel& ranks, const SavedTensor& t, const Tensor& mine, Buffer& joined, Buffer& whole) {
  const auto flat = [](const Tensor& tensor) { return Tensor(tensor.data(), tensor.dtype(), {tensor.elements()}); };
  const Tensor all = joined.view(mine.dtype(), t.shape);
  all_gather(ranks.all.on(ranks.tensor), flat(mine), flat(all));
  if (t.axis == 0) return all;  // one below the other
  const Tensor result = whole.view(mine.dtype(), t.shape);
  for (int r = 0; r < ranks.slice_count(); ++r) {
    const ExpertRange slice = experts_of(r, ranks.slice_count(), t.shape[1]);
    const std::size_t before = static_cast<std::size_t>(slice.first * t.shape[0]) * size_of(mine.dtype());
    copy_columns(result, Tensor(all.bytes() + before, mine.dtype(), {t.shape[0], slice.count}), slice.first, true);
  }
  return result;
}

// ---- saving

/// Rank 0's files. What goes wrong is kept until all ranks can hear of it, for they are in the middle of sending.
class Files {
 public:
  Files(const std::string& directory, const TrainOptions& options, std::int64_t step,
        const std::vector<SavedTensor>& tensors)
      : directory_(directory), optimizer_name_(std::string(kOptimizerFile) + text_of(step) + std::string(kExtension)) {
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
  const io::SafetensorsFile file(std::filesystem::path(directory) / kModelFile);
  const Description description(file);
  SavedTraining saved;
  description.number("step", saved.step);
  saved.optimizer = description.text("optimizer");
  visit_extents(saved.options, [&](const char* name, auto& value) { description.number(name, value); });
  const std::string& router = description.text("router");
  const auto names = router_names();
  if (std::find(names.begin(), names.end(), router) == names.end()) {
    refuse(file.path(), "its metadata says expar.router = \"" + router + "\", which is not a router that expar trains");
  }
  choose_router(saved.options, router);
  visit_settings(saved.options, [&](const char* name, auto& value) { description.number(name, value); });
  const std::string& dtype = description.text("dtype");
  if (dtype != "f32" && dtype != "bf16") {
    refuse(file.path(), "its metadata says expar.dtype = \"" + dtype + "\", which is neither f32 nor bf16");
  }
  saved.options.model.moe.dtype = parse_dtype(dtype);
  saved.options.steps = saved.step + 1;
  try {
    CapacityOptions& capacity = saved.options.model.moe.capacity;
    if (description.has(kCapacityPolicy)) {
      capacity.policy = parse_capacity_policy(description.text(kCapacityPolicy));
      description.number(kCapacityFactor, capacity.factor);
    }
    validate(saved.options);
  } catch (const Error& error) {
    refuse(file.path(), "its metadata says what cannot be: " + error.message());
  }
  if (saved.optimizer.find('/') != std::string::npos) {
    refuse(file.path(), "its optimizer file \"" + saved.optimizer + "\" is not a name in the same directory");
  }
  return saved;
}

void check_checkpoint_directory(const std::string& directory, const TextModelOptions& model) {
  if (model.moe.capacity.rows > 0 || model.moe.capacity.scope != CapacityScope::global) {
    throw Error(ErrorCode::bad_argument, "a checkpoint tells only capacities by a factor over the global batch");
  }
  if (family_of(model.moe) == Family::none) {
    throw Error(ErrorCode::bad_argument,
                "a checkpoint holds routed SwiGLU experts without biases, weighted on their output, and a router as "
                "Qwen3-MoE's or "
                "DeepSeek-V3's");
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
  const State state(model, optimizer);
  std::optional<Files> files;
  if (ranks.all.rank() == 0) files.emplace(directory, options, optimizer.steps(), tensors);

  Buffer arrived, joined, whole;
  // Rank 0's own tensors are written from where they lie, the others' from here.
  const auto bring = [&](const SavedTensor& t, Tensor mine, DType dtype) {
    const bool gives = context.rank() == t.owner;
    if (gives && t.axis >= 0 && ranks.tensor) mine = join_slices(ranks, t, mine, joined, whole);
    if (t.owner == 0 || ranks.slice() != 0) return mine;
    const Tensor all = gives ? mine : arrived.view(dtype, t.shape);
    broadcast(context, all, t.owner);
    return all;
  };
  for (const SavedTensor& t : tensors) {
    const auto save = [&](Tensor (State::*part)(const SavedTensor&) const, DType dtype, const std::string& name,
                          void (Files::*write)(const std::string&, ConstTensor)) {
      const Tensor tensor = bring(t, t.here ? (state.*part)(t) : Tensor(), dtype);
      if (files) ((*files).*write)(name, tensor);
    };
    if (t.low) {
      save(&State::low, DType::bf16, t.name, &Files::write_model);
      save(&State::value, DType::f32, value_name(t), &Files::write_state);
    } else {
      save(&State::value, DType::f32, t.name, &Files::write_model);
    }
    if (!t.trained) continue;
    save(&State::m, DType::f32, m_name(t), &Files::write_state);
    save(&State::v, DType::f32, v_name(t), &Files::write_state);
  }

  Operation saving(ranks.all.communicator(), Signature("save_checkpoint"), context.timeout());
  saving.ready([&]() -> Operation::Words {
    if (files) files->commit();
    return {};
  });
  saving.meet();
  saving.complete();
}

void load_checkpoint(const Parallel& ranks, const std::string& directory, TextModel& model, AdamW& optimizer) {
  Operation loading(ranks.all.communicator(), Signature("load_checkpoint"), ranks.all.timeout());
  loading.ready([&]() -> Operation::Words {
    const SavedTraining saved = read_checkpoint(directory);
    const std::filesystem::path path(directory);
    const io::SafetensorsFile values(path / kModelFile);
    const io::SafetensorsFile others(path / saved.optimizer);
    const State state(model, optimizer);
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
        copy_columns(all, to, t.slice.first, false);
      };
      read(t.low ? others : values, t.low ? value_name(t) : t.name, state.value(t));
      if (!t.trained) continue;
      read(others, m_name(t), state.m(t));
      read(others, v_name(t), state.v(t));
    }
    optimizer.go_on_from(saved.step);
    return {static_cast<std::uint64_t>(saved.step)};
  });
  loading.meet();
  loading.complete();
  model.refresh(ranks.data);
}

}  // namespace expar
