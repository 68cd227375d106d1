// One layer with its parameters, one global batch, and what comes out of them on any number of ranks.
#include "tests/multirank/layer_case.h"

#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include <expar/collectives.h>
#include <expar/random.h>
#include <gtest/gtest.h>

namespace expar::test {
namespace {

std::vector<float> drawn(const char* name, std::int64_t count, double deviation, DType dtype) {
  const Random random(7, name);
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(deviation) * random.normal(i);
    if (dtype == DType::bf16) values[i] = static_cast<float>(bf16(values[i]));
  }
  return values;
}

std::string_view activation_name(Activation activation) {
  for (const NamedActivation& named : kActivations)
    if (named.activation == activation) return named.name;
  return "";
}

}  // namespace

std::string LayerSpec::name() const {
  return "E" + std::to_string(experts) + "_K" + std::to_string(topk) + "_" + std::string(expar::name(dtype)) + "_" +
         std::string(activation_name(activation)) + (bias ? "_bias" : "") + (renormalise ? "" : "_plain") +
         (weights_on == WeightsOn::inner   ? "_inner"
          : weights_on == WeightsOn::input ? "_input"
                                           : "") +
         (recompute ? "_recompute" : "") + (shared_inner > 0 ? "_shared" : "") + (shared_gate ? "_gate" : "") +
         (special.count() > 0 ? "_special" : "") + (hot >= 0 ? "_hot" : "") + (cold >= 0 ? "_cold" : "") +
         (capacity.policy == CapacityPolicy::none ? "" : "_" + std::string(expar::name(capacity.policy)));
}

LayerCase::LayerCase(const LayerSpec& s) : spec(s) {
  const std::int64_t E = spec.experts, H = spec.hidden, F = spec.inner, T = tokens();
  const auto root = [](std::int64_t n) { return 1.0 / std::sqrt(static_cast<double>(n)); };
  x = drawn("x", T * H, 1.0, spec.dtype);
  for (std::int64_t t = 0; t < T; ++t) x[static_cast<std::size_t>(t * H)] = 1.0F;  // the router's bias, so to speak
  residual = drawn("residual", T * H, 1.0, spec.dtype);
  dout = drawn("dout", T * H, 1.0 / static_cast<double>(T), spec.dtype);
  router = drawn("router", spec.all_experts() * H, 2.0 * root(H), DType::f32);
  special_mix = drawn("special_mix", spec.special.constant * 2 * H, 2.0 * root(H), DType::f32);
  special_value = drawn("special_value", spec.special.constant * H, 1.0, DType::f32);
  if (spec.hot >= 0) router[static_cast<std::size_t>(spec.hot * H)] = 20.0F;
  if (spec.cold >= 0) router[static_cast<std::size_t>(spec.cold * H)] = -20.0F;
  up = drawn("up", E * wide() * H, root(H), spec.dtype);
  down = drawn("down", E * H * F, root(F), spec.dtype);
  if (const std::int64_t shared = spec.shared_inner; shared > 0) {
    shared_up = drawn("shared_up", wide() / spec.inner * shared * H, root(H), spec.dtype);
    shared_down = drawn("shared_down", H * shared, root(shared), spec.dtype);
    if (spec.shared_gate) shared_gate = drawn("shared_gate", H, 2.0 * root(H), DType::f32);
  }
  up_bias = drawn("up_bias", E * wide(), 0.5, DType::f32);
  down_bias = drawn("down_bias", E * H, 0.5, DType::f32);
}

MoeLayerOptions LayerCase::options() const {
  MoeLayerOptions options;
  options.hidden = spec.hidden;
  options.inner = spec.inner;
  options.router.experts = spec.all_experts();
  options.special = spec.special;
  options.router.topk = spec.topk;
  options.router.renormalise = spec.renormalise;
  options.router.balance = 0.5F;
  options.router.z = 0.125F;
  options.activation = spec.activation;
  options.numbers = spec.numbers;
  options.bias = spec.bias;
  options.weights_on = spec.weights_on;
  options.recompute = spec.recompute;
  options.shared_inner = spec.shared_inner;
  options.shared_gate = spec.shared_gate;
  options.dtype = spec.dtype;
  options.bound = spec.bound;
  options.payload = spec.payload;
  options.gradient_payload = spec.gradient_payload;
  options.capacity = spec.capacity;
  return options;
}

LayerCase::Held LayerCase::held(int rank, int ranks) const {
  const std::size_t all = shards.size() - 1;
  const auto r = static_cast<std::size_t>(rank);
  const auto p = static_cast<std::size_t>(ranks);
  if (ranks == 1) return {0, all};
  if (ranks == 2) return rank == 0 ? Held{0, 3} : Held{3, all - 3};
  if (rank < 2) return {r, 1};
  const auto begin = [&](std::size_t i) { return 2 + (all - 2) * (i - 2) / (p - 2); };
  return {begin(r), begin(r + 1) - begin(r)};
}

void LayerCase::fill(MoeLayer& layer) const {
  const auto copy = [](const std::vector<float>& from, const Tensor& to) {
    std::memcpy(to.data(), from.data(), to.byte_size());
  };
  for (const Parameter& p : layer.expert_parameters("")) {
    const auto& from = p.name == "experts.up"        ? up
                       : p.name == "experts.down"    ? down
                       : p.name == "experts.up_bias" ? up_bias
                                                     : down_bias;
    const std::vector<std::size_t> at = places(layer, p.name);
    for (std::size_t i = 0; i < at.size(); ++i) p.value.as<float>()[i] = from[at[i]];
  }
  for (const Parameter& p : layer.dense_parameters("")) {
    if (p.name != "router.bias") copy(dense(p.name), p.value);
  }
  layer.refresh();
}

const std::vector<float>& LayerCase::dense(const std::string& name) const {
  return name == "router.weight" ? router
         : name == "shared.up"   ? shared_up
         : name == "shared.down" ? shared_down
         : name == "shared.gate" ? shared_gate
         : name == "special.mix" ? special_mix
                                 : special_value;
}

std::vector<std::size_t> LayerCase::places(const MoeLayer& layer, const std::string& name) const {
  const ExpertRange experts = layer.local_experts(), inner = layer.local_inner();
  const bool is_up = name == "experts.up" || name == "experts.up_bias";
  const std::int64_t rows = is_up ? wide() : spec.hidden;
  const std::int64_t columns = name == "experts.up" ? spec.hidden : name == "experts.down" ? spec.inner : 1;
  const auto held = [&](std::int64_t f) { return f >= inner.first && f < inner.first + inner.count; };
  std::vector<std::size_t> all;
  for (std::int64_t e = experts.first; e < experts.first + experts.count; ++e) {
    for (std::int64_t r = 0; r < rows; ++r) {
      if (is_up && !held(r % spec.inner)) continue;
      for (std::int64_t k = 0; k < columns; ++k) {
        if (name == "experts.down" && !held(k)) continue;
        all.push_back(static_cast<std::size_t>((e * rows + r) * columns + k));
      }
    }
  }
  return all;
}

LayerResult::LayerResult(const LayerCase& c) {
  const auto add = [&](const char* name, std::size_t count) {
    sections_.push_back({name, total_, count});
    total_ += count;
  };
  add("out", c.x.size());
  add("inference", c.x.size());
  add("dx", c.x.size());
  add("router", (c.shards.size() - 1) * c.router.size());
  add("up", c.up.size());
  add("down", c.down.size());
  add("up_bias", c.spec.bias ? c.up_bias.size() : 0);
  add("down_bias", c.spec.bias ? c.down_bias.size() : 0);
  const auto add_shards = [&](const char* name, const std::vector<float>& one) {
    add(name, (c.shards.size() - 1) * one.size());
  };
  add_shards("shared_up", c.shared_up);
  add_shards("shared_down", c.shared_down);
  add_shards("shared_gate", c.shared_gate);
  add_shards("special_mix", c.special_mix);
  add_shards("special_value", c.special_value);
  add("losses", 2);
  void* memory = mmap(nullptr, total_ * sizeof(float), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  values_ = static_cast<float*>(memory);
  std::memset(memory, 0xff, total_ * sizeof(float));  // NaN: what no rank writes is noticed
}

LayerResult::~LayerResult() {
  if (values_ != nullptr) munmap(values_, total_ * sizeof(float));
}
LayerResult::LayerResult(LayerResult&& other) noexcept
    : sections_(std::move(other.sections_)), total_(other.total_), values_(std::exchange(other.values_, nullptr)) {}

float* LayerResult::at(const std::string& name) const {
  for (const Section& s : sections_)
    if (s.name == name) return values_ + s.begin;
  throw Error(ErrorCode::internal, "no section " + name);
}

std::string LayerResult::difference(const LayerResult& other) const {
  for (const Section& s : sections_) {
    for (std::size_t i = 0; i < s.count; ++i) {
      const float a = values_[s.begin + i];
      const float b = other.values_[s.begin + i];
      if (std::memcmp(&a, &b, sizeof(float)) == 0) continue;
      return s.name + "[" + std::to_string(i) + "]: " + std::to_string(a) + " and " + std::to_string(b);
    }
  }
  return "";
}

Array rows_of(const LayerCase& c, const std::vector<float>& all, LayerCase::Held held) {
  const std::int64_t begin = c.shards[held.first];
  Array rows(c.spec.dtype, {c.shards[held.first + held.count] - begin, c.spec.hidden});
  const float* from = all.data() + begin * c.spec.hidden;
  for (std::int64_t i = 0; i < rows.view().elements(); ++i) {
    if (c.spec.dtype == DType::f32) rows.as<float>()[i] = from[i];
    if (c.spec.dtype == DType::bf16) rows.as<bf16>()[i] = bf16(from[i]);
  }
  return rows;
}

void to_f32(const ConstTensor& from, float* to) {
  for (std::int64_t i = 0; i < from.elements(); ++i)
    to[i] = from.dtype() == DType::f32 ? from.as<float>()[i] : static_cast<float>(from.as<bf16>()[i]);
}

void run_layer(const LayerCase& c, const Context& context, const LayerResult& shown, const Communicator& tensor) {
  const bool shows = !tensor || tensor.rank() == 0;
  const LayerResult own(c);
  const LayerResult& result = shows ? shown : own;
  const LayerCase::Held held = c.held(context.rank(), context.size());
  const std::int64_t begin = c.shards[held.first];
  std::vector<std::int64_t> shards;
  for (std::size_t s = 0; s <= held.count; ++s) shards.push_back(c.shards[held.first + s] - begin);

  MoeLayerOptions options = c.options();
  options.tensor = tensor;
  MoeLayer layer(context, options);
  c.fill(layer);
  const Array x = rows_of(c, c.x, held);
  const Array residual = rows_of(c, c.residual, held);
  const Array dout = rows_of(c, c.dout, held);
  Array out(c.spec.dtype, x.view().shape());
  const std::int64_t row = begin * c.spec.hidden;

  layer.forward(context, x, out, residual);
  to_f32(out, result.at("inference") + row);

  // A second pass over the same record shows that nothing of the first is left in it.
  MoeRecord record;
  Array dx(c.spec.dtype, x.view().shape());
  for (int pass = 0; pass < 2; ++pass) {
    layer.forward(context, x, out, residual, shards, record);
    layer.backward(context, record, dout, dx);
  }
  to_f32(out, result.at("out") + row);
  to_f32(dx, result.at("dx") + row);
  EXPECT_EQ(std::memcmp(result.at("out") + row, result.at("inference") + row, x.view().elements() * sizeof(float)), 0)
      << "training and inference differ";
  const auto per_shard = static_cast<std::size_t>(c.spec.all_experts() * c.spec.hidden);
  const std::vector<Parameter> dense = layer.dense_parameters("");
  const std::vector<ConstTensor> gradients = layer.dense_shard_gradients();
  EXPECT_EQ(gradients.size(), dense.size());
  for (std::size_t i = 0; i < dense.size(); ++i) {
    const auto rows = static_cast<std::int64_t>(held.count);
    EXPECT_EQ(gradients[i].size(0), rows);
    if (rows == 0) continue;
    std::string name = i == 0 ? "router" : dense[i].name;
    std::replace(name.begin(), name.end(), '.', '_');
    to_f32(gradients[i], result.at(name) + held.first * (gradients[i].elements() / rows));
  }
  for (const Parameter& p : layer.expert_parameters("")) {
    float* const all = shown.at(p.name.substr(p.name.find('.') + 1));
    const std::vector<std::size_t> at = c.places(layer, p.name);
    for (std::size_t i = 0; i < at.size(); ++i) all[at[i]] = p.gradient.as<float>()[i];
  }
  if (context.rank() == 0 && shows) {
    shown.at("losses")[0] = record.losses.balance;
    shown.at("losses")[1] = record.losses.z;
  }
  barrier(context);
  if (tensor) barrier(context.on(tensor));
  EXPECT_EQ(shown.at("losses")[0], record.losses.balance);
  EXPECT_EQ(shown.at("losses")[1], record.losses.z);
  EXPECT_EQ(record.losses.tokens, c.tokens());
  if (shows) return;
  const auto same = [&](const char* name, std::size_t first, std::int64_t count) {
    return std::memcmp(own.at(name) + first, shown.at(name) + first, static_cast<std::size_t>(count) * sizeof(float)) ==
           0;
  };
  const auto first = static_cast<std::size_t>(row);
  EXPECT_TRUE(same("out", first, x.view().elements()) && same("dx", first, x.view().elements()) &&
              same("router", held.first * per_shard, gradients.front().elements()))
      << "slices differ";
}

}  // namespace expar::test
