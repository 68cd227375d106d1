// JSON from outside: small, flat, each key once.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace expar::io {

/// Throws Error: io, beginning with `what` ("model/config.json"): not JSON (with the byte), a key twice in one object,
/// deeper than 32 levels.
nlohmann::json parse_json(std::string_view text, const std::string& what);

/// Text of a file for a message: in quotes, without control characters, cut to a readable length.
std::string in_quotes(std::string_view text);

}  // namespace expar::io
