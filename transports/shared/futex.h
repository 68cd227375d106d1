// Sleeping on a word of shared memory, and waking who sleeps there.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace expar::local {

/// Sleeps while `word` is `value`, at most `limit`; may return early.
void futex_wait(const std::atomic<std::uint32_t>& word, std::uint32_t value, std::chrono::nanoseconds limit);
/// Wakes every sleeper on `word`, in this process or another.
void futex_wake(const std::atomic<std::uint32_t>& word);

}  // namespace expar::local
