// What a command says to people and to programs when it ends.
#pragma once

#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include <expar/error.h>

namespace expar::cli {

/// "a, b, c"
std::string joined(const std::vector<std::string>& words);

/// Writes `text` to `path`, whole or not at all: to a new file beside it that then takes its name. What is no regular
/// file (a terminal, a pipe) is written to directly. Throws Error: io.
void write_file(const std::string& path, const std::string& text);
void write_json(const std::string& path, const nlohmann::json& object);

/// Throws Error: io (write_file to `path` would fail), before hours of work are done for it.
void check_writable(const std::string& path);

/// {"error": {"code", "rank", "peer", "operation", "message"}}
nlohmann::json to_json(const Error& error);

/// "expar: rank 2: dispatch: ..." on one line of stderr.
void print_error(const Error& error);

}  // namespace expar::cli
