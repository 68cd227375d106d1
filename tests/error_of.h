// The error that a call must end with.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>

#include <expar/error.h>

namespace expar::test {

/// What `call` throws. Where it throws nothing, this does: a child process fails with it as a test does.
inline Error error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error;
  }
  throw std::runtime_error("nothing was thrown");
}

/// The sentence alone, where the code is bad_argument.
inline std::string refusal_of(const std::function<void()>& call) {
  const Error error = error_of(call);
  if (error.code() != ErrorCode::bad_argument) throw std::runtime_error(error.what());
  return error.message();
}

}  // namespace expar::test
