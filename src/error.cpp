// The exception of the library: its names, its exit codes and the sentence it prints.
#include <expar/error.h>

#include <new>
#include <utility>

namespace expar {

std::string_view name(ErrorCode code) {
  switch (code) {
    case ErrorCode::bad_argument:
      return "bad_argument";
    case ErrorCode::mismatch:
      return "mismatch";
    case ErrorCode::timeout:
      return "timeout";
    case ErrorCode::peer_lost:
      return "peer_lost";
    case ErrorCode::unsupported:
      return "unsupported";
    case ErrorCode::io:
      return "io";
    case ErrorCode::no_memory:
      return "no_memory";
    case ErrorCode::internal:
      return "internal";
  }
  return "internal";  // a code that came over a wire
}

int exit_code(ErrorCode code) {
  switch (code) {
    case ErrorCode::bad_argument:
      return 2;
    case ErrorCode::mismatch:
      return 3;
    case ErrorCode::timeout:
      return 4;
    case ErrorCode::peer_lost:
      return 5;
    case ErrorCode::unsupported:
      return 6;
    case ErrorCode::io:
      return 7;
    case ErrorCode::no_memory:
      return 8;
    case ErrorCode::internal:
      return 70;
  }
  return 70;
}

Error::Error(ErrorCode code, std::string message, Where where)
    : code_(code), where_(std::move(where)), message_(std::move(message)) {
  if (where_.rank >= 0) what_ += "rank " + std::to_string(where_.rank) + ": ";
  if (!where_.operation.empty()) what_ += where_.operation + ": ";
  what_ += message_;
}

Error current_error(Error::Where where) {
  try {
    throw;
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return {ErrorCode::no_memory, "memory ran out", std::move(where)};
  } catch (const std::exception& error) {
    return {ErrorCode::internal, error.what(), std::move(where)};
  } catch (...) {
    return {ErrorCode::internal, "an exception of no known type", std::move(where)};
  }
}

}  // namespace expar
