// include/expar/layer.h
#include <expar/layer.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "python/src/bind.h"
#include "python/src/experts.h"

namespace expar::python {
namespace {

using namespace nb::literals;
using Numbers = std::vector<std::int64_t>;

using ArraysByName = nb::typed<nb::dict, nb::str, Out>;

/// A layer, and the arrays of others that it computes on.
struct Layer {
  MoeLayer layer;
  std::vector<Out> lent = {};
};

std::optional<DType> payload(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return parse_dtype(*name);
}

void make_layer(Layer* self, const Context& context, std::int64_t hidden, std::int64_t inner,
                const RouterOptions& router, const std::string& activation, const ActivationSettings& numbers,
                const CapacityOptions& capacity, const std::vector<std::int64_t>& special, bool bias,
                const std::string& weights_on, std::int64_t shared_inner, int shared_ranks, bool shared_gate,
                const std::string& dtype, std::int64_t bound, const std::optional<std::string>& payload_name,
                const std::optional<std::string>& gradient_payload, bool recompute, bool inference, bool lent,
                const Communicator* tensor) {
  MoeLayerOptions options;
  options.hidden = hidden;
  options.inner = inner;
  options.router = router;
  if (special.size() != 3)
    throw Error(ErrorCode::bad_argument, "special should be three numbers: zero, copy, constant");
  options.special = {special[0], special[1], special[2]};
  options.capacity = capacity;
  const NamedActivation act = activation_of(activation, numbers);
  options.activation = act.activation;
  options.numbers = act.numbers;
  options.bias = bias;
  options.weights_on = named(kWeightsOn, "weights_on", weights_on).value;
  options.shared_inner = shared_inner;
  options.shared_ranks = shared_ranks;
  options.shared_gate = shared_gate;
  options.dtype = parse_dtype(dtype);
  options.bound = bound;
  options.payload = payload(payload_name);
  options.gradient_payload = payload(gradient_payload);
  options.recompute = recompute;
  options.inference = inference;
  options.lent = lent;
  if (tensor != nullptr) options.tensor = *tensor;
  const nb::gil_scoped_release others_run;
  new (self) Layer{MoeLayer(context, options)};
}

void lend(Layer& self, const ArraysByName& values, const ArraysByName& gradients) {
  std::vector<Out> arrays;
  std::vector<Parameter> parameters;
  const auto take = [&](nb::handle array, const std::string& name) {
    return written(arrays.emplace_back(nb::cast<Out>(array)), name.c_str());
  };
  for (const auto& [key, array] : values) {
    Parameter& p = parameters.emplace_back();
    p.name = nb::cast<std::string>(key);
    const Tensor values_of = take(array, p.name);
    (values_of.dtype() == DType::bf16 ? p.low : p.value) = values_of;
    if (gradients.contains(key)) p.gradient = take(gradients[key], p.name);
  }
  self.layer.lend(parameters);
  self.lent = std::move(arrays);
}

nb::typed<nb::list, Parameter> listed(std::vector<Parameter> parameters, nb::handle owner) {
  nb::typed<nb::list, Parameter> all;
  for (Parameter& p : parameters) {
    nb::object one = nb::cast(std::move(p));
    one.attr("_layer") = owner;  // whose memory it views
    all.append(one);
  }
  return all;
}

void forward(Layer& self, const Context& context, const nb::typed<nb::object, In>& x, const Out& out,
             const In& residual, const nb::typed<nb::object, std::optional<MoeRecord>>& record,
             const std::optional<Numbers>& shards, const In& mask, const In& tokens, const In& ids,
             const Numbers& sequences, const Numbers& counts_so_far, std::int64_t tokens_so_far, std::uint64_t seed,
             const std::string& stream) {
  const In rows = nb::cast<In>(nb::object(x));
  MoeInputs inputs{.losses = {sequences, counts_so_far, tokens_so_far}, .seed = seed, .stream = stream};
  ConstTensor taken, added;
  Tensor result;
  const Context asked = context.attempt([&] {
    inputs.mask = read(mask, "mask");
    inputs.tokens = read(tokens, "tokens");
    inputs.ids = read(ids, "ids");
    taken = read(rows, "x");
    result = written(out, "out");
    added = read(residual, "residual");
  });
  if (record.is_none()) {
    const nb::gil_scoped_release others_run;
    return self.layer.forward(asked, taken, result, added, inputs);
  }
  auto& kept = nb::cast<MoeRecord&>(record);
  record.attr("_x") = x;  // which backward reads
  const Numbers all{0, taken.shape().rank() > 0 ? taken.size(0) : 0};
  const nb::gil_scoped_release others_run;
  self.layer.forward(asked, taken, result, added, shards ? *shards : all, kept, inputs);
}

void backward(Layer& self, const Context& context, MoeRecord& record, const In& dout, const Out& dx,
              float loss_gradient) {
  ConstTensor given;
  Tensor result;
  const Context asked = context.attempt([&] {
    given = read(dout, "dout");
    result = written(dx, "dx");
  });
  const nb::gil_scoped_release others_run;
  if (loss_gradient == 1.0F) return self.layer.backward(asked, record, given, result);
  RouterLosses plain = record.losses;
  for (float& d : record.losses.dscores) d *= loss_gradient;
  record.losses.dlogsumexp *= loss_gradient;
  try {
    self.layer.backward(asked, record, given, result);
  } catch (...) {
    record.losses = std::move(plain);
    throw;
  }
  record.losses = std::move(plain);
}

void bind_records(nb::module_& m) {
  nb::class_<MoeRecord>(m, "MoeRecord", nb::dynamic_attr(), R"(
What a forward pass decided, and what it leaves for backward, which may go over it again and gives the same bytes.)")
      .def(nb::init<>())
      .def_prop_ro(
          "routing", [](MoeRecord& r) -> Routing& { return r.routing; }, nb::rv_policy::reference_internal)
      .def_prop_ro(
          "capacity", [](MoeRecord& r) -> Capacity& { return r.capacity; }, nb::rv_policy::reference_internal)
      .def_prop_ro(
          "losses", [](MoeRecord& r) -> RouterLosses& { return r.losses; }, nb::rv_policy::reference_internal)
      .def_prop_ro(
          "plan", [](MoeRecord& r) -> Plan& { return r.plan; }, nb::rv_policy::reference_internal);
  nb::class_<PhaseTimes>(m, "PhaseTimes", "Milliseconds that this rank spent.")
      .def_ro("route", &PhaseTimes::route)
      .def_ro("dispatch", &PhaseTimes::dispatch)
      .def_ro("experts", &PhaseTimes::experts)
      .def_ro("combine", &PhaseTimes::combine)
      .def_ro("backward", &PhaseTimes::backward);
}

void bind_parameters(nb::class_<Layer>& layer) {
  layer
      .def(
          "initialise",
          [](Layer& l, std::uint64_t seed, const std::string& prefix) { l.layer.initialise(seed, prefix); }, "seed"_a,
          "prefix"_a, Waits(), R"(
Draws every parameter by its global name "<prefix>.experts.5.up", so that values do not depend on P: weights normal with
deviation 1 / sqrt(inputs), biases 0. Not collective. Raises NoMemory, BadArgument (nothing was lent yet).)")
      .def(
          "write_expert",
          [](Layer& l, std::int64_t expert, const In& up, const In& down, const In& up_bias, const In& down_bias) {
            l.layer.write_expert(
                expert, {read(up, "up"), read(down, "down"), read(up_bias, "up_bias"), read(down_bias, "down_bias")});
          },
          "expert"_a, "up"_a, "down"_a, "up_bias"_a = nb::none(), "down_bias"_a = nb::none(), R"(
Writes one of this rank's experts, by its global number: up [2F, H] or [F, H], down [H, F], f32 or bf16. refresh()
afterwards. Raises BadArgument, NoMemory.)")
      .def(
          "write_shared",
          [](Layer& l, const In& up, const In& down, const In& gate) {
            l.layer.write_shared(read(up, "up"), read(down, "down"), read(gate, "gate"));
          },
          "up"_a, "down"_a, "gate"_a = nb::none(), "The same of the shared experts. Raises BadArgument, NoMemory.")
      .def(
          "refresh", [](Layer& l) { l.layer.refresh(); }, Waits(),
          "Refreshes the bf16 copies after the masters were written by hand.")
      .def("lend", &lend, "values"_a, "gradients"_a = ArraysByName(), R"(
Of a layer that was made with ``lent=True``: from here on it computes on these arrays, and keeps them alive.

values    : {name: array} of expert_parameters("") and dense_parameters(""); f32, or bf16 where the layer is bf16 and
            the parameter a matrix of an expert
gradients : {name: f32 array} that backward writes; of experts that are not there, memory of the layer's own
Not collective. Raises BadArgument, naming the parameter.)")
      .def(
          "expert_parameters",
          [](nb::handle self, const std::string& prefix) {
            return listed(nb::cast<Layer&>(self).layer.expert_parameters(prefix), self);
          },
          "prefix"_a = "", R"(
[Parameter] of this rank's experts: experts.up [L, 2F, H] or [L, F, H], experts.down [L, H, F] and, where there are
biases, experts.up_bias, experts.down_bias. Raises BadArgument (a layer for inference alone has none), NoMemory.)")
      .def(
          "dense_parameters",
          [](nb::handle self, const std::string& prefix) {
            return listed(nb::cast<Layer&>(self).layer.dense_parameters(prefix), self);
          },
          "prefix"_a = "", R"(
[Parameter] that all ranks hold alike, of these what there is: router.weight [E, H], router.bias [E], shared.up,
shared.down, shared.gate [H], special.mix, special.value. Their gradients are in dense_shard_gradients.)")
      .def(
          "dense_shard_gradients",
          [](nb::handle self) {
            nb::typed<nb::list, View> all;
            for (const ConstTensor& g : nb::cast<Layer&>(self).layer.dense_shard_gradients()) all.append(view(g, self));
            return all;
          },
          "[S, ...] f32 of each of dense_parameters: views, after backward and until the next one.")
      .def_prop_ro(
          "selection_bias",
          [](nb::handle self) { return view_or_none(nb::cast<Layer&>(self).layer.selection_bias(), self); },
          "[E] f32, writable; None where the router has none")
      .def_prop_ro(
          "token_table", [](nb::handle self) { return view_or_none(nb::cast<Layer&>(self).layer.token_table(), self); },
          "[V, K] int32, writable; None where the router has none")
      .def_prop_ro(
          "parameter_bytes", [](const Layer& l) { return l.layer.parameter_bytes(); },
          "of all that this rank holds of the parameters, what was lent left out");
}

}  // namespace

void bind_layer(nb::module_& m) {
  bind_records(m);
  nb::class_<Layer> layer(m, "MoeLayer", R"(
The MoE layer: router, plan, dispatch, experts and combine in one object, for inference and for training.)");
  layer
      .def("__init__", &make_layer, "context"_a, nb::kw_only(), "hidden"_a, "inner"_a, "router"_a,
           "activation"_a = "swiglu", "numbers"_a = ActivationSettings(), "capacity"_a = CapacityOptions(),
           "special"_a = std::vector<std::int64_t>{0, 0, 0}, "bias"_a = false, "weights_on"_a = "output",
           "shared_inner"_a = 0, "shared_ranks"_a = 0, "shared_gate"_a = false, "dtype"_a = "f32", "bound"_a = 0,
           "payload"_a = nb::none(), "gradient_payload"_a = nb::none(), "recompute"_a = false, "inference"_a = false,
           "lent"_a = false, "tensor"_a = nb::none(), R"(
hidden, inner : H, F
router        : RouterOptions
activation    : "swiglu", "clamped_swiglu", "quick_geglu", "geglu", "gelu", "silu", "relu2"
numbers       : alpha, limit, offset of its formula, where they differ
capacity      : CapacityOptions, of each expert
special       : (zero, copy, constant): how many of the router's last experts are of these kinds
bias          : experts have biases
weights_on    : "output", "inner" or "input": where the router's weight meets its expert
shared_inner  : inner size of the experts that every token visits; 0: none
shared_ranks  : ranks of their own for them (inference)
shared_gate   : their output is multiplied by sigmoid(x . shared.gate)
dtype         : of x and of the experts' weights, "f32" or "bf16"
bound         : tokens of each rank at the most, for bounded plans (inference); 0: exact plans
payload, gradient_payload : how rows travel; None: as they are
recompute     : a record keeps the rows that arrived and nothing that the experts made of them
inference     : weights exist once, packed; there are no gradients
lent          : parameters are the caller's, see lend
tensor        : Communicator of the ranks that hold the same experts in slices
Collective. Raises BadArgument (naming the option and its value), NoMemory, Mismatch, Timeout, PeerLost: the same on
every rank.)")
      .def_prop_ro(
          "local_experts",
          [](const Layer& l) {
            const ExpertRange range = l.layer.local_experts();
            return std::pair(range.first, range.count);
          },
          "(first, count) of this rank's experts")
      .def_prop_ro(
          "local_inner",
          [](const Layer& l) {
            const ExpertRange range = l.layer.local_inner();
            return std::pair(range.first, range.count);
          },
          "(first, count) of each expert's inner dimension")
      .def_prop_ro("holds_shared", [](const Layer& l) { return l.layer.holds_shared(); })
      .def("forward", &forward, "context"_a, "x"_a, "out"_a, "residual"_a = nb::none(), nb::kw_only(),
           "record"_a = nb::none(), "shards"_a = nb::none(), "mask"_a = nb::none(), "tokens"_a = nb::none(),
           "ids"_a = nb::none(), "sequences"_a = Numbers(), "counts_so_far"_a = Numbers(), "tokens_so_far"_a = 0,
           "seed"_a = 0, "stream"_a = "", R"(
out = moe(x) + shared(x) + residual.

x, out    : [T, H] of the layer's dtype
residual  : [T, H] or None
record    : MoeRecord: for training, keeps what backward needs, x included; None: for inference
shards    : [S + 1] this rank's micro-shards of the global batch; None: one
mask      : [T] int8: 0 is padding
tokens    : [T] int32 token ids, for a router with a token table
ids       : [T, K] int32: go where an earlier pass went
sequences : [Q + 1] this rank's sequences, for ``sequence_balance``
counts_so_far, tokens_so_far : RouterLosses of the micro-batches before this one
seed, stream : what the jitter is drawn by: a name that no other call has
Collective. Raises BadArgument, NoMemory, Mismatch, Timeout, PeerLost, Internal: the same on every rank.)")
      .def("backward", &backward, "context"_a, "record"_a, "dout"_a, "dx"_a, "loss_gradient"_a = 1.0F, R"(
dx = gradient of x, given dout; overwrites all gradients.

dout, dx      : [T, H] of the layer's dtype
loss_gradient : the losses of the router count so often
Collective. Raises BadArgument, NoMemory, Mismatch, Timeout, PeerLost, Internal: the same on every rank.)")
      .def(
          "inference_record", [](const Layer& l) -> const MoeRecord& { return l.layer.inference_record(); },
          nb::rv_policy::reference_internal, "Routing, capacity and plan of the last pass without a record.")
      .def(
          "take_times", [](Layer& l) { return l.layer.take_times(); }, "PhaseTimes since the last call.");
  bind_parameters(layer);
}

}  // namespace expar::python
