// What a checkpoint gives back, and which tensor it refuses, without the command line.
#include "models/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <expar/random.h>
#include <expar/registry.h>
#include <gtest/gtest.h>

#include "io/safetensors.h"
#include "tests/directory.h"
#include "tests/error_of.h"
#include "tests/fastest_backend.h"

namespace expar {
namespace {

constexpr int kRanks = 2;

TrainOptions small(DType dtype) {
  TrainOptions options;
  options.model.context = 3;
  options.model.layers = 2;
  options.model.moe.hidden = 8;
  options.model.moe.inner = 6;
  options.model.moe.router = {.experts = 3, .topk = 2};
  options.model.moe.dtype = dtype;
  return options;
}

/// A model and its optimizer, every number of which is `offset` and a number that its name and place give.
struct Trained {
  Trained(const Context& context, DType dtype, float offset) : model(context, small(dtype).model, 1) {
    const auto parameters = model.parameters();
    const auto moments = optimizer.moments(parameters);
    for (std::size_t p = 0; p < parameters.size(); ++p) {
      const std::string& name = parameters[p].name;
      fill(name + ".value", parameters[p].value, offset);
      fill(name + ".m", moments[p].m, offset);
      fill(name + ".v", moments[p].v, offset);
    }
    model.refresh(context);
  }
  static void fill(const std::string& name, const Tensor& tensor, float offset) {
    const Random random(7, name);
    for (std::int64_t i = 0; i < tensor.elements(); ++i)
      tensor.as<float>()[i] = offset + random.uniform(static_cast<std::uint64_t>(i));
  }
  /// Everything in it, in order.
  std::vector<float> numbers() {
    std::vector<float> all;
    const auto parameters = model.parameters();
    const auto moments = optimizer.moments(parameters);
    for (std::size_t p = 0; p < parameters.size(); ++p) {
      for (const Tensor& tensor : {parameters[p].value, moments[p].m, moments[p].v})
        all.insert(all.end(), tensor.as<float>(), tensor.as<float>() + tensor.elements());
    }
    return all;
  }

  TextModel model;
  AdamW optimizer;
};

void on_ranks(const std::function<void(const Context&)>& work) {
  run_threads(kRanks, [&](const Communicator& communicator) {
    work(Context(communicator, {.threads = 1, .backend = test::fastest_backend()}));
  });
}

class CheckpointFiles : public InDirectory {};

TEST_F(CheckpointFiles, give_back_every_parameter_and_both_its_moments) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    on_ranks([&](const Context& context) {
      Trained saved(context, dtype, 0), loaded(context, dtype, 5);
      saved.optimizer.go_on_from(12);
      const std::string directory = path("saved_" + std::string(name(dtype)));
      save_checkpoint(context, directory, saved.model, saved.optimizer, small(dtype));
      load_checkpoint(context, directory, loaded.model, loaded.optimizer);
      EXPECT_EQ(loaded.numbers(), saved.numbers());
      EXPECT_EQ(loaded.optimizer.steps(), 12);
    });
  }
}

/// Whoever else reads the file goes by the names.
TEST_F(CheckpointFiles, call_the_moments_as_pytorch_does) {
  on_ranks([&](const Context& context) {
    Trained saved(context, DType::f32, 0);
    save_checkpoint(context, path("saved"), saved.model, saved.optimizer, small(DType::f32));
    if (context.rank() != 0) return;
    const auto parameters = saved.model.parameters();
    const auto moments = saved.optimizer.moments(parameters);
    const auto head = std::find_if(parameters.begin(), parameters.end(), [](auto& p) { return p.name == "head"; });
    const AdamWMoments& of_head = moments.at(static_cast<std::size_t>(head - parameters.begin()));
    const io::SafetensorsFile file(path("saved/optimizer-0.safetensors"));
    const auto holds = [&](const std::string& name, const Tensor& numbers) {
      const auto bytes = file.at(name).bytes();
      return bytes.size() == numbers.byte_size() && std::memcmp(bytes.data(), numbers.data(), bytes.size()) == 0;
    };
    EXPECT_TRUE(holds("lm_head.weight.exp_avg", of_head.m));
    EXPECT_TRUE(holds("lm_head.weight.exp_avg_sq", of_head.v));
  });
}

/// Writes the file again with one tensor of another shape or dtype.
void spoil(const std::string& file, const std::string& tensor, DType dtype, const Shape& shape) {
  const io::SafetensorsFile old(file);
  const Array other(dtype, shape);
  std::vector<Array> kept;
  kept.reserve(old.tensors().size());
  std::vector<io::NamedTensor> tensors;
  for (const io::StoredTensor& stored : old.tensors()) {
    kept.push_back(stored.read());
    tensors.push_back({stored.name(), stored.name() == tensor ? other : kept.back()});
  }
  const io::Metadata metadata = old.metadata();
  io::write_safetensors(file, tensors, metadata);
}

TEST_F(CheckpointFiles, name_the_tensor_that_has_another_shape_or_dtype) {
  const std::string up = "model.layers.1.mlp.experts.2.up_proj.weight";
  const struct {
    std::string file, tensor;
    DType dtype;
    Shape shape;
    std::string says;
  } wrongs[] = {
      {"model.safetensors", up, DType::f32, {6, 7}, up + " is F32 [6, 7], should be f32 [6, 8]"},
      {"model.safetensors",
       "lm_head.weight",
       DType::bf16,
       {256, 8},
       "lm_head.weight is BF16 [256, 8], should be f32 [256, 8]"},
      {"optimizer-0.safetensors",
       up + ".exp_avg_sq",
       DType::f32,
       {48},
       up + ".exp_avg_sq is F32 [48], should be f32 [6, 8]"},
  };
  for (const auto& wrong : wrongs) {
    on_ranks([&](const Context& context) {
      Trained trained(context, DType::f32, 0);
      save_checkpoint(context, path("spoiled"), trained.model, trained.optimizer, small(DType::f32));
    });
    spoil(path("spoiled/" + wrong.file), wrong.tensor, wrong.dtype, wrong.shape);
    on_ranks([&](const Context& context) {
      Trained trained(context, DType::f32, 0);
      const Error error =
          test::error_of([&] { load_checkpoint(context, path("spoiled"), trained.model, trained.optimizer); });
      EXPECT_EQ(error.code(), ErrorCode::io);
      EXPECT_NE(error.message().find(wrong.says), std::string::npos) << error.what();
    });
    std::filesystem::remove_all(path("spoiled"));
  }
}

}  // namespace
}  // namespace expar
