// What waiting and publishing need from the processor: a pause, a fence for streamed stores, and the cores that may be
// used.
#pragma once

#include <array>
#include <cstdint>

namespace expar::local {

#if defined(__x86_64__) || defined(__i386__)
inline void pause() noexcept { __builtin_ia32_pause(); }
/// Non-temporal stores pass later stores, release or not, unless fenced.
inline void flush_streamed_stores() noexcept { __builtin_ia32_sfence(); }
#elif defined(__aarch64__)
inline void pause() noexcept { __asm__ __volatile__("isb"); }
inline void flush_streamed_stores() noexcept { __asm__ __volatile__("dmb ishst" ::: "memory"); }
#else
inline void pause() noexcept {}
inline void flush_streamed_stores() noexcept {}
#endif

/// Cores by number, one bit each.
using CoreSet = std::array<std::uint64_t, 16>;

/// The cores this thread may run on (sched_getaffinity).
CoreSet allowed_cores();
int count(const CoreSet& cores);
/// The cores' worth of time that a cgroup quota grants, rounded up; a large number when there is none.
int quota_cores();

}  // namespace expar::local
