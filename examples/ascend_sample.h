// What the Ascend examples send, and what must come back, worked out in double precision.
#pragma once

#include <expar/expar.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

struct Sizes {
  std::int64_t bs, h, k, experts;
  std::int64_t shared = 0;            // shared experts on ranks of their own
  std::int64_t shared_rows = shared;  // of scales: the page has one even where no rank holds a shared expert
};

/// One rank's inputs of a dispatch with quant_mode 2.
struct Sample {
  Sample(const Sizes& of, int rank)
      : sizes(of),
        x(expar::DType::bf16, {of.bs, of.h}),
        expert_ids(expar::DType::int32, {of.bs, of.k}),
        expert_scales(expar::DType::f32, {of.bs, of.k}),
        scales(expar::DType::f32, {of.shared_rows + of.experts, of.h}) {
    const auto draw = [](const std::string& what, const auto& to, std::int64_t count) {
      const expar::Random random(0, what);
      for (std::int64_t i = 0; i < count; ++i)
        to[i] = std::remove_reference_t<decltype(to[i])>(random.normal(static_cast<std::uint64_t>(i)));
    };
    const std::string of_rank = " of rank " + std::to_string(rank);
    draw("x" + of_rank, x.as<expar::bf16>(), sizes.bs * sizes.h);
    draw("expert_scales" + of_rank, expert_scales.as<float>(), sizes.bs * sizes.k);
    draw("scales", scales.as<float>(), (sizes.shared_rows + sizes.experts) * sizes.h);
    for (std::int64_t t = 0; t < sizes.bs; ++t) {  // K different experts: those with the least numbers
      const expar::Random random(0, "token " + std::to_string(t) + of_rank);
      std::vector<std::int32_t> experts(static_cast<std::size_t>(sizes.experts));
      std::iota(experts.begin(), experts.end(), 0);
      std::sort(experts.begin(), experts.end(), [&](std::int32_t a, std::int32_t b) {
        return random.bits(static_cast<std::uint64_t>(a)) < random.bits(static_cast<std::uint64_t>(b));
      });
      std::copy_n(experts.begin(), sizes.k, expert_ids.as<std::int32_t>() + t * sizes.k);
    }
  }

  Sizes sizes;
  expar::Array x, expert_ids, expert_scales, scales;
};

/// The experts of the pages' examples: int8 rows as bf16, without their scales.
inline expar::Array to_bf16(const expar::Array& int8) {
  expar::Array rows(expar::DType::bf16, int8.view().shape());
  for (std::int64_t i = 0; i < rows.view().elements(); ++i)
    rows.as<expar::bf16>()[i] = expar::bf16(static_cast<float>(int8.as<std::int8_t>()[i]));
  return rows;
}

/// The largest error of out [BS, H], in units of what rounding may do; at most 1 is right. With s the scales of the
/// expert, out[t] = the sum over all copies of token t of weight * round(127 x[t] s / max |x[t] s|).
inline double worst_error(const Sample& sample, const expar::Array& out) {
  const auto& [bs, h, k, experts, shared, shared_rows] = sample.sizes;
  double worst = 0;
  for (std::int64_t t = 0; t < bs; ++t) {
    std::vector<double> sum(static_cast<std::size_t>(h)), allowed(sum);
    for (std::int64_t copy = 0; copy < k + shared; ++copy) {
      const std::int64_t slot = t * k + copy;
      const double weight = copy < k ? sample.expert_scales.as<float>()[slot] : 1;
      const std::int64_t row = copy < k ? shared_rows + sample.expert_ids.as<std::int32_t>()[slot] : copy - k;
      std::vector<double> v(static_cast<std::size_t>(h));
      double most = 0;
      for (std::size_t i = 0; i < v.size(); ++i) {
        const std::int64_t column = static_cast<std::int64_t>(i);
        v[i] = double{static_cast<float>(sample.x.as<expar::bf16>()[t * h + column])} *
               double{sample.scales.as<float>()[row * h + column]};
        most = std::max(most, std::fabs(v[i]));
      }
      for (std::size_t i = 0; i < v.size(); ++i) {
        const double q = 127 * v[i] / most;
        const bool tie = std::fabs(std::fabs(q - std::trunc(q)) - 0.5) < 1e-4;  // f32 may round it the other way
        sum[i] += weight * std::nearbyint(q);
        allowed[i] += std::fabs(weight) * (tie ? 1 : 1e-4);
      }
    }
    for (std::size_t i = 0; i < sum.size(); ++i) {
      const auto got = static_cast<float>(out.as<expar::bf16>()[t * h + static_cast<std::int64_t>(i)]);
      if (!std::isfinite(got)) return HUGE_VAL;
      allowed[i] += std::fabs(sum[i]) / 256;  // half of the last of bf16's 8 bits
      worst = std::max(worst, std::fabs(double{got} - sum[i]) / allowed[i]);
    }
  }
  return worst;
}

/// Runs `run_rank` on so many threads, each a rank, prints the worst of what they return, and returns the exit code.
inline int check_on_threads(const char* name, int ranks, double (*run_rank)(const expar::Context& group_ep)) {
  try {
    std::vector<double> errors(static_cast<std::size_t>(ranks));
    expar::run_threads(ranks, [&](expar::Communicator communicator) {
      errors[static_cast<std::size_t>(communicator.rank())] = run_rank(expar::Context(communicator));
    });
    const double worst = *std::max_element(errors.begin(), errors.end());
    std::printf("%s: the worst error is %.2f of what rounding may do\n", name, worst);
    return worst <= 1 ? 0 : 1;
  } catch (const expar::Error& error) {
    std::fprintf(stderr, "%s: %s\n", name, error.what());
    return expar::exit_code(error.code());
  }
}
