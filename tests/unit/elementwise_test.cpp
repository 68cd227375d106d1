// The kernels that work element by element or row by row, against double precision.
#include <algorithm>
#include <limits>

#include "tests/unit/elementwise_testing.h"

namespace expar {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double normal_integral(double x) { return std::erfc(-x / std::sqrt(2.0)) / 2; }
double normal_density(double x) { return std::exp(-x * x / 2) / std::sqrt(2 * M_PI); }

// ---- Activations ---------------------------------------------------------------------------------

/// An activation at one (gate, up) or one x, as its formula: h, dh/dx, dh/dup, and the magnitudes of the terms that are
/// summed in dh/dx.
struct Formula {
  Formula(Activation act, const ActivationNumbers& numbers, double pre_x, double pre_up) : x(pre_x) {
    const double alpha = double{numbers.alpha}, limit = double{numbers.limit};
    const bool has_gate = gated(act), clamped_x = has_gate && x > limit,
               clamped_up = has_gate && std::abs(pre_up) > limit;
    if (clamped_x) x = limit;
    const double up = has_gate ? std::clamp(pre_up, -limit, limit) + double{numbers.offset} : 1;
    double value = x > 0 ? x * x : 0, slope = x > 0 ? 2 * x : 0, magnitude = slope;
    if (act == Activation::swiglu || act == Activation::silu) {
      const double s = sigmoid(alpha * x);
      value = x * s, slope = s + alpha * x * s * (1 - s), magnitude = s + std::abs(alpha * x) * s;
    } else if (act != Activation::relu2) {
      value = x * normal_integral(x), slope = normal_integral(x) + x * normal_density(x);
      magnitude = normal_integral(x) + std::abs(x) * normal_density(x);
    }
    h = value * up;
    dx = clamped_x ? 0 : slope * up;
    magnitude_dx = magnitude * std::abs(up);
    dup = clamped_up ? 0 : value;
  }
  double x, h = 0, dx = 0, magnitude_dx = 0, dup = 0;
};

/// Of element i of h.
Formula formula(const ActivationProblem& p, std::int64_t i) {
  const std::int64_t at = i / p.inner * p.columns + i % p.inner;
  return {p.act, p.numbers, p.pre[at], gated(p.act) ? p.pre[at + p.inner] : 1};
}

// About sixteen roundings of f32, and those of the exponent, alpha x or x^2 / 2 of GELU's tail, two of them before it
// is squared.
double relative(double x) { return (16 + 2 * x * x) * kEpsF32; }
// A sigmoid or an exponential flushed to zero takes with it what it would have been multiplied by.
double flushed(double x, double y) { return kFlushed * (1 + std::abs(x)) * (1 + std::abs(y)); }

EXPAR_FOR_EVERY_TABLE(Activations);

TEST_P(Activations, are_their_formulas) {
  Pool pool(2);
  for_activations([&](const ActivationProblem& p) {
    const Operand h = p.forward(kernels(), pool);
    Worst worst;
    for (std::int64_t at = 0; at < p.rows * p.inner; ++at) {
      const Formula wanted = formula(p, at);
      worst.see(at, h[at], wanted.h,
                (relative(wanted.x) + rounding(p.dtype)) * std::abs(wanted.h) + flushed(wanted.x, 100));
    }
    EXPECT_TRUE(worst.good()) << worst << " in " << p.name << " " << name(p.dtype);
  });
}

TEST_P(Activations, have_the_gradients_of_their_formulas) {
  Pool pool(2);
  for_activations([&](const ActivationProblem& p) {
    const Operand dpre = p.backward(kernels(), pool);
    Worst worst;
    for (std::int64_t i = 0; i < p.rows * p.inner; ++i) {
      const Formula wanted = formula(p, i);
      const std::int64_t at = i / p.inner * p.columns + i % p.inner;
      const double dh = p.dh[i];
      const auto see = [&](std::int64_t where, double derivative, double magnitude) {
        worst.see(where, dpre[where], dh * derivative,
                  relative(wanted.x) * std::abs(dh) * magnitude + rounding(p.dtype) * std::abs(dh * derivative) +
                      flushed(wanted.x, 100));
      };
      see(at, wanted.dx, wanted.magnitude_dx);
      if (gated(p.act)) see(at + p.inner, wanted.dup, std::abs(wanted.dup));
    }
    EXPECT_TRUE(worst.good()) << worst << " in " << p.name << " " << name(p.dtype);
  });
}

TEST_P(Activations, have_the_gradients_that_finite_differences_find) {
  Pool pool(1);
  constexpr float kStep = 0x1p-7F;
  for (const NamedActivation& named : kActivations) {
    // Some numbers lie beyond a limit of 3, none closer to a kink than a step.
    ActivationProblem p(named, DType::f32, 5, 33, 4);
    if (named.name == "clamped_swiglu") p.numbers.limit = 3;
    for (std::int64_t at = 0; at < p.rows * p.columns; ++at) {
      for (const float kink : {-p.numbers.limit, 0.0F, p.numbers.limit}) {
        if (std::abs(p.pre[at] - kink) < 2 * kStep) p.pre.set(at, p.pre[at] + 4 * kStep);
      }
    }
    const Operand dpre = p.backward(kernels(), pool);
    for (std::int64_t at = 0; at < p.rows * p.columns; ++at) {
      const std::int64_t i = at / p.columns * p.inner + at % p.columns % p.inner;
      const float x = p.pre[at];
      p.pre.set(at, x + kStep);
      const float above = p.forward(kernels(), pool)[i];
      p.pre.set(at, x - kStep);
      const float below = p.forward(kernels(), pool)[i];
      p.pre.set(at, x);
      // The third derivative times step^2 / 6, and the f32 roundings of values below 32 divided by the step.
      EXPECT_NEAR(dpre[at], p.dh[i] * (above - below) / (2 * kStep), 8 * 0x1p-14 + 32 * 16 * kEpsF32 / kStep)
          << named.name << " " << at;
    }
  }
}

TEST_P(Activations, move_at_a_limit_and_stand_still_beyond_it) {
  Pool pool(1);
  ActivationProblem p(kActivations[1], DType::f32, 1, 4);
  ASSERT_EQ(p.numbers.limit, 7);
  const float gates[] = {7, 8, 1, -9}, ups[] = {-7, 7, -8, 8};
  for (std::int64_t f = 0; f < 4; ++f) p.pre.set(f, gates[f]), p.pre.set(4 + f, ups[f]), p.dh.set(f, 1);
  const Operand dpre = p.backward(kernels(), pool);
  const bool moves[] = {true, false, true, true, true, true, false, false};
  for (std::int64_t at = 0; at < 8; ++at) EXPECT_EQ(dpre[at] != 0, moves[at]) << at;
}

TEST_P(Activations, give_a_number_the_same_bits_at_any_place_of_a_vector) {
  Pool pool(1);
  for (const NamedActivation& named : kActivations) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      const ActivationProblem row(named, dtype, 1, 37);
      ActivationProblem one(named, dtype, 1, 1);
      const Operand h = row.forward(kernels(), pool), dpre = row.backward(kernels(), pool);
      for (std::int64_t f = 0; f < 37; ++f) {
        for (std::int64_t half = 0; half < one.columns; ++half) one.pre.set(half, row.pre[half * 37 + f]);
        one.dh.set(0, row.dh[f]);
        EXPECT_EQ(one.forward(kernels(), pool)[0], h[f]) << named.name;
        const Operand d = one.backward(kernels(), pool);
        for (std::int64_t half = 0; half < one.columns; ++half) EXPECT_EQ(d[half], dpre[half * 37 + f]) << named.name;
      }
    }
  }
}

TEST_P(Activations, keep_what_is_not_a_number) {
  Pool pool(1);
  for (const NamedActivation& named : kActivations) {
    ActivationProblem p(named, DType::f32, 1, 3);
    for (std::int64_t at = 0; at < p.columns; ++at) p.pre.set(at, at % 2 == 0 ? std::nanf("") : 1);
    const Operand h = p.forward(kernels(), pool);
    for (const std::int64_t at : {0, 2}) EXPECT_TRUE(std::isnan(h[at])) << named.name;
  }
}

// ---- Gather and reduce ---------------------------------------------------------------------------

EXPAR_FOR_EVERY_TABLE(GatherRows);

TEST_P(GatherRows, copies_scales_and_multiplies_the_rows_of_its_list) {
  Pool pool(2);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t width : kWidths) {
      for (const std::int64_t count : {0, 1, 7, 8, 9, 100}) {
        const GatherProblem p(dtype, count, width);
        for (int flags = 0; flags < 8; ++flags) {
          const bool listed = (flags & 1) != 0, scaled = (flags & 2) != 0, dotted = (flags & 4) != 0;
          const auto out = p.run(kernels(), pool, listed, scaled, dotted);
          Worst rows, dots;
          for (std::int64_t i = 0; i < count; ++i) {
            double dot = 0, magnitude = 0;
            for (std::int64_t h = 0; h < width; ++h) {
              const double x = p.at(i, h, listed), term = x * p.other[i * width + h];
              const double wanted = scaled ? x * p.weights[i] : x;
              dot += term;
              magnitude += std::abs(term);
              rows.see(i * width + h, out.rows[i * width + h], wanted,
                       scaled ? rounding(dtype) * std::abs(wanted) + kFlushed : kFlushed);
            }
            if (dotted) dots.see(i, out.dot[i], dot, static_cast<double>(width + 2) * kEpsF32 * magnitude + kFlushed);
          }
          EXPECT_TRUE(rows.good()) << rows;
          EXPECT_TRUE(dots.good()) << dots;
        }
      }
    }
  }
}

TEST_P(GatherRows, multiplies_without_copying) {
  Pool pool(1);
  const GatherProblem p(DType::bf16, 23, 77);
  const auto both = p.run(kernels(), pool, true, true, true), dots = p.run(kernels(), pool, true, true, true, false);
  EXPECT_EQ(dots.dot.bytes(), both.dot.bytes());
  EXPECT_EQ(dots.rows.bytes(), Operand(DType::bf16, 23 * 77).bytes()) << "something was written";
}

TEST_P(GatherRows, gives_a_dot_product_that_other_rows_do_not_change) {
  Pool pool(1);
  const GatherProblem many(DType::bf16, 23, 77);
  const auto all = many.run(kernels(), pool, true, false, true);
  for (std::int64_t i = 0; i < 23; ++i) {
    GatherProblem one(DType::bf16, 23, 77);
    one.count = 1;
    one.refs = {many.refs[static_cast<std::size_t>(i)]};
    for (std::int64_t h = 0; h < 77; ++h) one.other.set(h, many.other[i * 77 + h]);
    EXPECT_EQ(one.run(kernels(), pool, true, false, true).dot[0], all.dot[i]);
  }
}

EXPAR_FOR_EVERY_TABLE(ReduceSlots);

TEST_P(ReduceSlots, sums_the_slots_of_a_token_by_weight) {
  Pool pool(2);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t width : {1, 3, 16, 17, 127, 128, 130, 300}) {
      for (const std::int64_t topk : {1, 2, 8}) {
        for (const std::int64_t tokens : {0, 1, 3, 70}) {
          const ReduceProblem p(dtype, tokens, topk, width);
          for (int flags = 0; flags < 8; ++flags) {
            const bool weighted = (flags & 1) != 0, with_residual = (flags & 2) != 0, with_shared = (flags & 4) != 0;
            const Operand out = p.run(kernels(), pool, weighted, with_residual, with_shared);
            Worst worst;
            for (std::int64_t at = 0; at < tokens * width; ++at) {
              const std::int64_t t = at / width, h = at % width;
              double sum = with_residual ? p.residual[at] : 0, magnitude = std::abs(sum);
              if (with_shared) {
                const double term = (weighted ? p.shared_weights[t] : 1.0) * p.shared[at];
                sum += term;
                magnitude += std::abs(term);
              }
              for (std::int64_t k = 0; k < topk; ++k) {
                const std::int64_t slot = t * topk + k;
                if (p.slots[static_cast<std::size_t>(slot)] == nullptr) continue;
                const double term = (weighted ? p.weights[slot] : 1.0) * p.rows[slot * width + h];
                sum += term;
                magnitude += std::abs(term);
              }
              worst.see(
                  at, out[at], sum,
                  static_cast<double>(topk + 3) * kEpsF32 * magnitude + rounding(dtype) * std::abs(sum) + kFlushed);
            }
            EXPECT_TRUE(worst.good()) << worst;
          }
        }
      }
    }
  }
}

// ---- Norm ----------------------------------------------------------------------------------------

EXPAR_FOR_EVERY_TABLE(Norm);

TEST_P(Norm, divides_each_row_by_its_root_mean_square) {
  Pool pool(2);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t width : {1, 7, 8, 9, 64, 130, 1000}) {
      for (const std::int64_t tokens : {0, 1, 70}) {
        const NormProblem p(dtype, tokens, width);
        const NormProblem::Out got = p.run(kernels(), pool, p.x);
        Worst scales, rows;
        for (std::int64_t t = 0; t < tokens; ++t) {
          double squares = 0;
          for (std::int64_t h = 0; h < width; ++h) squares += std::pow(double{p.x[t * width + h]}, 2);
          const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + double{p.epsilon});
          const double error = (static_cast<double>(width) / 8 + 10) * kEpsF32;
          scales.see(t, got.scale[t], scale, error * scale);
          for (std::int64_t h = 0; h < width; ++h) {
            const double wanted = double{p.x[t * width + h]} * scale * double{p.gain[h]};
            rows.see(t * width + h, got.y[t * width + h], wanted,
                     (error + 2.01 * rounding(dtype)) * std::abs(wanted) + kFlushed);
          }
        }
        EXPECT_TRUE(scales.good()) << scales;
        EXPECT_TRUE(rows.good()) << rows;
      }
    }
  }
}

TEST_P(Norm, rounds_before_the_gain_and_after_it) {
  Pool pool(1);
  const NormProblem p(DType::bf16, 40, 65);
  const NormProblem::Out got = p.run(kernels(), pool, p.x);
  for (std::int64_t i = 0; i < 40 * 65; ++i) {
    const auto once = static_cast<float>(bf16(p.x[i] * got.scale[i / 65]));
    EXPECT_EQ(got.y[i], static_cast<float>(bf16(once * p.gain[i % 65])));
  }
}

TEST_P(Norm, gives_the_same_bits_in_place_and_with_a_sum_of_slots) {
  Pool pool(2);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t width : {1, 9, 130, 300}) {
      const ReduceProblem sum(dtype, 70, 3, width);
      const NormProblem p(dtype, 70, width);
      Operand out;
      const NormProblem::Out fused = sum.run_normed(kernels(), pool, out);
      EXPECT_EQ(out.bytes(), sum.run(kernels(), pool, false, true).bytes());
      const NormProblem::Out after = p.run(kernels(), pool, out);
      EXPECT_EQ(fused.y.bytes(), after.y.bytes());
      EXPECT_EQ(fused.scale.bytes(), after.scale.bytes());
      kernels().rms_norm({70, width, dtype, out.data(), {p.gain.memory.as<float>(), p.epsilon, out.data()}}, pool);
      EXPECT_EQ(out.bytes(), after.y.bytes());
    }
  }
}

// ---- Router --------------------------------------------------------------------------------------

EXPAR_FOR_EVERY_TABLE(Router);

TEST_P(Router, takes_the_largest_scores_of_a_softmax) {
  Pool pool(2);
  for (const std::int64_t experts : {1, 2, 5, 16, 17, 64, 130}) {
    for (const std::int64_t topk : {1, 2, 8}) {
      if (topk > experts) continue;
      for (const std::int64_t tokens : {0, 1, 40}) {
        const Operand logits = Operand::random(DType::f32, tokens * experts, 41, 20);
        const TopK got(kernels(), pool, logits, tokens, experts, topk);
        Worst worst;
        for (std::int64_t t = 0; t < tokens; ++t) {
          double largest = logits[t * experts], sum = 0;
          for (std::int64_t e = 1; e < experts; ++e) largest = std::max<double>(largest, logits[t * experts + e]);
          for (std::int64_t e = 0; e < experts; ++e) sum += std::exp(logits[t * experts + e] - largest);
          const double lse = largest + std::log(sum);
          // The difference of logits up to 40 is rounded once, which its exponential multiplies by 40; then the sum.
          const double relative = static_cast<double>(40 + 4 + experts) * kEpsF32;
          worst.see(t, got.logsumexp[t], lse, relative + 4 * kEpsF32 * std::abs(lse));
          for (std::int64_t e = 0; e < experts; ++e) {
            const double score = std::exp(logits[t * experts + e] - lse);
            worst.see(t * experts + e, got.scores[t * experts + e], score, 2 * relative * score + kFlushed);
          }
          std::vector<bool> taken(static_cast<std::size_t>(experts));
          for (std::int64_t k = 0; k < topk; ++k) {
            std::int64_t best = -1;
            for (std::int64_t e = 0; e < experts; ++e) {
              if (taken[static_cast<std::size_t>(e)]) continue;
              if (best < 0 || got.scores[t * experts + e] > got.scores[t * experts + best]) best = e;
            }
            taken[static_cast<std::size_t>(best)] = true;
            ASSERT_EQ(got.ids[static_cast<std::size_t>(t * topk + k)], best);
            ASSERT_EQ(got.top[t * topk + k], got.scores[t * experts + best]);
          }
        }
        EXPECT_TRUE(worst.good()) << worst;
      }
    }
  }
}

TEST_P(Router, breaks_ties_towards_the_lower_index) {
  Pool pool(1);
  Operand logits(DType::f32, 2 * 70);
  for (std::int64_t e = 0; e < 70; ++e) {
    logits.set(e, 1.5F);
    logits.set(70 + e, static_cast<float>(e % 3));
  }
  const TopK got(kernels(), pool, logits, 2, 70, 4);
  EXPECT_EQ(got.ids, (std::vector<std::int32_t>{0, 1, 2, 3, 2, 5, 8, 11}));
}

TEST_P(Router, gives_valid_ids_even_for_scores_that_are_not_numbers) {
  Pool pool(1);
  Operand logits = Operand::random(DType::f32, 10, 5);
  logits.set(4, std::numeric_limits<float>::quiet_NaN());
  const TopK got(kernels(), pool, logits, 1, 10, 3);
  for (const std::int32_t id : got.ids) EXPECT_TRUE(id >= 0 && id < 10) << id;
}

// ---- AdamW ---------------------------------------------------------------------------------------

EXPAR_FOR_EVERY_TABLE(AdamW);

TEST_P(AdamW, is_its_formula) {
  Pool pool(2);
  for (const std::int64_t count : {0, 1, 15, 16, 17, 1000, 70001}) {
    const AdamProblem old(count);
    AdamProblem now(count);
    const AdamWStep s = now.step();
    kernels().adamw(s, pool);
    Worst worst;
    for (std::int64_t i = 0; i < count; ++i) {
      const double g = old.g[i];
      const double m_old = s.beta1 * static_cast<double>(old.m[i]), m_new = (1 - static_cast<double>(s.beta1)) * g;
      const double m = m_old + m_new;
      const double v = s.beta2 * static_cast<double>(old.v[i]) + (1 - static_cast<double>(s.beta2)) * g * g;
      const double size = std::abs(m_old) + std::abs(m_new);
      const double scale = s.lr / s.c1 / (std::sqrt(v / s.c2) + s.eps);
      const double p = old.p[i] - (scale * m + static_cast<double>(s.lr) * s.decay * old.p[i]);
      // 1 - beta2 in f32 is off by half a unit of 1, a thousand times larger relative to 0.001.
      worst.see(i, now.m[i], m, 8 * kEpsF32 * size + kFlushed);
      worst.see(i, now.v[i], v, 1010 * kEpsF32 * v + kFlushed);
      worst.see(i, now.p[i], p, 4 * kEpsF32 * std::abs(old.p[i]) + 1100 * kEpsF32 * scale * size + kFlushed);
      EXPECT_EQ(old.low.count(), now.low.count());
      ASSERT_EQ(now.low.memory.as<bf16>()[i].bits, bf16(now.p[i]).bits);
    }
    EXPECT_TRUE(worst.good()) << worst;
  }
}

TEST_P(AdamW, works_without_a_low_precision_copy) {
  Pool pool(1);
  AdamProblem with(33), without(33);
  kernels().adamw(with.step(), pool);
  AdamWStep step = without.step();
  step.low = nullptr;
  kernels().adamw(step, pool);
  EXPECT_EQ(with.p.bytes(), without.p.bytes());
}

// ---- Bits ----------------------------------------------------------------------------------------

/// The results of every kernel above as one string of bytes.
std::string bytes_of(const Kernels& kernels, Pool& pool) {
  std::string all;
  for_activations(
      [&](const ActivationProblem& p) { all += p.forward(kernels, pool).bytes() + p.backward(kernels, pool).bytes(); });
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const std::int64_t width : kWidths) {
      const GatherProblem gathered(dtype, 100, width);
      const auto out = gathered.run(kernels, pool, true, true, true);
      all += out.rows.bytes() + out.dot.bytes() +
             ReduceProblem(dtype, 40, 4, width).run(kernels, pool, true, true, true).bytes();
      const NormProblem norm(dtype, 40, width);
      const NormProblem::Out normed = norm.run(kernels, pool, norm.x);
      all += normed.y.bytes() + normed.scale.bytes();
    }
  }
  for (const std::int64_t experts : {1, 5, 64, 67}) {
    const Operand logits = Operand::random(DType::f32, 50 * experts, 61, 15);
    const TopK got(kernels, pool, logits, 50, experts, 1 + experts / 10);
    all += got.scores.bytes() + got.logsumexp.bytes() + got.top.bytes();
    all.append(reinterpret_cast<const char*>(got.ids.data()), got.ids.size() * sizeof(std::int32_t));
  }
  AdamProblem adam(70001);
  kernels.adamw(adam.step(), pool);
  return all + adam.bytes();
}

EXPAR_FOR_EVERY_TABLE(Bits);

TEST_P(Bits, are_the_same_for_any_number_of_threads) {
  Pool one(1), two(2), three(3);
  const std::string bytes = bytes_of(kernels(), one);
  EXPECT_TRUE(bytes == bytes_of(kernels(), two));
  EXPECT_TRUE(bytes == bytes_of(kernels(), three));
}

TEST_P(Bits, do_not_depend_on_the_callers_mode_which_is_kept) {
  Pool pool(1);
  expect_the_same_in_every_mode([&] { return bytes_of(kernels(), pool); });
}

TEST(FloatMode, flushes_denormals_inside_and_restores_the_caller_outside) {
  std::fesetround(FE_DOWNWARD);
  EXPECT_EQ(rounding_in_force(), "down");
  {
    const FloatMode mode;
    EXPECT_EQ(rounding_in_force(), "nearest, flushing");
  }
  EXPECT_EQ(rounding_in_force(), "down");
  std::fesetround(FE_TONEAREST);
  EXPECT_EQ(rounding_in_force(), "nearest");
}

TEST(BitsOfIsas, are_the_same_for_all) {
  Pool pool(2);
  const auto isas = cpu_kernels();
  const std::string bytes = bytes_of(*isas.back(), pool);
  for (const Kernels* kernels : isas) EXPECT_TRUE(bytes == bytes_of(*kernels, pool)) << label(*kernels);
}

// Measured once: processors of different kinds must give the same bits, too.
TEST(BitsOfIsas, are_those_of_all_processors) {
  Pool pool(1);
  EXPECT_EQ(hash_of(bytes_of(*cpu_kernels().front(), pool)), 10425986925034599584u);
}

}  // namespace
}  // namespace expar
