// Random numbers as hashes of (seed, stream, index): any number can be had without the ones before it.
#include <expar/random.h>

#include <cmath>
#include <numbers>

namespace expar {
namespace {

// 2^64 divided by the golden ratio: consecutive multiples of it lie far apart.
constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15u;

/// The finaliser of SplitMix64 (Steele, Lea & Flood 2014): every bit of `z` reaches every bit of the result.
std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

/// FNV-1a (Fowler, Noll & Vo).
std::uint64_t hash(std::string_view text) {
  std::uint64_t h = 0xcbf29ce484222325u;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  return h;
}

}  // namespace

Random::Random(std::uint64_t seed, std::string_view stream) : key_(mix(mix(seed + kGolden) ^ hash(stream))) {}

std::uint64_t Random::bits(std::uint64_t index) const { return mix(key_ + (index + 1) * kGolden); }

float Random::uniform(std::uint64_t index) const { return static_cast<float>(bits(index) >> 40) * 0x1p-24F; }

float Random::normal(std::uint64_t index) const {
  const std::uint64_t word = bits(index);
  // In double and rounded at the end, so that a libm that differs in its last bit gives the same float.
  const double radius = static_cast<double>((word >> 32) + 1) * 0x1p-32;  // (0, 1]: its logarithm is finite
  const double angle = static_cast<double>(word & 0xffffffffu) * 0x1p-32;
  return static_cast<float>(std::sqrt(-2.0 * std::log(radius)) * std::cos(2.0 * std::numbers::pi * angle));
}

}  // namespace expar
