// What the files of this folder share: one function for each public header, and small conversions.
#pragma once

#include <nanobind/nanobind.h>

#include <chrono>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include <expar/context.h>
#include <expar/error.h>
#include <expar/tensor.h>

namespace expar::python {

namespace nb = nanobind;

/// For every function that may wait for other ranks: Python's other threads run meanwhile.
using Waits = nb::call_guard<nb::gil_scoped_release>;

inline std::chrono::nanoseconds seconds(double value) {
  if (!(value >= 0 && value < 1e9)) {
    throw Error(ErrorCode::bad_argument, "timeout is " + std::to_string(value) + ", should be seconds from 0 on");
  }
  return std::chrono::nanoseconds(static_cast<std::int64_t>(value * 1e9));
}

inline double in_seconds(std::chrono::nanoseconds value) { return std::chrono::duration<double>(value).count(); }

/// Reads what this rank hands in to a collective call, as a tuple, and makes the call with it: what cannot be read is
/// an error of every rank.
template <class Read, class Call>
auto collective(const Context& context, Read read, Call call) {
  decltype(read()) arguments;
  const Context asked = context.attempt([&] { arguments = read(); });
  return std::apply([&](const auto&... each) { return call(asked, each...); }, arguments);
}

/// This rank's micro-shards of T tokens: those that were given, else one. Throws Error: bad_argument (not ascending
/// from 0 to T).
std::vector<std::int64_t> shards_of(const std::optional<std::vector<std::int64_t>>& given, std::int64_t tokens);

/// The name of a value, looked up in the table of all of them. Throws Error: bad_argument, with the list.
template <class Table>
auto parse_name(const Table& table, const char* what, std::string_view wanted) {
  std::string known;
  for (const auto& value : table) {
    if (name(value) == wanted) return value;
    known += (known.empty() ? "" : ", ") + std::string(name(value));
  }
  throw Error(ErrorCode::bad_argument,
              std::string(what) + " is '" + std::string(wanted) + "', should be one of " + known);
}

void bind_ascend(nb::module_& m);
void bind_capacity(nb::module_& m);
void bind_carried(nb::module_& m);
void bind_collectives(nb::module_& m);
void bind_communicator(nb::module_& m);
void bind_context(nb::module_& m);
void bind_dispatch(nb::module_& m);
void bind_experts(nb::module_& m);
void bind_hidden_moe(nb::module_& m);
void bind_kernels(nb::module_& m);
void bind_launch(nb::module_& m);
void bind_layer(nb::module_& m);
void bind_mesh(nb::module_& m);
void bind_norm(nb::module_& m);
void bind_optimizer(nb::module_& m);
void bind_partition(nb::module_& m);
void bind_permute(nb::module_& m);
void bind_plan(nb::module_& m);
void bind_random(nb::module_& m);
void bind_registry(nb::module_& m);
void bind_router(nb::module_& m);
void bind_special(nb::module_& m);
void bind_tensor(nb::module_& m);
void bind_trace(nb::module_& m);

}  // namespace expar::python
