// The phases of a layer under the names that people, dashboards and JSON see.
#pragma once

#include <span>

#include <expar/layer.h>

namespace expar::cli {

struct NamedPhase {
  const char* name;
  double PhaseTimes::*ms;
};

inline constexpr NamedPhase kPhases[] = {{"route", &PhaseTimes::route},
                                         {"dispatch", &PhaseTimes::dispatch},
                                         {"experts", &PhaseTimes::experts},
                                         {"combine", &PhaseTimes::combine},
                                         {"backward", &PhaseTimes::backward}};
/// Those of a forward pass.
inline constexpr auto kForwardPhases = std::span(kPhases).first<4>();

}  // namespace expar::cli
