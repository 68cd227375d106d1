// memfd_create, fallocate, seals.
#include "transports/shm/sealed.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <string>
#include <system_error>

#include <expar/error.h>

#include "transports/shared/pages.h"

namespace expar::shm {
namespace {

/// Of Linux 6.3, and not yet in every libc.
constexpr unsigned kNoExecSeal = 0x0008U;
constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

[[noreturn]] void fail(std::size_t bytes, int error) {
  const bool memory = error == ENOSPC || error == ENOMEM || error == EFBIG;
  throw Error(
      memory ? ErrorCode::no_memory : ErrorCode::io,
      "cannot reserve " + std::to_string(bytes) + " bytes of shared memory: " + std::generic_category().message(error));
}

}  // namespace

Fd make_sealed(std::size_t bytes) {
  local::check_available(bytes);
  Fd file(memfd_create("expar", MFD_CLOEXEC | MFD_ALLOW_SEALING | kNoExecSeal));
  if (!file && errno == EINVAL) file = Fd(memfd_create("expar", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file && errno == ENOSYS) throw Error(ErrorCode::unsupported, "this kernel has no memfd_create");
  if (!file) fail(bytes, errno);
  // Not ftruncate: a page that cannot be had must be an error here, not a SIGBUS at its first use.
  while (fallocate(file.get(), 0, 0, static_cast<off_t>(bytes)) != 0) {
    if (errno != EINTR) fail(bytes, errno);
  }
  if (fcntl(file.get(), F_ADD_SEALS, kSeals) != 0) fail(bytes, errno);
  return file;
}

bool is_sealed(int file, std::size_t bytes) {
  struct stat status {};
  if (fstat(file, &status) != 0 || static_cast<std::size_t>(status.st_size) != bytes) return false;
  const int seals = fcntl(file, F_GET_SEALS);
  constexpr int kNeeded = F_SEAL_SHRINK | F_SEAL_GROW;
  return seals >= 0 && (seals & kNeeded) == kNeeded && (seals & F_SEAL_WRITE) == 0;
}

}  // namespace expar::shm
