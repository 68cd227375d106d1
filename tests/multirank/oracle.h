// The whole layer as one plain loop, forwards and backwards: what the library's layer is compared with.
//
// It computes with Real, a double that carries how far the library's rounding may have taken it so far, each rounding
// being independent of the others (Higham & Mary 2019), so that no tolerance has to be guessed. Read it as if Real were
// double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <numbers>
#include <numeric>
#include <vector>

#include <expar/experts.h>

namespace expar::oracle {

inline constexpr double kF32 = 0x1p-24;  // half a unit in the last place
inline constexpr double kBf16 = 0x1p-8;  // the same, of a number stored as bf16
inline constexpr double kFunction = 4;   // exp, log and erf of a backend are right to this many kF32

struct Real {
  double value = 0, error = 0;
  Real() = default;
  Real(double v, double e = 0) : value(v), error(e) {}
};

/// A result that inherits errors `a` and `b` and is off by up to `rounding` by itself.
inline Real result(double value, double a, double b, double rounding) {
  return {value, std::sqrt(a * a + b * b + rounding * rounding)};
}
inline Real operator+(Real a, Real b) {
  return result(a.value + b.value, a.error, b.error, kF32 * std::abs(a.value + b.value));
}
inline Real operator-(Real a, Real b) { return a + Real(-b.value, b.error); }
inline Real operator*(Real a, Real b) {
  return result(a.value * b.value, a.value * b.error, b.value * a.error, kF32 * std::abs(a.value * b.value));
}
inline Real operator/(Real a, Real b) {
  const double value = a.value / b.value;
  return result(value, a.error / b.value, value * b.error / b.value, kF32 * std::abs(value));
}
inline Real& operator+=(Real& a, Real b) { return a = a + b; }
inline Real exp(Real a) {
  const double value = std::exp(a.value);
  return result(value, value * a.error, 0, kFunction * kF32 * value);
}
inline Real log(Real a) {
  const double value = std::log(a.value);
  return result(value, a.error / a.value, 0, kFunction * kF32 * (1 + std::abs(value)));
}
inline Real erf(Real a) {
  return result(std::erf(a.value), 2 / std::sqrt(std::numbers::pi) * a.error, 0, kFunction * kF32);
}

using Vector = std::vector<Real>;

struct Network {  // one expert: up [N, H], down [H, F]; N is 2F (gate, then up) where gated
  Vector up, down, up_bias, down_bias;
};

struct SharedGradient {
  Network expert;
  Vector gate;
  Vector mix, value;  // of constant experts
};

struct Layer {
  std::size_t hidden = 0, inner = 0, topk = 0;
  Activation activation = Activation::swiglu;
  ActivationNumbers numbers;
  bool renormalise = true, bf16 = false;
  WeightsOn weights_on = WeightsOn::output;
  double balance = 0, z = 0;
  Vector router;       // [E and special ones, H]
  Vector router_bias;  // [E], or empty
  std::vector<Network> experts;
  Network shared;                  // empty: none
  Vector shared_gate;              // [H], or empty: its output counts as it is
  std::size_t zero = 0, copy = 0;  // special experts: then as many constant ones as there are values
  Vector mix, value;               // [C, 2, H], [C, H]

  std::size_t wide() const { return gated(activation) ? 2 * inner : inner; }
  /// What the library stores in the layer's dtype is rounded there.
  Real stored(Real a) const { return bf16 ? result(a.value, a.error, 0, kBf16 * std::abs(a.value)) : a; }
  Vector weighed(Vector v, Real weight) const {
    for (Real& a : v) a = stored(weight * a);
    return v;
  }
};

/// y [rows] = w [rows, columns] v, or with the other extent x [columns] = w^T v.
inline Vector times(const Vector& w, const Vector& v) {
  Vector y(w.size() / v.size());
  for (std::size_t i = 0; i < y.size(); ++i)
    for (std::size_t j = 0; j < v.size(); ++j) y[i] += w[i * v.size() + j] * v[j];
  return y;
}
inline Vector transposed_times(const Vector& w, const Vector& v) {
  Vector x(w.size() / v.size());
  for (std::size_t i = 0; i < v.size(); ++i)
    for (std::size_t j = 0; j < x.size(); ++j) x[j] += w[i * x.size() + j] * v[i];
  return x;
}
inline void add(Vector& sum, const Vector& v) {
  for (std::size_t i = 0; i < v.size(); ++i) sum[i] += v[i];
}
inline void add_outer(Vector& sum, const Vector& a, const Vector& b) {
  for (std::size_t i = 0; i < a.size(); ++i)
    for (std::size_t j = 0; j < b.size(); ++j) sum[i * b.size() + j] += a[i] * b[j];
}
inline Real dot(const Vector& a, const Vector& b) { return times(a, b)[0]; }

inline Real sigmoid(Real a) { return Real(1) / (Real(1) + exp(Real(0) - a)); }
inline Real normal_cdf(Real a) { return Real(0.5) * (Real(1) + erf(a * Real(std::sqrt(0.5)))); }
inline Real normal_pdf(Real a) { return exp(Real(-0.5) * a * a) * Real(std::sqrt(0.5 / std::numbers::pi)); }

/// max(x, low) or, with -1 for `side`, min(x, low); and 1 where x is not held there. Closer than the errors that the
/// library may have made, it may be held or not.
struct Held {
  Held(Real x, double limit, double side) : value(side * (x.value - limit) < 0 ? Real(limit) : x) {
    const bool free = side * (x.value - limit) >= 0;
    moves = Real(free ? 1 : 0, std::abs(x.value - limit) < 4 * x.error ? 1 : 0);
  }
  Real value, moves;
};

/// An activation at (gate, up) or x, and its derivatives.
struct Activated {
  Activated(const Layer& layer, const Vector& pre, std::size_t f) {
    const double limit = double{layer.numbers.limit}, alpha = double{layer.numbers.alpha};
    Real x = pre[f], x_moves = Real(1), up = Real(1), up_moves;
    if (gated(layer.activation)) {
      const Held gate(x, limit, -1), high(pre[pre.size() / 2 + f], limit, -1), low(high.value, -limit, 1);
      x = gate.value, x_moves = gate.moves, up_moves = high.moves * low.moves;
      up = low.value + Real(double{layer.numbers.offset});
    }
    Real value, slope;
    if (layer.activation == Activation::swiglu || layer.activation == Activation::silu) {
      const Real s = sigmoid(Real(alpha) * x);
      value = x * s, slope = s * (Real(1) + Real(alpha) * x * (Real(1) - s));
    } else if (layer.activation == Activation::relu2) {
      const Held positive(x, 0, 1);
      value = positive.value * positive.value, slope = Real(2) * positive.value;
    } else {
      value = x * normal_cdf(x), slope = normal_cdf(x) + x * normal_pdf(x);
    }
    h = value * up, dx = slope * up * x_moves, dup = value * up_moves;
  }
  Real h, dx, dup;
};

/// A zero, copy or constant expert at x: y = of_x x + of_value v.
struct Special {
  Special(const Layer& layer, std::size_t id, const Vector& x) : y(x.size()), v(x.size()), m1(x.size()), m2(x.size()) {
    const std::size_t first = layer.experts.size() + layer.zero, H = x.size();
    if (id >= first) of_x = Real(1);
    if (id >= first + layer.copy) {
      constant = static_cast<std::ptrdiff_t>(id - first - layer.copy);
      const auto part = [&](const Vector& all, std::size_t index) {
        const auto begin = all.begin() + static_cast<std::ptrdiff_t>(index * H);
        return Vector(begin, begin + static_cast<std::ptrdiff_t>(H));
      };
      const auto c = static_cast<std::size_t>(constant);
      m1 = part(layer.mix, 2 * c), m2 = part(layer.mix, 2 * c + 1), v = part(layer.value, c);
      const Real a = exp(dot(m1, x)), b = exp(dot(m2, x));
      of_x = a / (a + b), of_value = b / (a + b);
    }
    for (std::size_t i = 0; i < H; ++i) y[i] = of_x * x[i] + of_value * v[i];
  }
  /// Adds to dx and to the gradients, given dy; returns nothing else.
  void backward(const Vector& x, const Vector& dy, Vector& dx, SharedGradient& gradient) const {
    const std::size_t H = x.size();
    for (std::size_t i = 0; i < H; ++i) dx[i] += of_x * dy[i];
    if (constant < 0) return;
    const Real dz = of_x * of_value * (dot(dy, x) - dot(dy, v));
    const auto c = static_cast<std::size_t>(constant);
    for (std::size_t i = 0; i < H; ++i) {
      dx[i] += dz * (m1[i] - m2[i]);
      gradient.mix[2 * c * H + i] += dz * x[i];
      gradient.mix[(2 * c + 1) * H + i] += Real(-1) * dz * x[i];
      gradient.value[c * H + i] += of_value * dy[i];
    }
  }
  Real of_x, of_value;
  std::ptrdiff_t constant = -1;
  Vector y, v, m1, m2;
};

/// What one token meets on its way.
struct Token {
  Vector x, scores, weights, out;
  Real lse, sum = Real(1), gate = Real(1);
  Vector shared_pre, shared_h, shared_y;
  std::vector<std::size_t> ids;
  std::vector<bool> dropped;           // [K] for want of room
  std::vector<Vector> row, pre, h, y;  // [K]: what the expert reads and makes of it
  double gap = INFINITY;  // between the last chosen score and the best one left, in errors of this difference
};

inline Token forward(const Layer& layer, const Vector& x, const Vector& residual, std::vector<bool> dropped = {}) {
  Token t;
  t.x = x;
  t.dropped = dropped.empty() ? std::vector<bool>(layer.topk) : std::move(dropped);
  t.scores = times(layer.router, x);
  add(t.scores, layer.router_bias);
  const Real most =
      *std::max_element(t.scores.begin(), t.scores.end(), [](Real a, Real b) { return a.value < b.value; });
  Real total;
  for (Real& s : t.scores) total += s = exp(s - most);
  t.lse = most + log(total);
  for (Real& s : t.scores) s = s / total;

  std::vector<std::size_t> order(t.scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return t.scores[a].value > t.scores[b].value; });
  t.ids.assign(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(layer.topk));
  if (layer.topk < order.size()) {
    const Real difference = t.scores[order[layer.topk - 1]] - t.scores[order[layer.topk]];
    t.gap = difference.value / difference.error;
  }

  if (layer.renormalise) {
    t.sum = Real();
    for (const std::size_t e : t.ids) t.sum += t.scores[e];
  }
  t.out.resize(layer.hidden);
  for (const std::size_t e : t.ids) {
    t.weights.push_back(t.scores[e] / t.sum);
    const Real weight = t.weights.back();
    if (e >= layer.experts.size()) {
      t.row.emplace_back(), t.pre.emplace_back(), t.h.emplace_back();
      t.y.push_back(Special(layer, e, x).y);
      for (std::size_t i = 0; i < x.size(); ++i) t.out[i] += weight * t.y.back()[i];
      continue;
    }
    const Network& net = layer.experts[e];
    const bool on_input = layer.weights_on == WeightsOn::input, on_inner = layer.weights_on == WeightsOn::inner;
    Vector row = x;
    if (on_input) row = layer.weighed(row, weight);
    Vector pre = times(net.up, row);
    add(pre, net.up_bias);
    for (Real& p : pre) p = layer.stored(p);
    Vector h(layer.inner);
    for (std::size_t f = 0; f < h.size(); ++f) {
      h[f] = layer.stored(Activated(layer, pre, f).h);
    }
    Vector y = times(net.down, on_inner ? layer.weighed(h, weight) : h);
    for (std::size_t i = 0; i < net.down_bias.size(); ++i)
      y[i] += on_inner ? weight * net.down_bias[i] : net.down_bias[i];
    const Real outer = on_input || on_inner ? Real(1) : weight;
    for (Real& value : y) value = layer.stored(value);
    for (std::size_t i = 0; i < y.size() && !t.dropped[t.y.size()]; ++i) t.out[i] += outer * y[i];
    t.row.push_back(row), t.pre.push_back(pre), t.h.push_back(h), t.y.push_back(y);
  }
  if (!layer.shared.up.empty()) {
    t.shared_pre = times(layer.shared.up, x);
    for (Real& p : t.shared_pre) p = layer.stored(p);
    t.shared_h.resize(layer.shared.down.size() / layer.hidden);
    for (std::size_t f = 0; f < t.shared_h.size(); ++f)
      t.shared_h[f] = layer.stored(Activated(layer, t.shared_pre, f).h);
    t.shared_y = times(layer.shared.down, t.shared_h);
    if (!layer.shared_gate.empty()) t.gate = sigmoid(dot(layer.shared_gate, x));
    for (std::size_t i = 0; i < t.out.size(); ++i) t.out[i] += t.gate * t.shared_y[i];
  }
  add(t.out, residual);
  for (Real& o : t.out) o = layer.stored(o);
  return t;
}

/// Adds to the gradients and returns dx. `load` [E]: the fraction of all slots each expert got; `tokens`: of the batch.
inline Vector backward(const Layer& layer, const Token& t, const Vector& dout, const std::vector<double>& load,
                       double tokens, Vector& drouter, std::vector<Network>& dexperts, SharedGradient& dshared) {
  Vector dx(layer.hidden), dweights;
  for (std::size_t k = 0; k < layer.topk; ++k) {
    if (t.ids[k] >= layer.experts.size()) {
      Vector dy = dout;
      for (Real& d : dy) d = t.weights[k] * d;
      dweights.push_back(dot(dout, t.y[k]));
      Special(layer, t.ids[k], t.x).backward(t.x, dy, dx, dshared);
      continue;
    }
    const Network& net = layer.experts[t.ids[k]];
    Network& grad = dexperts[t.ids[k]];
    if (t.dropped[k]) {
      dweights.emplace_back();
      continue;
    }
    const bool on_input = layer.weights_on == WeightsOn::input, on_inner = layer.weights_on == WeightsOn::inner;
    const Vector dy = on_input ? dout : layer.weighed(dout, t.weights[k]);
    Vector dh = transposed_times(net.down, on_inner ? dout : dy);
    if (on_inner) {
      for (Real& d : dh) d = layer.stored(d);
      Real dweight = dot(dh, t.h[k]);
      if (!net.down_bias.empty()) dweight += dot(dout, net.down_bias);
      dweights.push_back(dweight);
      dh = layer.weighed(dh, t.weights[k]);
    } else if (!on_input) {
      dweights.push_back(dot(dout, t.y[k]));
    }
    Vector dpre(layer.wide());
    for (std::size_t f = 0; f < layer.inner; ++f) {
      const Activated a(layer, t.pre[k], f);
      const Real d = layer.stored(dh[f]);
      dpre[f] = layer.stored(d * a.dx);
      if (gated(layer.activation)) dpre[layer.inner + f] = layer.stored(d * a.dup);
    }
    add_outer(grad.down, dy, t.h[k]), add_outer(grad.up, dpre, t.row[k]);
    if (!grad.up_bias.empty()) add(grad.down_bias, dy), add(grad.up_bias, dpre);
    Vector row = transposed_times(net.up, dpre);
    if (on_input) {
      for (Real& d : row) d = layer.stored(d);
      dweights.push_back(dot(row, t.x));
      row = layer.weighed(row, t.weights[k]);
    }
    for (std::size_t i = 0; i < row.size(); ++i) dx[i] += layer.stored(row[i]);
  }

  if (!layer.shared.up.empty()) {
    const bool has_gate = !layer.shared_gate.empty();
    const Vector dy = has_gate ? layer.weighed(dout, t.gate) : dout;
    const Vector dh = transposed_times(layer.shared.down, dy);
    Vector dpre(t.shared_pre.size());
    for (std::size_t f = 0; f < dh.size(); ++f) {
      const Activated a(layer, t.shared_pre, f);
      dpre[f] = layer.stored(layer.stored(dh[f]) * a.dx);
      if (gated(layer.activation)) dpre[dh.size() + f] = layer.stored(layer.stored(dh[f]) * a.dup);
    }
    add_outer(dshared.expert.down, dy, t.shared_h), add_outer(dshared.expert.up, dpre, t.x);
    add(dx, transposed_times(layer.shared.up, dpre));
    if (has_gate) {
      const Real dgate = dot(dout, t.shared_y) * t.gate * (Real(1) - t.gate);
      for (std::size_t i = 0; i < dx.size(); ++i) {
        dshared.gate[i] += dgate * t.x[i];
        dx[i] += dgate * layer.shared_gate[i];
      }
    }
  }

  Vector dscores(t.scores.size()), dz(t.scores.size());
  for (std::size_t e = 0; e < dscores.size(); ++e)
    dscores[e] = Real(layer.balance * static_cast<double>(dscores.size()) * load[e] / tokens);
  Real mean, total;
  if (layer.renormalise) mean = dot(t.weights, dweights);
  for (std::size_t k = 0; k < layer.topk; ++k) dscores[t.ids[k]] += (dweights[k] - mean) / t.sum;
  total = dot(dscores, t.scores);
  for (std::size_t e = 0; e < dz.size(); ++e)
    dz[e] = t.scores[e] * (dscores[e] - total + Real(2 * layer.z / tokens) * t.lse);
  add_outer(drouter, dz, t.x);
  const Vector by_router = transposed_times(layer.router, dz);
  for (std::size_t i = 0; i < dx.size(); ++i) dx[i] = layer.stored(dx[i] + layer.stored(by_router[i]));
  return dx;
}

}  // namespace expar::oracle
