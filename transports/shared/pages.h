// Whole pages from the system, zeroed and touched before first use.
#pragma once

#include <cstddef>
#include <span>

namespace expar::local {

/// `bytes` rounded up to whole pages (huge ones where it is that large); at least one page.
/// Throws Error: no_memory when that overflows.
std::size_t whole_pages(std::size_t bytes);

/// Throws Error no_memory if the system has plainly less than `bytes` left: touching them would wake the OOM killer
/// instead of failing. Only large requests are checked.
void check_available(std::size_t bytes);

/// An owned mapping.
class Pages {
 public:
  Pages() = default;
  ~Pages();
  Pages(Pages&& other) noexcept;
  Pages& operator=(Pages&& other) noexcept;

  /// Private zeroed memory of this process. Throws Error: no_memory.
  static Pages anonymous(std::size_t bytes);
  enum class Touch { now, later };
  /// The first `bytes` of `file`, shared with whoever else maps it. Throws Error: no_memory.
  static Pages shared(int file, std::size_t bytes, Touch when = Touch::now);

  /// Makes every page present without changing what it holds. Throws Error: no_memory.
  void touch() const;

  std::span<std::byte> bytes() const { return bytes_; }

 private:
  explicit Pages(std::span<std::byte> bytes) : bytes_(bytes) {}
  static Pages map(std::size_t bytes, int flags, int file, Touch when);
  std::span<std::byte> bytes_;
};

}  // namespace expar::local
