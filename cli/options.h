// From the words of a command line to a verb's flags, or to one sentence that says what is wrong with them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cli/verb.h"

namespace expar::cli {

struct Parsed {
  Common common;
  bool help_shown = false;
};

/// Adds the common flags to those of `verb`, reads `words` (what follows the verb) and calls the verb's check.
/// Throws Error: bad_argument.
Parsed parse(const Verb& verb, const std::vector<std::string>& words);

/// The value of --json, found without understanding anything else: an error in other flags must go there too.
std::string find_json(const std::vector<std::string>& words);

/// The places of the mesh that `text` ("ep=2,tp=2") describes; 0 where there is none. Throws Error: bad_argument.
std::int64_t places_of_mesh(const std::string& text);

/// ", did you mean X?" for the nearest of `names`, or nothing where none is near.
std::string suggestion(const std::string& word, const std::vector<std::string>& names);

}  // namespace expar::cli
