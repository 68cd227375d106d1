// A router for one token in double, written as its formulas are: what the library's router is compared with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include <expar/router.h>

namespace expar::oracle {

struct Route {
  std::vector<double> scores, loss_scores, values, weights;  // values: what was compared
  std::vector<int> ids;
};

inline std::vector<double> scores_of(const std::vector<double>& z, Score score) {
  std::vector<double> s;
  double total = 0;
  for (const double v : z) total += std::exp(v);
  for (const double v : z) {
    if (score == Score::softmax) s.push_back(std::exp(v) / total);
    if (score == Score::sigmoid) s.push_back(1 / (1 + std::exp(-v)));
    if (score == Score::sqrt_softplus) s.push_back(std::sqrt(std::log(1 + std::exp(v))));
  }
  return s;
}

/// The indexes of the `count` largest, ties to the lower one.
inline std::vector<int> largest(const std::vector<double>& values, std::int64_t count) {
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return values[static_cast<std::size_t>(a)] > values[static_cast<std::size_t>(b)];
  });
  order.resize(static_cast<std::size_t>(count));
  return order;
}

/// Weights of experts that are already chosen; -1 is nobody.
inline void weigh(Route& route, const RouterOptions& options) {
  double sum = 0;
  for (const int id : route.ids) route.weights.push_back(id < 0 ? 0 : route.scores[static_cast<std::size_t>(id)]);
  for (const double w : route.weights) sum += w;
  for (double& w : route.weights) w *= double{options.scaling} / (options.renormalise ? sum + 1e-20 : 1);
}

inline Route score(const std::vector<double>& z, const RouterOptions& options) {
  Route route;
  route.scores = scores_of(z, options.score);
  const double sum = std::accumulate(route.scores.begin(), route.scores.end(), 1e-20);
  for (const double s : route.scores) route.loss_scores.push_back(s / sum);
  return route;
}

/// `bias` [E] for the choice, or empty.
inline Route route(const std::vector<double>& z, const RouterOptions& options, const std::vector<double>& bias) {
  Route r = score(z, options);
  std::vector<double> values = options.choice == Choice::logits ? z : r.scores;
  for (std::size_t e = 0; e < bias.size(); ++e) values[e] += bias[e];

  const auto groups = static_cast<std::size_t>(options.groups);
  const std::size_t size = z.size() / groups;
  std::vector<double> worth;
  for (std::size_t g = 0; g < groups; ++g) {
    std::vector<double> of_group(values.begin() + static_cast<std::ptrdiff_t>(g * size),
                                 values.begin() + static_cast<std::ptrdiff_t>((g + 1) * size));
    std::sort(of_group.rbegin(), of_group.rend());
    worth.push_back(of_group[0] + (bias.empty() || size == 1 ? 0 : of_group[1]));
  }
  const std::vector<int> used = largest(worth, options.groups_used);
  for (std::size_t e = 0; e < values.size(); ++e) {
    if (std::find(used.begin(), used.end(), static_cast<int>(e / size)) == used.end()) values[e] = -INFINITY;
  }
  r.ids = largest(values, options.topk);
  r.values = values;
  weigh(r, options);
  return r;
}

/// All tokens at once: as Megatron writes it.
inline std::vector<Route> sinkhorn(const std::vector<std::vector<double>>& z, const RouterOptions& options) {
  const std::size_t T = z.size(), E = z[0].size();
  std::vector<std::vector<double>> cost = z;
  for (auto& row : cost)
    for (double& c : row) c = std::exp(c);
  std::vector<double> d0(T), d1(E, 1.0);
  double error = 1e9;
  while (error > 1e-4) {
    for (std::size_t t = 0; t < T; ++t) {
      double sum = 0;
      for (std::size_t e = 0; e < E; ++e) sum += d1[e] * cost[t][e];
      d0[t] = 1 / static_cast<double>(T) / (sum + 1e-8);
    }
    const std::vector<double> old = d1;
    error = 0;
    for (std::size_t e = 0; e < E; ++e) {
      double sum = 0;
      for (std::size_t t = 0; t < T; ++t) sum += d0[t] * cost[t][e];
      d1[e] = 1 / static_cast<double>(E) / (sum + 1e-8);
      error += std::abs(old[e] - d1[e]) / static_cast<double>(E);
    }
  }
  std::vector<Route> routes;
  for (std::size_t t = 0; t < T; ++t) {
    std::vector<double> plan(E);
    for (std::size_t e = 0; e < E; ++e) plan[e] = d1[e] * cost[t][e] * d0[t];
    routes.push_back(score(z[t], options));
    routes.back().ids = largest(plan, options.topk);
    routes.back().values = plan;
    weigh(routes.back(), options);
  }
  return routes;
}

/// Each expert's best tokens; a token's experts by descending score.
inline std::vector<Route> experts_choose(const std::vector<std::vector<double>>& z, const RouterOptions& options) {
  const auto T = static_cast<std::int64_t>(z.size()), E = options.experts;
  std::vector<Route> routes;
  for (const auto& row : z) routes.push_back(score(row, options));
  const std::int64_t take = std::min(T, (T * options.topk + E - 1) / E);
  for (int e = 0; e < static_cast<int>(E); ++e) {
    std::vector<double> column;
    for (const Route& r : routes) column.push_back(r.scores[static_cast<std::size_t>(e)]);
    for (const int t : largest(column, take)) routes[static_cast<std::size_t>(t)].ids.push_back(e);
  }
  for (Route& r : routes) {
    std::stable_sort(r.ids.begin(), r.ids.end(), [&](int a, int b) {
      return r.scores[static_cast<std::size_t>(a)] > r.scores[static_cast<std::size_t>(b)];
    });
    r.ids.resize(static_cast<std::size_t>(E), -1);
    weigh(r, options);
  }
  return routes;
}

}  // namespace expar::oracle
