// A slide: bytes of each way against the choices per token, and where the lines cross.
#pragma once

#include <string>

#include "planner/planner.h"

namespace expar::planner {

/// SVG of 16 to 9, self-contained, on a card of its own that is light, or dark where the viewer prefers dark.
///   subtitle : one line about the sizes
std::string picture(const Question& question, const Answer& answer, const std::string& subtitle);

/// "7.34 MB": three digits and a decimal unit.
std::string shown_bytes(double bytes);

}  // namespace expar::planner
