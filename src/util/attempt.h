// What a rank does alone before the ranks meet.
#pragma once

#include <expar/context.h>

namespace expar {

/// Runs `work`, unless `context` declines already; if it throws, `context` declines from then on, so that every rank
/// throws the error where they meet next.
inline void attempt(Context& context, FunctionRef<void()> work) {
  if (context.declines()) return;
  try {
    work();
  } catch (...) {
    context = context.declining(current_error());
  }
}

}  // namespace expar
