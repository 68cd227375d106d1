// include/expar/router.h
#include <expar/router.h>

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "python/src/bind.h"
#include "python/src/names.h"
#include "python/src/tensor.h"

namespace expar::python {
namespace {

using namespace nb::literals;
using Numbers = std::vector<std::int64_t>;

constexpr Named<Score> kScores[] = {
    {"softmax", Score::softmax}, {"sigmoid", Score::sigmoid}, {"sqrt_softplus", Score::sqrt_softplus}};
constexpr Named<Choice> kChoices[] = {{"scores", Choice::scores},           {"logits", Choice::logits},
                                      {"token_table", Choice::token_table}, {"round_robin", Choice::round_robin},
                                      {"sinkhorn", Choice::sinkhorn},       {"experts", Choice::experts}};
constexpr Named<NanPolicy> kNanPolicies[] = {{"error", NanPolicy::error}, {"propagate", NanPolicy::propagate}};
constexpr Named<BiasRule> kBiasRules[] = {{"sign", BiasRule::sign}, {"centred", BiasRule::centred}};

/// An enumeration among the options, by name.
template <auto member, class Table>
void define_name(nb::class_<RouterOptions>& of, const char* what, const Table& table) {
  of.def_prop_rw(
      what, [&table](const RouterOptions& o) { return name_of(table, o.*member); },
      [&table, what](RouterOptions& o, const std::string& name) { o.*member = named(table, what, name).value; });
}

void bind_options(nb::module_& m) {
  nb::class_<RouterOptions> options(m, "RouterOptions", R"(
How K of E experts are chosen per token, and which losses keep their loads even. ``RouterOptions(64, 8, balance=0.01)``
sets attributes by keyword; see router_preset for those of known models.

experts, topk    : E, K
score            : "softmax", "sigmoid" or "sqrt_softplus" of the logits
choice           : "scores", "logits", "token_table", "round_robin", "sinkhorn" or "experts"
renormalise      : divide the K chosen scores by their sum
scaling          : the weights are multiplied by it at last
groups, groups_used : a token chooses among the experts of its best groups
vocabulary       : rows of the token table
selection_bias   : an [E] bias is added to the scores for the choice alone
bias             : an [E] bias is added to the logits and trained
jitter           : in training the router reads x * U(1 - jitter, 1 + jitter)
double_scores    : choose and weigh in double
balance, z, sequence_balance, importance, importance_cv, load : coefficients of the losses
load_deviation   : of the noise that ``load`` supposes on a score
nan              : "error" or "propagate", of logits that are no finite numbers)");
  options
      .def(
          "__init__",
          [](nb::pointer_and_handle<RouterOptions> self, std::int64_t experts, std::int64_t topk,
             const nb::kwargs& settings) {
            new (self.p) RouterOptions{.experts = experts, .topk = topk};
            nb::inst_mark_ready(self.h);
            for (const auto& [name, value] : settings) nb::setattr(self.h, name, value);
          },
          "experts"_a, "topk"_a, "settings"_a,
          nb::sig("def __init__(self, experts: int, topk: int, **settings: bool | int | float | str) -> None"))
      .def_rw("experts", &RouterOptions::experts)
      .def_rw("topk", &RouterOptions::topk)
      .def_rw("renormalise", &RouterOptions::renormalise)
      .def_rw("scaling", &RouterOptions::scaling)
      .def_rw("groups", &RouterOptions::groups)
      .def_rw("groups_used", &RouterOptions::groups_used)
      .def_rw("vocabulary", &RouterOptions::vocabulary)
      .def_rw("selection_bias", &RouterOptions::selection_bias)
      .def_rw("bias", &RouterOptions::bias)
      .def_rw("jitter", &RouterOptions::jitter)
      .def_rw("double_scores", &RouterOptions::double_scores)
      .def_rw("balance", &RouterOptions::balance)
      .def_rw("z", &RouterOptions::z)
      .def_rw("sequence_balance", &RouterOptions::sequence_balance)
      .def_rw("importance", &RouterOptions::importance)
      .def_rw("importance_cv", &RouterOptions::importance_cv)
      .def_rw("load", &RouterOptions::load)
      .def_rw("load_deviation", &RouterOptions::load_deviation)
      .def("__copy__", [](const RouterOptions& o) { return o; })
      .def(
          "__deepcopy__", [](const RouterOptions& o, const nb::object&) { return o; }, "memo"_a)
      .def(
          "validate", [](const RouterOptions& o) { validate(o); },
          "Raises BadArgument (a number out of its range, options that contradict each other), naming the value.");
  define_name<&RouterOptions::score>(options, "score", kScores);
  define_name<&RouterOptions::choice>(options, "choice", kChoices);
  define_name<&RouterOptions::nan>(options, "nan", kNanPolicies);

  m.def("router_preset", &router_preset, "name"_a, "experts"_a, "topk"_a, R"(
The RouterOptions of a family of models, one of router_presets(). Raises BadArgument (another name, with the list).)");
  m.def(
      "router_presets",
      [] {
        nb::typed<nb::list, nb::str> all;
        for (const std::string_view name : router_presets()) all.append(nb::str(name.data(), name.size()));
        return all;
      },
      "The names of router_preset.");
  m.def("slots_of", &slots_of, "options"_a, "Slots per token: K, or E where experts choose.");
  m.def(
      "is_collective", [](const std::string& choice) { return is_collective(named(kChoices, "choice", choice).value); },
      "choice"_a, "Whether a choice looks at the tokens of all ranks.");
  m.def("balance_from_hugging_face", &balance_from_hugging_face, "coefficient"_a, "topk"_a,
        "The coefficient for ``balance`` that weighs as much as router_aux_loss_coef of Hugging Face.");
}

template <auto member>
std::optional<View> tensor(nb::handle self) {
  return view_or_none(nb::cast<const Routing&>(self).*member, self);
}

void bind_results(nb::module_& m) {
  nb::class_<Routing>(m, "Routing", R"(
What the router decided for T tokens. Reuse one object: it keeps its memory, of which its arrays are views. Rows of
padding have ids -1 and zeros elsewhere.)")
      .def(nb::init<>())
      .def_prop_ro("ids", &tensor<&Routing::ids>, "[T, K] int32, best first; -1: no expert")
      .def_prop_ro("weights", &tensor<&Routing::weights>, "[T, K] f32")
      .def_prop_ro("scores", &tensor<&Routing::scores>, "[T, E] f32")
      .def_prop_ro("choice_scores", &tensor<&Routing::choice_scores>, "[T, E] f32, what the choice compared")
      .def_prop_ro("loss_scores", &tensor<&Routing::loss_scores>, "[T, E] f32, scores over their sum")
      .def_prop_ro("top", &tensor<&Routing::top>, "[T, K] f32, the chosen scores before renormalisation")
      .def_prop_ro("probabilities", &tensor<&Routing::probabilities>, "[T, E] f32, softmax of the logits")
      .def_prop_ro("logsumexp", &tensor<&Routing::logsumexp>, "[T] f32, of the logits")
      .def_ro("valid", &Routing::valid, "tokens that are no padding");

  nb::class_<RouterLosses>(m, "RouterLosses", R"(
The losses of the global batch, coefficients included, the same on every rank; what they are over is in router.h.)")
      .def_ro("balance", &RouterLosses::balance)
      .def_ro("sequence_balance", &RouterLosses::sequence_balance)
      .def_ro("importance", &RouterLosses::importance)
      .def_ro("importance_cv", &RouterLosses::importance_cv)
      .def_ro("load", &RouterLosses::load)
      .def_ro("z", &RouterLosses::z)
      .def_prop_ro("total",
                   [](const RouterLosses& l) {
                     return l.balance + l.sequence_balance + l.importance + l.importance_cv + l.load + l.z;
                   })
      .def_ro("tokens", &RouterLosses::tokens, "T of the global batch")
      .def_ro("load_fraction", &RouterLosses::load_fraction, "[E] fraction of the slots, with what was given so far")
      .def_ro("counts_so_far", &RouterLosses::counts_so_far, "[E] slots, with what was given so far")
      .def_ro("tokens_so_far", &RouterLosses::tokens_so_far);
}

}  // namespace

void bind_router(nb::module_& m) {
  bind_options(m);
  bind_results(m);
  m.def(
      "route",
      [](const Context& c, const RouterOptions& options, const In& logits, Routing& routing, const In& selection_bias,
         const In& mask, const In& tokens, const In& token_table, const In& ids, std::int64_t first_token) {
        const auto arguments = [&] {
          return std::tuple(read(logits, "logits"),
                            RouteInputs{.selection_bias = read(selection_bias, "selection_bias"),
                                        .mask = read(mask, "mask"),
                                        .tokens = read(tokens, "tokens"),
                                        .token_table = read(token_table, "token_table"),
                                        .ids = read(ids, "ids"),
                                        .first_token = first_token});
        };
        const auto call = [&](const Context& asked, ConstTensor scored, const RouteInputs& inputs) {
          route(asked, options, scored, routing, inputs);
        };
        if (is_collective(options.choice) && ids.absent()) return collective(c, arguments, call);
        const auto [scored, inputs] = arguments();
        call(c, scored, inputs);
      },
      "context"_a, "options"_a, "logits"_a, "routing"_a, nb::kw_only(), "selection_bias"_a = nb::none(),
      "mask"_a = nb::none(), "tokens"_a = nb::none(), "token_table"_a = nb::none(), "ids"_a = nb::none(),
      "first_token"_a = 0, Waits(), R"(
Scores, then K experts per token and their weights, into ``routing``.

logits         : [T, E] f32, this rank's tokens
selection_bias : [E] f32, where the options have one
mask           : [T] int8: 0 is padding
tokens         : [T] int32 token ids, and token_table [V, K] int32, for the choice "token_table"
ids            : [T, K] int32: go where a Routing went before
Collective where the choice is "sinkhorn" or "experts". Raises BadArgument ("logits[3,5] is nan"), and where it is
collective NoMemory, Mismatch, Timeout, PeerLost, Internal.)");
  m.def(
      "update_selection_bias",
      [](const Out& bias, const Numbers& counts, float rate, const std::string& rule) {
        update_selection_bias(written(bias, "bias"), counts, rate, named(kBiasRules, "rule", rule).value);
      },
      "bias"_a, "counts"_a, "rate"_a, "rule"_a = "sign", R"(
One step of the selection bias [E] f32, in place, towards even loads.

counts : [E] slots per expert over the global batch of an optimizer step (RouterLosses.counts_so_far)
rule   : "sign" (DeepSeek-V3) or "centred" (torchtitan)
Not collective: equal counts give equal biases. Raises BadArgument.)");
  m.def(
      "router_losses",
      [](const Context& c, const RouterOptions& options, const Routing& routing, const Numbers& counts,
         const std::optional<Numbers>& shards, const Numbers& sequences, const Numbers& counts_so_far,
         std::int64_t tokens_so_far) {
        const std::int64_t tokens = routing.ids.absent() ? 0 : routing.ids.size(0);
        return router_losses(c, options, routing, counts, shards ? *shards : Numbers{0, tokens},
                             {sequences, counts_so_far, tokens_so_far});
      },
      "context"_a, "options"_a, "routing"_a, "counts"_a, "shards"_a = nb::none(), nb::kw_only(),
      "sequences"_a = Numbers(), "counts_so_far"_a = Numbers(), "tokens_so_far"_a = 0, Waits(), R"(
The RouterLosses of the global batch.

counts    : [E] slots per expert over the global batch: Plan.expert_totals, or Capacity.chosen
shards    : [S + 1] this rank's micro-shards, from 0 to T; None: one
sequences : [Q + 1] this rank's sequences, from 0 to T; empty: each shard is one
counts_so_far, tokens_so_far : RouterLosses of the micro-batches before this one
Collective. Raises BadArgument, NoMemory, Mismatch, Timeout, PeerLost: the same on every rank.)");
  m.def(
      "route_backward",
      [](const Context& c, const RouterOptions& options, const Routing& routing, const RouterLosses& losses,
         const In& dweights, const Out& dlogits) {
        route_backward(c, options, routing, losses, read(dweights, "dweights"), written(dlogits, "dlogits"));
      },
      "context"_a, "options"_a, "routing"_a, "losses"_a, "dweights"_a, "dlogits"_a, Waits(), R"(
dlogits [T, E] f32 = gradient of (weights . dweights) + losses.

dweights : [T, K] f32, the gradient of the weights; 0 where a slot was dropped
Not collective. Raises BadArgument (shapes or dtypes, also of routing and losses).)");
}

}  // namespace expar::python
