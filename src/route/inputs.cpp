// What of a router's inputs is refused.
#include "src/route/inputs.h"

#include <bit>
#include <cmath>
#include <string>

#include "src/route/check.h"

namespace expar {
namespace {

void check_finite(const ConstTensor& logits, const ConstTensor& mask) {
  const std::int64_t experts = logits.size(1);
  const float* row = logits.as<float>();
  for (std::int64_t t = 0; t < logits.size(0); ++t, row += experts) {
    bool finite = true;
    for (std::int64_t e = 0; e < experts; ++e) {
      finite &= (std::bit_cast<std::uint32_t>(row[e]) & 0x7f800000u) != 0x7f800000u;
    }
    if (finite || is_padding(mask, t)) continue;
    for (std::int64_t e = 0; e < experts; ++e) {
      if (std::isfinite(row[e])) continue;
      refuse("logits[" + std::to_string(t) + "," + std::to_string(e) + "] is " +
             (std::isnan(row[e]) ? "nan"
              : row[e] > 0       ? "inf"
                                 : "-inf"));
    }
  }
}

void check_input(const char* what, const ConstTensor& tensor, bool wanted, const Shape& shape, DType dtype) {
  if (wanted && tensor.absent()) refuse(std::string("this router needs ") + what);
  if (!wanted && !tensor.absent()) refuse(std::string("this router has no use for ") + what);
  if (wanted) require(what, tensor, dtype, shape);
}

void check_token_table(const RouteInputs& inputs, const RouterOptions& options, std::int64_t tokens) {
  const bool wanted = options.choice == Choice::token_table && inputs.ids.absent();
  check_input("tokens", inputs.tokens, wanted, {tokens}, DType::int32);
  check_input("token_table", inputs.token_table, wanted, {options.vocabulary, options.topk}, DType::int32);
  if (!wanted) return;
  require_experts("token_table", inputs.token_table, options.experts, 0);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int32_t token = inputs.tokens.as<std::int32_t>()[t];
    if (is_padding(inputs.mask, t) || (token >= 0 && token < options.vocabulary)) continue;
    refuse("tokens[" + std::to_string(t) + "] = " + std::to_string(token) + " is not in the " +
           std::to_string(options.vocabulary) + " rows of token_table");
  }
}

}  // namespace

void check_inputs(const RouteInputs& inputs, const RouterOptions& options, const ConstTensor& logits) {
  const std::int64_t tokens = logits.size(0);
  if (!inputs.mask.absent()) require("mask", inputs.mask, DType::int8, {tokens});
  check_input("selection_bias", inputs.selection_bias, options.selection_bias, {options.experts}, DType::f32);
  check_token_table(inputs, options, tokens);
  if (!inputs.ids.absent()) {
    require("ids", inputs.ids, DType::int32, {tokens, slots_of(options)});
    require_experts("ids", inputs.ids, options.experts);
  }
  if (options.nan == NanPolicy::error) check_finite(logits, inputs.mask);
}

}  // namespace expar
