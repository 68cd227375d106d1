// The layer's parameters by name: listed for an optimizer, and lent by the caller.
#include <algorithm>
#include <string>
#include <utility>

#include "src/layer/parameters.h"
#include "src/util/check.h"

namespace expar {

std::string join(std::string_view prefix, const std::string& name) {
  return prefix.empty() ? name : std::string(prefix) + "." + name;
}

Shape LayerParameters::Entry::shape() const {
  const Shape& all = trained->shape;
  return kind == Kind::one_group ? Shape{all[1], all[2]} : all;
}

std::array<LayerParameters::Entry, LayerParameters::kEntries> LayerParameters::entries() {
  return {{{"experts.up", &up_, &up_.low},
           {"experts.down", &down_, &down_.low},
           {"experts.up_bias", &up_bias_, nullptr, Kind::bias},
           {"experts.down_bias", has_down_bias_ ? &down_bias_ : nullptr, nullptr, Kind::bias},
           {"router.weight", &router_},
           {"router.bias", &router_bias_, nullptr, Kind::bias},
           {"shared.up", &shared_up_, &shared_up_.low, Kind::one_group},
           {"shared.down", &shared_down_, &shared_down_.low, Kind::one_group},
           {"shared.gate", &shared_gate_},
           {"special.mix", &special_mix_},
           {"special.value", &special_value_}}};
}

std::vector<Parameter> LayerParameters::experts(std::string_view prefix) {
  if (inference_) refuse("the layer is for inference alone and holds packed weights: write them by write_expert()");
  watched_ = true;
  const auto all = entries();
  return list(prefix, std::span(all).first(kExpertEntries));
}

std::vector<Parameter> LayerParameters::dense(std::string_view prefix) {
  watched_ = true;
  const auto all = entries();
  return list(prefix, std::span(all).subspan(kExpertEntries));
}

/// Those that there are, with room for their gradients.
std::vector<Parameter> LayerParameters::list(std::string_view prefix, std::span<const Entry> entries) {
  std::vector<Parameter> all;
  for (const Entry& entry : entries) {
    if (!entry) continue;
    Trained& trained = *entry.trained;
    if (inference_ && !trained.value) continue;
    if (!inference_ && !lends_ && !trained.gradient) trained.gradient = Held(Array(DType::f32, trained.shape));
    Parameter p{join(prefix, entry.name), trained.value, trained.gradient, {}, entry.kind != Kind::bias};
    if (entry.low != nullptr) p.low = *entry.low;
    for (Tensor* tensor : {&p.value, &p.gradient, &p.low}) {
      if (!tensor->absent()) *tensor = Tensor(tensor->data(), tensor->dtype(), entry.shape());
    }
    all.push_back(std::move(p));
  }
  return all;
}

void LayerParameters::check_lent() const {
  if (!lends_ || lent_) return;
  refuse("the layer computes on parameters of its caller, and none were lent: call lend() first");
}

/// Throws Error: bad_argument (what is read is missing, or something has another shape).
void LayerParameters::check_lent(const Entry& entry, const Parameter& lent) const {
  const bool reads_low = entry.low != nullptr && dtype_ == DType::bf16;
  const auto check = [&](const char* what, const Tensor& tensor, DType dtype, bool optional) {
    if (optional && tensor.absent()) return;
    const std::string whole = std::string(entry.name) + what;
    require(whole, tensor, dtype, entry.shape());
    if (tensor.data() == nullptr && tensor.elements() > 0) refuse(whole + " is lent without memory");
  };
  check(": its value", lent.value, DType::f32, reads_low);
  if (reads_low) check(": its low", lent.low, DType::bf16, false);
  check(": its gradient", lent.gradient, DType::f32, true);
}

void LayerParameters::lend(const Entry& entry, const Parameter& lent) {
  const auto take = [&](Held& held, const Tensor& tensor) {
    held.lend(tensor.absent() ? tensor : Tensor(tensor.data(), tensor.dtype(), entry.trained->shape));
  };
  take(entry.trained->value, lent.value);
  take(entry.trained->gradient, lent.gradient);
  if (entry.low != nullptr && dtype_ == DType::bf16) take(*entry.low, lent.low);
}

void LayerParameters::lend(std::span<const Parameter> parameters) {
  if (!lends_) refuse("the layer holds its parameters itself (MoeLayerOptions::lent)");
  const auto all = entries();
  for (const Parameter& p : parameters) {
    const bool known = std::ranges::any_of(all, [&](const Entry& entry) { return entry && p.name == entry.name; });
    if (!known) refuse("the layer has no parameter " + p.name + " to be lent");
  }
  std::array<const Parameter*, kEntries> found{};
  for (std::size_t i = 0; i < kEntries; ++i) {
    if (!all[i]) continue;
    const auto lent = std::ranges::find(parameters, std::string_view(all[i].name), &Parameter::name);
    if (lent == parameters.end()) refuse(std::string(all[i].name) + " is not among the parameters that are lent");
    check_lent(all[i], *lent);
    found[i] = &*lent;
  }
  // Nothing is taken before all has been checked.
  for (std::size_t i = 0; i < kEntries; ++i) {
    if (found[i] != nullptr) lend(all[i], *found[i]);
  }
  lent_ = true;
}

}  // namespace expar
