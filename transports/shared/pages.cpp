// mmap, madvise, and sentences for when they refuse.
#include "transports/shared/pages.h"

#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>
#include <system_error>
#include <utility>

#include <expar/error.h>

namespace expar::local {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
/// Below this, asking /proc costs more than it can save.
constexpr std::size_t kWorthChecking = std::size_t{64} << 20;

[[noreturn]] void fail(std::size_t bytes, int error) {
  throw Error(ErrorCode::no_memory, "cannot reserve " + std::to_string(bytes) +
                                        " bytes of memory: " + std::generic_category().message(error));
}

}  // namespace

std::size_t whole_pages(std::size_t bytes) {
  const std::size_t unit = bytes >= kHugePage ? kHugePage : kPage;
  if (bytes > std::numeric_limits<std::size_t>::max() / 2) fail(bytes, ENOMEM);
  return bytes == 0 ? unit : (bytes + unit - 1) / unit * unit;
}

void check_available(std::size_t bytes) {
  if (bytes < kWorthChecking) return;
  std::ifstream file("/proc/meminfo");
  std::string key;
  std::string unit;
  std::size_t kilobytes = 0;
  std::size_t available = 0;
  bool known = false;
  while (file >> key >> kilobytes) {
    if (key == "MemAvailable:") known = true;
    if (key == "MemAvailable:" || key == "SwapFree:") available += kilobytes * 1024;
    std::getline(file, unit);
  }
  if (known && bytes > available) {
    throw Error(ErrorCode::no_memory, "cannot reserve " + std::to_string(bytes) + " bytes of memory: the system has " +
                                          std::to_string(available) + " left");
  }
}

Pages::~Pages() {
  if (!bytes_.empty()) munmap(bytes_.data(), bytes_.size());
}

Pages::Pages(Pages&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}

Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(bytes_, other.bytes_);
  return *this;
}

Pages Pages::map(std::size_t bytes, int flags, int file, Touch when) {
  void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file, 0);
  if (address == MAP_FAILED) fail(bytes, errno);
  Pages pages({static_cast<std::byte*>(address), bytes});
  if (bytes >= kHugePage) madvise(address, bytes, MADV_HUGEPAGE);  // a wish: refusal costs nothing
  if (when == Touch::now) pages.touch();
  return pages;
}

Pages Pages::anonymous(std::size_t bytes) {
  check_available(bytes);
  return map(whole_pages(bytes), MAP_PRIVATE | MAP_ANONYMOUS, -1, Touch::now);
}

Pages Pages::shared(int file, std::size_t bytes, Touch when) { return map(bytes, MAP_SHARED, file, when); }

// Peers may already be using the memory, so pages are touched without changing them.
void Pages::touch() const {
  if (madvise(bytes_.data(), bytes_.size(), MADV_POPULATE_WRITE) == 0) return;
  if (errno == ENOMEM) fail(bytes_.size(), ENOMEM);
  for (std::size_t at = 0; at < bytes_.size(); at += kPage) {
    auto* word = reinterpret_cast<std::uint64_t*>(bytes_.data() + at);
    std::atomic_ref<std::uint64_t>(*word).fetch_add(0, std::memory_order_relaxed);
  }
}

}  // namespace expar::local
