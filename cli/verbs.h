// The verbs, each in a file of its own.
#pragma once

#include "cli/verb.h"

namespace expar::cli {

Verb bench_verb();
Verb doctor();
Verb launch_program();
Verb plan_verb();
Verb run_verb();
Verb train_verb();

}  // namespace expar::cli
