// The one exception of the library, and the codes every language and exit status map to.
#pragma once

#include <exception>
#include <string>
#include <string_view>

namespace expar {

enum class ErrorCode {
  bad_argument,  // a value that can never be right; found before bytes move, it leaves the communicator usable
  mismatch,      // ranks disagree on what they are doing; likewise
  timeout,       // a rank did not arrive within the limit; the communicator is dead
  peer_lost,     // a rank died; the communicator is dead
  unsupported,   // not in this build or not on this machine
  io,            // the operating system refused a file, a socket or a mapping
  no_memory,     // memory ran out
  internal,      // a promise of the library was broken, or a rank failed with a foreign exception
};

/// "bad_argument", "mismatch", ...: the names of the JSON error object.
std::string_view name(ErrorCode code);

/// 2 bad_argument · 3 mismatch · 4 timeout · 5 peer_lost · 6 unsupported · 7 io · 8 no_memory · 70 internal.
int exit_code(ErrorCode code);

/// What went wrong, on which rank, while doing what, and because of whom.
///   rank      : where the cause arose; -1 when it belongs to no rank (a command line, a file)
///   peer      : the rank that is late or lost; -1 when nobody else is to blame
///   operation : "dispatch", "plan", ...; empty outside an operation
/// Every rank of a communicator throws the same Error for the same root cause.
class Error : public std::exception {
 public:
  struct Where {
    int rank = -1;
    int peer = -1;
    std::string operation = {};
  };

  Error(ErrorCode code, std::string message) : Error(code, std::move(message), Where{}) {}
  Error(ErrorCode code, std::string message, Where where);

  ErrorCode code() const noexcept { return code_; }
  int rank() const noexcept { return where_.rank; }
  int peer() const noexcept { return where_.peer; }
  const std::string& operation() const noexcept { return where_.operation; }
  /// The sentence alone; what() adds "rank 3: dispatch: " in front where they are known.
  const std::string& message() const noexcept { return message_; }
  const char* what() const noexcept override { return what_.c_str(); }

  /// True for the codes that always end the job, after which every later call throws this error again. Other errors do
  /// where they were the job's cause: what ended a rank, or came up on one rank between two operations.
  bool fatal() const noexcept { return code_ == ErrorCode::timeout || code_ == ErrorCode::peer_lost; }

 private:
  ErrorCode code_;
  Where where_;
  std::string message_;
  std::string what_;
};

/// The exception being handled, as an Error: one is itself; bad_alloc is no_memory, anything else internal, both
/// `where`.
Error current_error(Error::Where where = {});

}  // namespace expar
