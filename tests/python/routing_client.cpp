// What megatron_test.py has expar do: routes the logits of a file on one rank and writes what came of it.
//   routing_client IN OUT
// IN: logits [T, E]; where they are given selection_bias [E], mask [T], ids [T, K], sequences [Q + 1],
//   counts_so_far [E], dweights [T, E] by expert; as metadata fields of RouterOptions, LossInputs and CapacityOptions.
// OUT: what is named in run().
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>
#include <vector>

#include <expar/capacity.h>
#include <expar/registry.h>
#include <expar/router.h>

#include "io/safetensors.h"

namespace expar {
namespace {

/// Tensors and numbers of IN, each of which may be left out.
class Request {
 public:
  explicit Request(const std::string& path) : file_(path) {}

  ConstTensor tensor(const char* name) const {
    const io::StoredTensor* found = file_.find(name);
    return found == nullptr ? ConstTensor{} : found->view();
  }
  std::span<const std::int64_t> list(const char* name) const {
    const ConstTensor found = tensor(name);
    if (found.absent()) return {};
    return {found.as<std::int64_t>(), static_cast<std::size_t>(found.elements())};
  }
  std::string word(const char* name) const {
    const auto found = file_.metadata().find(name);
    return found == file_.metadata().end() ? "" : found->second;
  }
  double number(const char* name, double otherwise) const {
    return word(name).empty() ? otherwise : std::strtod(word(name).c_str(), nullptr);
  }
  float coefficient(const char* name, float otherwise = 0.0F) const {
    return static_cast<float>(number(name, double{otherwise}));
  }
  std::int64_t whole(const char* name, std::int64_t otherwise) const {
    return static_cast<std::int64_t>(number(name, static_cast<double>(otherwise)));
  }

 private:
  io::SafetensorsFile file_;
};

RouterOptions router_options(const Request& request) {
  RouterOptions options{.experts = request.tensor("logits").size(1), .topk = request.whole("topk", 0)};
  if (request.word("score") == "sigmoid") options.score = Score::sigmoid;
  if (request.word("choice") == "sinkhorn") options.choice = Choice::sinkhorn;
  options.renormalise = request.whole("renormalise", 1) != 0;
  options.scaling = request.coefficient("scaling", 1.0F);
  options.groups = request.whole("groups", 1);
  options.groups_used = request.whole("groups_used", options.groups);
  options.selection_bias = !request.tensor("selection_bias").absent();
  options.balance = request.coefficient("balance");
  options.sequence_balance = request.coefficient("sequence_balance");
  options.z = request.coefficient("z");
  return options;
}

CapacityOptions capacity_options(const Request& request) {
  if (request.word("policy").empty()) return {};
  return {.policy = parse_capacity_policy(request.word("policy")), .factor = request.number("factor", 0)};
}

void run(const Context& context, const Request& request, const std::string& out) {
  const RouterOptions options = router_options(request);
  const ConstTensor logits = request.tensor("logits"), bias = request.tensor("selection_bias");
  Routing routing;
  route(context, options, logits, routing,
        {.selection_bias = bias, .mask = request.tensor("mask"), .ids = request.tensor("ids")});
  std::vector<std::int64_t> counts(static_cast<std::size_t>(options.experts));
  const auto* ids = routing.ids.as<std::int32_t>();
  for (std::int64_t i = 0; i < routing.ids.elements(); ++i) {
    if (ids[i] >= 0) ++counts[static_cast<std::size_t>(ids[i])];
  }

  const std::int64_t tokens = logits.size(0), topk = options.topk;
  const std::vector<std::int64_t> shards{0, tokens};
  const RouterLosses losses =
      router_losses(context, options, routing, counts, shards,
                    {request.list("sequences"), request.list("counts_so_far"), request.whole("tokens_so_far", 0)});
  const float of_losses[] = {losses.balance, losses.sequence_balance, losses.z};
  const Array dweights(DType::f32, routing.weights.shape()), dlogits(DType::f32, logits.shape());
  if (const ConstTensor by_expert = request.tensor("dweights"); !by_expert.absent()) {
    for (std::int64_t i = 0; i < tokens * topk; ++i) {
      if (ids[i] >= 0) dweights.as<float>()[i] = by_expert.as<float>()[i / topk * options.experts + ids[i]];
    }
  }
  route_backward(context, options, routing, losses, dweights, dlogits);

  Capacity capacity;
  bound_rows(context, capacity_options(request), options.experts, routing.ids, routing, capacity);
  const Array stepped(DType::f32, {options.experts});
  if (!bias.absent()) std::copy_n(bias.as<float>(), options.experts, stepped.as<float>());
  update_selection_bias(stepped, counts, request.coefficient("rate"));

  const io::NamedTensor results[] = {{"ids", routing.ids},
                                     {"weights", routing.weights},
                                     {"choice_scores", routing.choice_scores},
                                     {"losses", ConstTensor(of_losses, {3})},
                                     {"dlogits", dlogits},
                                     {"kept_ids", capacity.ids},
                                     {"kept_weights", capacity.weights},
                                     {"rows", ConstTensor(&capacity.rows, {1})},
                                     {"stepped_bias", stepped}};
  io::write_safetensors(out, results);
}

}  // namespace
}  // namespace expar

int main(int count, char** arguments) {
  if (count != 3) return 2;
  try {
    const expar::Request request(arguments[1]);
    expar::run_threads(1, [&](const expar::Communicator& communicator) {
      expar::run(expar::Context(communicator), request, arguments[2]);
    });
  } catch (const expar::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return expar::exit_code(error.code());
  }
  return 0;
}
