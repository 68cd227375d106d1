// A grouped matrix product with random operands, and its three transposes as double-precision
// loops.
#pragma once

#include "tests/unit/kernels_testing.h"

namespace expar {

struct GemmShape {
  DType dtype = DType::f32;
  std::int64_t n = 1, k = 1;
  std::vector<std::int64_t> rows;  // of each group
  bool gathered = true;            // from two bases in scattered order, else row i is row i
};

inline std::ostream& operator<<(std::ostream& out, const GemmShape& s) {
  out << name(s.dtype) << " n " << s.n << " k " << s.k << (s.gathered ? " gathered" : " plain") << " rows";
  for (const std::int64_t r : s.rows) out << ' ' << r;
  return out;
}

/// Names the shape and the table in the output of a failing test.
#define EXPAR_TRACE(kernels, shape)                 \
  std::ostringstream traced_text;                   \
  traced_text << label(kernels) << ": " << (shape); \
  SCOPED_TRACE(traced_text.str())

struct GemmOptions {
  bool packed = false, with_bias = true, weighted_bias = false;
  DType out = DType::f32;
};

class GemmProblem {
 public:
  explicit GemmProblem(GemmShape s, unsigned seed = 1) : shape(std::move(s)) {
    offsets.push_back(0);
    for (const std::int64_t r : shape.rows) offsets.push_back(offsets.back() + r);
    const std::int64_t groups = static_cast<std::int64_t>(shape.rows.size());
    // Gathered rows come alternately from the ends of two bases, so that neighbours never lie side
    // by side.
    refs.resize(static_cast<std::size_t>(total()));
    for (std::int64_t i = 0; i < total(); ++i) {
      refs[static_cast<std::size_t>(i)] = {static_cast<std::int32_t>(i % 2),
                                           static_cast<std::int32_t>(total() - 1 - i)};
      bias_weights.push_back(0.3F * static_cast<float>(i % 7));
    }
    for (unsigned b = 0; b < 2; ++b) x[b] = Operand::random(shape.dtype, total() * shape.k, seed + b);
    w = Operand::random(shape.dtype, groups * shape.n * shape.k, seed + 2);
    dy = Operand::random(shape.dtype, total() * shape.n, seed + 3);
    bias = Operand::random(DType::f32, groups * shape.n, seed + 4);
  }

  std::int64_t total() const { return offsets.back(); }
  Groups groups() const { return {static_cast<int>(shape.rows.size()), offsets.data()}; }
  Rows rows() const {
    return {{x[0].data(), x[1].data()}, shape.dtype, shape.k, shape.gathered ? refs.data() : nullptr};
  }
  double x_at(std::int64_t i, std::int64_t k) const {
    if (!shape.gathered) return x[0][i * shape.k + k];
    const RowRef& ref = refs[static_cast<std::size_t>(i)];
    return x[ref.base][ref.row * shape.k + k];
  }

  Operand nt(const Kernels& kernels, Pool& pool, const GemmOptions& o = {}) const {
    Operand y(o.out, total() * shape.n);
    GemmNT p{groups(), shape.n, shape.k, rows(), {w.data(), shape.dtype, false}, nullptr, nullptr, y.data(), o.out};
    if (o.with_bias) p.bias = bias.memory.as<float>();
    if (o.weighted_bias) p.bias_weights = bias_weights.data();
    Array packed;
    if (o.packed) {
      const std::int64_t bytes = kernels.packed_bytes(shape.dtype, shape.n, shape.k);
      packed = Array(DType::int8, {bytes * p.groups.count});
      kernels.pack(shape.dtype, p.groups.count, shape.n, shape.k, w.data(), packed.view().data(), pool);
      p.w = {packed.view().data(), shape.dtype, true};
    }
    kernels.gemm_nt(p, pool);
    return y;
  }

  Operand nn(const Kernels& kernels, Pool& pool, const GemmOptions& o = {}) const {
    Operand dx(o.out, total() * shape.k);
    kernels.gemm_nn({groups(), shape.n, shape.k, dy.data(), {w.data(), shape.dtype, false}, dx.data(), o.out}, pool);
    return dx;
  }

  struct Gradient {
    Operand dw, dbias;
  };
  Gradient tn(const Kernels& kernels, Pool& pool, const GemmOptions& o = {}) const {
    // What stands there is overwritten.
    Gradient out{Operand::random(DType::f32, w.count(), 5), Operand::random(DType::f32, bias.count(), 6)};
    kernels.gemm_tn(
        {groups(), shape.n, shape.k, dy.data(), rows(), out.dw.f32(), o.with_bias ? out.dbias.f32() : nullptr}, pool);
    return out;
  }

  /// One element's exact sum and the size of its terms, from which its tolerance follows: each of
  /// the chain's roundings is at most half a unit of a partial sum, which the terms' sum bounds.
  struct Sum {
    double value = 0, magnitude = 0;
    void add(double term) {
      value += term;
      magnitude += std::abs(term);
    }
    double tolerance(std::int64_t length, DType out) const {
      return static_cast<double>(length + 2) * kEpsF32 * magnitude + rounding(out) * std::abs(value) + kFlushed;
    }
  };

  void check_nt(const Operand& y, const GemmOptions& o) const {
    Worst worst;
    for_rows([&](std::int64_t g, std::int64_t i) {
      for (std::int64_t n = 0; n < shape.n; ++n) {
        Sum sum;
        for (std::int64_t k = 0; k < shape.k; ++k) sum.add(x_at(i, k) * w[(g * shape.n + n) * shape.k + k]);
        const double weight = o.weighted_bias ? bias_weights[static_cast<std::size_t>(i)] : 1.0F;
        if (o.with_bias) sum.add(weight * bias[g * shape.n + n]);
        const std::int64_t at = i * shape.n + n;
        worst.see(at, y[at], sum.value, sum.tolerance(shape.k, o.out));
      }
    });
    EXPECT_TRUE(worst.good()) << worst;
  }

  void check_nn(const Operand& dx, const GemmOptions& o) const {
    Worst worst;
    for_rows([&](std::int64_t g, std::int64_t i) {
      for (std::int64_t k = 0; k < shape.k; ++k) {
        Sum sum;
        for (std::int64_t n = 0; n < shape.n; ++n) {
          sum.add(static_cast<double>(dy[i * shape.n + n]) * w[(g * shape.n + n) * shape.k + k]);
        }
        const std::int64_t at = i * shape.k + k;
        worst.see(at, dx[at], sum.value, sum.tolerance(shape.n, o.out));
      }
    });
    EXPECT_TRUE(worst.good()) << worst;
  }

  void check_tn(const Gradient& got, const GemmOptions& o) const {
    std::vector<Sum> dw(static_cast<std::size_t>(w.count())), dbias(static_cast<std::size_t>(bias.count()));
    for_rows([&](std::int64_t g, std::int64_t i) {
      for (std::int64_t n = 0; n < shape.n; ++n) {
        const double d = dy[i * shape.n + n];
        dbias[static_cast<std::size_t>(g * shape.n + n)].add(d);
        for (std::int64_t k = 0; k < shape.k; ++k) {
          dw[static_cast<std::size_t>((g * shape.n + n) * shape.k + k)].add(d * x_at(i, k));
        }
      }
    });
    see_all(got.dw, dw);
    if (o.with_bias) see_all(got.dbias, dbias);
  }

  GemmShape shape;
  std::vector<std::int64_t> offsets;
  std::vector<RowRef> refs;
  std::vector<float> bias_weights;
  Operand x[2], w, dy, bias;

 private:
  template <class Body>
  void for_rows(Body body) const {
    for (std::size_t g = 0; g + 1 < offsets.size(); ++g) {
      for (std::int64_t i = offsets[g]; i < offsets[g + 1]; ++i) body(static_cast<std::int64_t>(g), i);
    }
  }
  void see_all(const Operand& got, const std::vector<Sum>& wanted) const {
    Worst worst;
    for (std::size_t i = 0; i < wanted.size(); ++i) {
      const auto at = static_cast<std::int64_t>(i);
      worst.see(at, got[at], wanted[i].value, wanted[i].tolerance(total() + 1, DType::f32));
    }
    EXPECT_TRUE(worst.good()) << worst;
  }
};

/// Awkward lengths of rows and columns, around the panels of 64, the pairs of bf16 and the vectors of 16.
inline const std::vector<std::int64_t> kAllLengths = {1, 2, 3, 63, 64, 65, 130};
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
// Below a block, one short of it, one beyond, and several: the others take minutes there and reach no other code.
inline const std::vector<std::int64_t> kLengths = {2, 63, 65, 130};
#else
inline const std::vector<std::int64_t> kLengths = kAllLengths;
#endif

inline std::vector<GemmShape> odd_shapes(const std::vector<std::int64_t>& lengths = kLengths) {
  std::vector<GemmShape> shapes;
  bool gathered = false;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t n : lengths) {
      for (const std::int64_t k : lengths) {
        shapes.push_back({dtype, n, k, {3, 0, 1, 14}, gathered});
        gathered = !gathered;
      }
    }
    shapes.push_back({dtype, 65, 35, {71, 0, 2, 29}, true});  // more rows than a block of columns
    shapes.push_back({dtype, 35, 70, {0, 0, 0}, true});
    shapes.push_back({dtype, 35, 70, {}, false});
    shapes.push_back({dtype, 2, 2300, {7}, true});  // longer than a chunk of the inner dimension
    shapes.push_back({dtype, 2300, 3, {7}, true});
    shapes.push_back({dtype, 3, 5, {2300, 1}, true});
  }
  return shapes;
}

}  // namespace expar
