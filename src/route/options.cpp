// What a router can be asked for, and what the routers of known models ask for.
#include <expar/router.h>

#include <cmath>
#include <string>

#include "src/route/check.h"

namespace expar {
namespace {

constexpr std::string_view kPresets[] = {"mixtral",     "qwen2_moe", "qwen3_moe", "olmoe",    "deepseek_v2",
                                         "deepseek_v3", "gpt_oss",   "llama4",    "sinkhorn", "expert_choice"};

void at_least_one(const char* what, std::int64_t value) {
  if (value < 1) refuse(std::string(what) + " is " + std::to_string(value) + ", must be at least 1");
}

void from_zero(const char* what, float value) {
  if (!(std::isfinite(value) && value >= 0.0F)) {
    refuse(std::string(what) + " is " + std::to_string(value) + ", must be a number from 0");
  }
}

void check_groups(const RouterOptions& options) {
  at_least_one("groups", options.groups);
  at_least_one("groups_used", options.groups_used);
  if (options.experts % options.groups != 0) {
    refuse("experts " + std::to_string(options.experts) + " cannot be cut into " + std::to_string(options.groups) +
           " groups of one size");
  }
  if (options.groups_used > options.groups) {
    refuse("groups_used " + std::to_string(options.groups_used) + " is above groups " + std::to_string(options.groups));
  }
  const std::int64_t within = options.experts / options.groups * options.groups_used;
  if (options.topk > within) {
    refuse("topk " + std::to_string(options.topk) + " is above the " + std::to_string(within) + " experts of " +
           std::to_string(options.groups_used) + " groups");
  }
}

void check_losses(const RouterOptions& options) {
  struct Loss {
    const char* name;
    float coefficient;
  };
  for (const Loss& loss : {Loss{"balance", options.balance}, Loss{"sequence_balance", options.sequence_balance},
                           Loss{"importance", options.importance}, Loss{"importance_cv", options.importance_cv},
                           Loss{"load", options.load}}) {
    from_zero(loss.name, loss.coefficient);
    if (!is_collective(options.choice) || loss.coefficient == 0.0F) continue;
    refuse(std::string(loss.name) + " is " + std::to_string(loss.coefficient) + ", but this choice balances by itself");
  }
  from_zero("z", options.z);
  from_zero("load_deviation", options.load_deviation);
  if (options.load > 0.0F && options.load_deviation == 0.0F) refuse("the load loss needs a load_deviation above 0");
}

}  // namespace

void validate(const RouterOptions& options) {
  at_least_one("experts", options.experts);
  at_least_one("topk", options.topk);
  if (options.topk > options.experts) {
    refuse("topk " + std::to_string(options.topk) + " is above experts " + std::to_string(options.experts));
  }
  check_groups(options);
  if (!(std::isfinite(options.scaling) && options.scaling > 0.0F)) {
    refuse("scaling is " + std::to_string(options.scaling) + ", must be a number above 0");
  }
  if (options.choice != Choice::scores) {
    if (options.groups_used < options.groups) refuse("groups are for a choice by scores");
    if (options.selection_bias) refuse("a selection bias is for a choice by scores");
  }
  if (options.choice == Choice::token_table) {
    at_least_one("vocabulary", options.vocabulary);
  } else if (options.vocabulary != 0) {
    refuse("vocabulary " + std::to_string(options.vocabulary) + " is for a choice by token table");
  }
  if (!(options.jitter >= 0.0F && options.jitter < 1.0F)) {
    refuse("jitter is " + std::to_string(options.jitter) + ", must be a number from 0 and below 1");
  }
  check_losses(options);
}

std::span<const std::string_view> router_presets() { return kPresets; }

RouterOptions router_preset(std::string_view name, std::int64_t experts, std::int64_t topk) {
  RouterOptions options;
  options.experts = experts;
  options.topk = topk;
  const auto grouped = [&](std::int64_t at, std::int64_t groups, std::int64_t groups_used) {
    if (experts != at) return;
    options.groups = groups;
    options.groups_used = groups_used;
  };
  if (name == "mixtral" || name == "qwen3_moe") return options;
  if (name == "gpt_oss") {
    options.bias = true;
    return options;
  }
  if (name == "deepseek_v3") {
    options.score = Score::sigmoid;
    options.selection_bias = true;
    options.scaling = 2.5F;
    grouped(256, 8, 4);
    return options;
  }
  options.renormalise = false;
  if (name == "qwen2_moe" || name == "olmoe") return options;
  if (name == "deepseek_v2") {
    if (experts == 160) options.scaling = 16.0F;  // the smaller ones have 1
    grouped(160, 8, 3);
    return options;
  }
  if (name == "llama4") {
    options.score = Score::sigmoid;
    options.choice = Choice::logits;
    return options;
  }
  if (name == "sinkhorn") {
    if (topk == 1) options.score = Score::sigmoid;
    options.choice = Choice::sinkhorn;
    return options;
  }
  if (name == "expert_choice") {
    options.choice = Choice::experts;
    return options;
  }
  std::string names;
  for (const std::string_view preset : kPresets) names += (names.empty() ? "" : ", ") + std::string(preset);
  refuse("router '" + std::string(name) + "' is not one of " + names);
}

}  // namespace expar
