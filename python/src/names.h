// Enumerations are names in Python: a table of them, looked up in both directions.
#pragma once

#include <string>
#include <string_view>

#include <expar/error.h>

namespace expar::python {

template <class T>
struct Named {
  std::string_view name;
  T value;
};

/// The entry of that name. Throws Error: bad_argument, with the list.
template <class Table>
const auto& named(const Table& table, const char* what, std::string_view wanted) {
  std::string known;
  for (const auto& entry : table) {
    if (entry.name == wanted) return entry;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  throw Error(ErrorCode::bad_argument,
              std::string(what) + " is '" + std::string(wanted) + "', should be one of " + known);
}

template <class Table, class T>
std::string name_of(const Table& table, T value) {
  for (const auto& entry : table) {
    if (entry.value == value) return std::string(entry.name);
  }
  return {};
}

}  // namespace expar::python
