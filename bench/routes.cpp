// Draws or reads the choices of a router.
#include "bench/routes.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include <expar/random.h>

#include "io/routes.h"

namespace expar::bench {
namespace {

/// A file's layers are much alike; the first after those without experts will do.
constexpr std::int64_t kLayer = 0;
/// The least chance of an expert that should have none: K experts must be found all the same.
constexpr double kLeast = 1e-9;

template <class T>
bool read(std::string_view text, T& value) {
  const auto parsed = std::from_chars(text.data(), text.data() + text.size(), value);
  return parsed.ec == std::errc{} && parsed.ptr == text.data() + text.size();
}

/// How likely each expert is to be a token's first choice.
std::vector<double> chances(const RouteSource& source, std::int64_t experts) {
  std::vector<double> chance(static_cast<std::size_t>(experts), 1.0);
  for (std::int64_t e = 0; e < experts; ++e) {
    double& c = chance[static_cast<std::size_t>(e)];
    if (source.kind == RouteSource::Kind::zipf) c = std::pow(static_cast<double>(e + 1), -source.skew);
    if (source.kind == RouteSource::Kind::hot) {
      const bool hot = e < source.hot;
      const double share = hot ? source.hot_share : 1 - source.hot_share;
      c = share / static_cast<double>(hot ? source.hot : experts - source.hot);
    }
    c = std::max(c, kLeast);
  }
  return chance;
}

/// K experts without replacement: the K largest of log(chance) + Gumbel noise (Vieira 2014; Kool et al. 2019).
std::vector<std::int32_t> draw(const RouteSource& source, const Options& options, std::int64_t tokens) {
  const auto experts = static_cast<std::size_t>(options.experts);
  const auto topk = static_cast<std::size_t>(options.topk);
  const std::vector<double> chance = chances(source, options.experts);
  const Random random(1, "bench.routes");
  std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens) * topk);
  std::vector<double> key(experts);
  std::vector<std::int32_t> order(experts);
  for (std::size_t t = 0; t < static_cast<std::size_t>(tokens); ++t) {
    for (std::size_t e = 0; e < experts; ++e) {
      // In (0, 1): the noise is finite. -log(u) / chance is least where log(chance) + Gumbel is largest.
      const double u = (static_cast<double>(random.bits(t * experts + e) >> 11) + 0.5) * 0x1p-53;
      key[e] = -std::log(u) / chance[e];
    }
    std::iota(order.begin(), order.end(), 0);
    const auto less = [&](std::int32_t a, std::int32_t b) {
      return key[static_cast<std::size_t>(a)] < key[static_cast<std::size_t>(b)];
    };
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(topk), order.end(), less);
    std::copy_n(order.begin(), topk, ids.begin() + static_cast<std::ptrdiff_t>(t * topk));
  }
  return ids;
}

std::vector<std::int32_t> from_file(const std::string& path, std::int64_t tokens) {
  const io::Routes routes = io::read_routes(path, kLayer);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * routes.topk));
  for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = routes.ids[i % routes.ids.size()];
  return ids;
}

}  // namespace

RouteSource parse_routes(const std::string& text) {
  if (text == "uniform") return {};
  RouteSource source;
  const auto refuse = [&](const char* why) -> Error {
    return {ErrorCode::bad_argument, "--routes = '" + text + "': " + why};
  };
  if (text.starts_with("zipf:")) {
    source.kind = RouteSource::Kind::zipf;
    if (read(std::string_view(text).substr(5), source.skew) && source.skew >= 0 && source.skew <= 100) return source;
    throw refuse("zipf:A needs a number A from 0");
  }
  if (text.starts_with("hot:")) {
    source.kind = RouteSource::Kind::hot;
    const std::string_view rest = std::string_view(text).substr(4);
    const std::size_t colon = rest.find(':');
    if (colon != std::string_view::npos && read(rest.substr(0, colon), source.hot) &&
        read(rest.substr(colon + 1), source.hot_share) && source.hot >= 1 && source.hot_share >= 0 &&
        source.hot_share <= 1) {
      return source;
    }
    throw refuse("hot:N:F needs a number of experts N from 1 and a share F from 0 to 1");
  }
  if (text.find_first_of("./") == std::string::npos) throw refuse("neither uniform, zipf:A, hot:N:F nor a file");
  source.kind = RouteSource::Kind::file;
  source.path = text;
  return source;
}

std::vector<std::int32_t> make_routes(const Options& options, std::int64_t tokens) {
  const RouteSource source = parse_routes(options.routes);
  if (source.kind == RouteSource::Kind::file) return from_file(source.path, tokens);
  return draw(source, options, tokens);
}

}  // namespace expar::bench
