// The common flags, and the sentences for flags that are wrong.
#include "cli/options.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <iostream>
#include <numeric>

#include <expar/mesh.h>

#include "cli/output.h"

namespace expar::cli {
namespace {

/// More ranks than this on one host are a slip of the finger.
constexpr std::int64_t kMaxRanks = 1024;
constexpr std::int64_t kMaxThreads = 4096;
/// About thirty years: still a number of nanoseconds, and nobody waits longer.
constexpr double kMaxTimeout = 1e9;

/// Letters to insert, delete or replace.
std::size_t distance(const std::string& a, const std::string& b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0]++;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
    }
  }
  return row.back();
}

template <class T>
bool read(const std::string& word, T& value) {
  const char* end = word.data() + word.size();
  const auto parsed = std::from_chars(word.data(), end, value);
  return parsed.ec == std::errc{} && parsed.ptr == end;
}

std::string short_number(double value) {
  char text[32];
  const auto end = std::to_chars(text, text + sizeof text, value).ptr;
  return {text, end};
}

CLI::Validator file_name() {
  return {[](std::string& word) { return word.empty() ? "'' is not the name of a file" : std::string(); }, ""};
}

void add_common(CLI::App& app, Common& common) {
  const char* group = "Every verb";
  app.add_option("-n,--ranks", common.ranks, "ranks (default 1)")->check(whole_number(1, kMaxRanks))->group(group);
  app.add_option("--transport", common.transport,
                 "how ranks reach each other: " + joined(available_transports()) + " (default shm)")
      ->check(one_of(known_transports()))
      ->group(group);
  app.add_option("--threads", common.threads, "threads of each rank (default: cores / ranks)")
      ->check(whole_number(1, kMaxThreads))
      ->group(group);
  app.add_option("--timeout", common.timeout, "seconds that a call may wait (default 120)")
      ->check(number_above(0))
      ->group(group);
  app.add_option("--backend", common.backend, "cpu or reference (default cpu)")
      ->check(one_of({"cpu", "reference"}))
      ->group(group);
  app.add_option("--json", common.json, "write the result, or the error, to this file")
      ->check(file_name())
      ->group(group);
  app.add_option("--trace", common.trace,
                 "write what each rank did and waited for to this file, for ui.perfetto.dev or chrome://tracing")
      ->check(file_name())
      ->group(group);
}

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorCode::bad_argument, message); }

std::vector<std::string> flags_of(const CLI::App& app) {
  std::vector<std::string> flags;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
  }
  return flags;
}

/// CLI11's sentences name the flag; these say the same in ours.
[[noreturn]] void explain(const CLI::App& app, const CLI::ParseError& error) {
  const std::string what = error.what();
  const std::string name = what.substr(0, what.find(':'));
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr) {
    std::vector<std::string> extra = app.remaining();
    const auto flag =
        std::find_if(extra.begin(), extra.end(), [](const std::string& word) { return word.starts_with('-'); });
    if (flag == extra.end()) refuse("unexpected argument '" + extra.at(0) + "'");
    const std::string word = flag->substr(0, flag->find('='));
    refuse("unknown flag " + word + suggestion(word, flags_of(app)));
  }
  if (dynamic_cast<const CLI::ArgumentMismatch*>(&error) != nullptr) {
    refuse(what.ends_with("missing") ? name + " needs a value" : name + " was given more than once");
  }
  if (dynamic_cast<const CLI::ValidationError*>(&error) != nullptr) {
    const std::size_t value = what.find(": ");
    refuse(value == std::string::npos ? what : name + " = " + what.substr(value + 2));
  }
  refuse(what);
}

/// `asked`: see Verb::ranks.
void agree_on_ranks(std::int64_t asked, int& ranks) {
  if (asked == 0 || asked == ranks) return;
  if (ranks != 0) {
    refuse("--ranks = '" + std::to_string(ranks) + "' contradicts the mesh, which has " + std::to_string(asked) +
           " places");
  }
  if (asked > kMaxRanks) {
    refuse("the mesh has " + std::to_string(asked) + " places, above the " + std::to_string(kMaxRanks) +
           " ranks that expar starts");
  }
  ranks = static_cast<int>(asked);
}

}  // namespace

RunOptions Common::run_options() const {
  const std::chrono::duration<double> seconds(std::min(timeout, kMaxTimeout));
  return {.timeout = std::chrono::ceil<std::chrono::nanoseconds>(seconds), .transport = transport};
}

ContextOptions Common::context_options() const { return {.threads = threads, .backend = backend}; }

CLI::Validator whole_number(std::int64_t least, std::int64_t most) {
  return {[=](std::string& word) {
            std::int64_t value = 0;
            if (read(word, value) && value >= least && value <= most) return std::string();
            std::string range = " from " + std::to_string(least);
            if (most != INT64_MAX) range += " to " + std::to_string(most);
            return "'" + word + "' is not a whole number" + range;
          },
          ""};
}

CLI::Validator number_above(double bound, bool inclusive) {
  return {[=](std::string& word) {
            double value = 0;
            if (read(word, value) && std::isfinite(value) && (inclusive ? value >= bound : value > bound)) {
              return std::string();
            }
            return "'" + word + "' is not a number " + (inclusive ? "from " : "above ") + short_number(bound);
          },
          ""};
}

CLI::Validator one_of(std::vector<std::string> names) {
  return {[names = std::move(names)](std::string& word) {
            if (std::find(names.begin(), names.end(), word) != names.end()) return std::string();
            return "'" + word + "' is not one of " + joined(names) + suggestion(word, names);
          },
          ""};
}

std::string suggestion(const std::string& word, const std::vector<std::string>& names) {
  const std::string* nearest = nullptr;
  std::size_t least = std::max<std::size_t>(1, word.size() / 3) + 1;
  for (const std::string& name : names) {
    const std::size_t d = distance(word, name);
    if (d < least) nearest = &name;
    least = std::min(least, d);
  }
  return nearest == nullptr ? std::string() : "; did you mean " + *nearest + "?";
}

std::int64_t places_of_mesh(const std::string& text) {
  if (text.empty()) return 0;
  std::int64_t places = 1;
  for (const MeshDim& dim : parse_mesh(text)) places = std::min<std::int64_t>(places * dim.size, INT32_MAX);
  return places;
}

std::string find_json(const std::vector<std::string>& words) {
  for (std::size_t i = 0; i < words.size() && words[i] != "--"; ++i) {
    if (words[i].starts_with("--json=")) return words[i].substr(7);
    if (words[i] == "--json" && i + 1 < words.size()) return words[i + 1];
  }
  return {};
}

Parsed parse(const Verb& verb, const std::vector<std::string>& words) {
  Parsed parsed;
  CLI::App app(verb.help, "expar " + verb.name);
  verb.add_options(app);
  add_common(app, parsed.common);

  auto end = words.end();
  if (verb.take_command) {
    app.footer("expar " + verb.name + " [OPTIONS] -- PROGRAM [ARGUMENTS]");
    end = std::find(words.begin(), words.end(), "--");
  }
  std::vector<std::string> own(words.begin(), end);
  std::reverse(own.begin(), own.end());  // as CLI11 wants them
  try {
    app.parse(own);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.help();
    parsed.help_shown = true;
    return parsed;
  } catch (const CLI::ParseError& error) {
    explain(app, error);
  }
  if (verb.take_command) {
    verb.take_command(end == words.end() ? std::vector<std::string>() : std::vector<std::string>(end + 1, words.end()));
  }
  agree_on_ranks(verb.ranks(), parsed.common.ranks);
  verb.check(parsed.common);
  return parsed;
}

}  // namespace expar::cli
