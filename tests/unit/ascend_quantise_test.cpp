// The operators' quantisation modes, each value against the nearest code in double precision.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "src/ascend/quantise.h"
#include "tests/error_of.h"

namespace expar::ascend {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

double largest_of(DType dtype) { return dtype == DType::int8 ? 127 : dtype == DType::fp8_e4m3 ? 448 : 57344; }

double value_of(DType dtype, std::byte code) {
  if (dtype == DType::int8) return static_cast<std::int8_t>(code);
  if (dtype == DType::fp8_e4m3) {
    fp8_e4m3 value;
    value.bits = static_cast<std::uint8_t>(code);
    return static_cast<double>(static_cast<float>(value));
  }
  fp8_e5m2 value;
  value.bits = static_cast<std::uint8_t>(code);
  return static_cast<double>(static_cast<float>(value));
}

/// All finite values of a dtype, ascending, each with whether its code is even.
struct Code {
  double value;
  bool is_even;
};
const std::vector<Code>& codes_of(DType dtype) {
  static std::vector<Code> all[3];
  std::vector<Code>& codes = all[dtype == DType::int8 ? 0 : dtype == DType::fp8_e4m3 ? 1 : 2];
  if (!codes.empty()) return codes;
  for (int code = 0; code < 256; ++code) {
    const double value = value_of(dtype, static_cast<std::byte>(code));
    if (std::isfinite(value)) codes.push_back({value, code % 2 == 0});
  }
  std::sort(codes.begin(), codes.end(), [](const Code& a, const Code& b) { return a.value < b.value; });
  return codes;
}

/// The nearest there is, of two equally near the even one, beyond the ends the ends.
double nearest(DType dtype, double value) {
  Code best{0, false};
  double distance = kInfinity;
  for (const Code& code : codes_of(dtype)) {
    const double d = std::abs(code.value - value);
    if (d < distance || (d == distance && code.is_even)) {
      distance = d;
      best = code;
    }
  }
  return best.value;
}

/// A row, quantised.
struct Row {
  Row(const Quantisation& q, const std::vector<float>& x, const std::vector<float>& smooth = {})
      : quantisation(q),
        width(static_cast<std::int64_t>(x.size())),
        values(static_cast<std::size_t>(value_bytes(q, width)), std::byte{0x55}),
        scales(DType::int8, {scale_bytes(q, width)}) {
    std::memset(scales.view().data(), 0x55, scales.view().byte_size());
    quantise_row(q, {x.data(), {width}}, smooth, values.data(), scales.view().bytes());
  }

  double q(std::int64_t i) const { return value_of(quantisation.dtype, values[static_cast<std::size_t>(i)]); }
  double scale(std::int64_t i) const {
    if (quantisation.mode == QuantMode::mx) {
      fp8_e8m0 power;
      power.bits = byte(i);
      return static_cast<double>(static_cast<float>(power));
    }
    float value = 0;
    std::memcpy(&value, scales.view().bytes() + i * 4, sizeof value);
    return static_cast<double>(value);
  }
  std::uint8_t byte(std::int64_t i) const { return static_cast<std::uint8_t>(scales.view().bytes()[i]); }

  Quantisation quantisation;
  std::int64_t width;
  std::vector<std::byte> values;
  Array scales;
};

std::vector<float> random_row(std::int64_t width, unsigned seed) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> normal;
  std::vector<float> row;
  for (std::int64_t i = 0; i < width; ++i) row.push_back(normal(bits) * std::exp2(static_cast<float>(bits() % 9) - 4));
  return row;
}

std::int64_t group_of(const Quantisation& q, std::int64_t width) {
  return q.mode == QuantMode::per_token ? width : q.mode == QuantMode::per_group ? 128 : 32;
}

std::vector<Quantisation> scaled_modes() {
  std::vector<Quantisation> all = {{QuantMode::per_token, DType::int8}};
  for (const DType dtype : {DType::fp8_e4m3, DType::fp8_e5m2}) {
    for (const QuantMode mode : {QuantMode::per_token, QuantMode::per_group, QuantMode::mx}) {
      all.push_back({mode, dtype});
    }
  }
  return all;
}

TEST(AscendQuantise, gives_each_value_the_nearest_code_and_each_group_its_scale) {
  for (const Quantisation& q : scaled_modes()) {
    for (const std::int64_t width : {1, 31, 33, 128, 256, 300, 1024}) {
      const std::vector<float> x = random_row(width, 7), smooth = random_row(width, 8);
      for (const bool is_smooth : {false, true}) {
        const Row row(q, x, is_smooth ? smooth : std::vector<float>{});
        const std::int64_t group = group_of(q, width);
        const auto v = [&](std::int64_t i) {
          const auto at = static_cast<std::size_t>(i);
          return is_smooth ? x[at] * smooth[at] : x[at];
        };
        for (std::int64_t first = 0; first < width; first += group) {
          float most = 0;
          for (std::int64_t i = first; i < std::min(first + group, width); ++i) most = std::max(most, std::abs(v(i)));
          double scale = static_cast<double>(most) / largest_of(q.dtype);
          float inverse = static_cast<float>(largest_of(q.dtype)) / most;
          if (q.mode == QuantMode::mx) {
            const int exponent = q.dtype == DType::fp8_e4m3 ? 8 : 15;
            scale = std::exp2(std::floor(std::log2(static_cast<double>(most))) - exponent);
            inverse = static_cast<float>(1 / scale);
          }
          EXPECT_EQ(static_cast<float>(row.scale(first / group)), static_cast<float>(scale));
          for (std::int64_t i = first; i < std::min(first + group, width); ++i) {
            ASSERT_EQ(row.q(i), nearest(q.dtype, static_cast<double>(v(i) * inverse)))
                << "mode " << static_cast<int>(q.mode) << " value " << i << " of " << width;
          }
        }
      }
    }
  }
}

TEST(AscendQuantise, comes_back_within_half_a_step) {
  for (const Quantisation& q : scaled_modes()) {
    const std::vector<float> x = random_row(1024, 11);
    const Row row(q, x);
    const double bits = q.dtype == DType::fp8_e4m3 ? 3 : 2, least = q.dtype == DType::fp8_e4m3 ? -6 : -14;
    for (std::int64_t i = 0; i < 1024; ++i) {
      const double scale = row.scale(i / group_of(q, 1024)),
                   wanted = static_cast<double>(x[static_cast<std::size_t>(i)]);
      const double in_units = std::abs(wanted) / scale;
      double step = 1;
      if (q.dtype != DType::int8) step = std::exp2(std::max(std::floor(std::log2(in_units)), least) - bits);
      // The power of two of mx leaves values above the largest, which saturate.
      const double lost = std::max(0.0, in_units - largest_of(q.dtype));
      EXPECT_LE(std::abs(row.q(i) * scale - wanted), (std::max(step / 2, lost) + 1e-6 * in_units) * scale) << i;
    }
  }
}

TEST(AscendQuantise, multiplies_by_the_callers_scale_in_static_mode) {
  const std::vector<float> x = {0.5F, 1.5F,  2.5F,      -0.5F,      -2.5F, 126.4F,
                                1000, -1000, kInfinity, -kInfinity, kNan,  -0.0F};
  const std::vector<double> wanted = {0, 2, 2, 0, -2, 126, 127, -128, 127, -128, 0, 0};
  const Row row({QuantMode::static_scale, DType::int8}, x, {1});
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(row.q(static_cast<std::int64_t>(i)), wanted[i]) << x[i];
  const Row each({QuantMode::static_scale, DType::int8}, {1, 2, 3}, {10, 20, 30});
  EXPECT_EQ(each.q(0), 10);
  EXPECT_EQ(each.q(1), 40);
  EXPECT_EQ(each.q(2), 90);
  const std::vector<float> offset{-3}, offsets{1, 2, 3};
  const Row moved({QuantMode::static_scale, DType::int8, offset}, {1, 2, 3}, {10});
  EXPECT_EQ(moved.q(0), 7);
  EXPECT_EQ(moved.q(2), 27);
  const Row each_moved({QuantMode::static_scale, DType::int8, offsets}, {1, 2, 3}, {10});
  EXPECT_EQ(each_moved.q(0), 11);
  EXPECT_EQ(each_moved.q(2), 33);
  const Row fp8({QuantMode::static_scale, DType::fp8_e5m2}, {1e9F, -3, kInfinity}, {2});
  EXPECT_EQ(fp8.q(0), 57344);
  EXPECT_EQ(fp8.q(1), -6);
  EXPECT_EQ(fp8.q(2), 57344);
}

TEST(AscendQuantise, gives_ties_to_the_even_code) {
  for (const DType dtype : {DType::int8, DType::fp8_e4m3, DType::fp8_e5m2}) {
    const std::vector<Code>& codes = codes_of(dtype);
    std::vector<float> ties;
    for (std::size_t i = 0; i + 1 < codes.size(); ++i) {
      ties.push_back(static_cast<float>((codes[i].value + codes[i + 1].value) / 2));
    }
    const Row row({QuantMode::static_scale, dtype}, ties, {1});
    for (std::size_t i = 0; i < ties.size(); ++i) {
      EXPECT_EQ(row.q(static_cast<std::int64_t>(i)), nearest(dtype, static_cast<double>(ties[i]))) << ties[i];
    }
  }
}

TEST(AscendQuantise, gives_zeros_for_rows_of_zeros) {
  for (const Quantisation& q : scaled_modes()) {
    const Row row(q, std::vector<float>(300, -0.0F));
    EXPECT_TRUE(std::all_of(row.values.begin(), row.values.end(), [](std::byte b) { return b == std::byte{0}; }));
    for (std::size_t i = 0; i < row.scales.view().byte_size(); ++i)
      EXPECT_EQ(row.scales.view().bytes()[i], std::byte{0});
  }
}

TEST(AscendQuantise, marks_the_scale_of_what_is_not_finite) {
  for (const Quantisation& q : scaled_modes()) {
    for (const float wrong : {kNan, kInfinity, -kInfinity}) {
      std::vector<float> x = random_row(300, 3);
      x[140] = wrong;
      const Row row(q, x);
      const std::int64_t group = group_of(q, 300);
      for (std::int64_t i = 0; i < 300; ++i) {
        const bool shares = i / group == 140 / group;
        EXPECT_EQ(std::isnan(row.scale(i / group)), shares) << i;
        if (shares) {
          EXPECT_EQ(row.values[static_cast<std::size_t>(i)], std::byte{0}) << i;
        }
      }
      if (q.mode == QuantMode::mx) {
        EXPECT_EQ(row.byte(140 / 32), 0xff);
      }
    }
  }
}

TEST(AscendQuantise, reaches_the_ends_of_what_mx_can_scale) {
  const Quantisation q{QuantMode::mx, DType::fp8_e4m3};
  std::vector<float> x(96, 0);
  x[0] = std::numeric_limits<float>::max();
  x[32] = 0x1p-126F;  // its scale would be 2^-134
  x[64] = 0x1p-118F;
  const Row row(q, x);
  EXPECT_EQ(row.byte(0), 127 + 127 - 8);
  EXPECT_EQ(row.q(0), 448);  // 511.99 saturates
  EXPECT_EQ(row.byte(1), 0);
  EXPECT_EQ(row.q(32), 2);
  EXPECT_EQ(row.byte(2), 1);
  EXPECT_EQ(row.q(64), 256);
  EXPECT_EQ(row.byte(3), 0);  // three blocks, padded to four
  EXPECT_EQ(scales_of_row(q, 96), 4);
}

TEST(AscendQuantise, reads_rows_of_every_dtype_alike) {
  const std::vector<float> x = random_row(300, 5);
  std::vector<bf16> as_bf16;
  std::vector<f16> as_f16;
  std::vector<float> from_bf16, from_f16;
  for (const float value : x) {
    from_bf16.push_back(static_cast<float>(as_bf16.emplace_back(value)));
    from_f16.push_back(static_cast<float>(as_f16.emplace_back(value)));
  }
  const Quantisation q{QuantMode::per_token, DType::int8};
  std::vector<std::byte> values(300);
  float scale = 0;
  const auto check = [&](ConstTensor row, const std::vector<float>& same) {
    quantise_row(q, row, {}, values.data(), reinterpret_cast<std::byte*>(&scale));
    const Row wanted(q, same);
    EXPECT_EQ(values, wanted.values);
    EXPECT_EQ(static_cast<double>(scale), wanted.scale(0));
  };
  check({as_bf16.data(), {300}}, from_bf16);
  check({as_f16.data(), {300}}, from_f16);
  const Quantisation none = checked_quantisation(0, DType::f16);
  std::vector<std::byte> copy(600);
  quantise_row(none, {as_f16.data(), {300}}, {}, copy.data(), nullptr);
  EXPECT_EQ(std::memcmp(copy.data(), as_f16.data(), 600), 0);
}

TEST(AscendQuantise, sizes_rows_in_lines_of_512_bytes) {
  const auto bytes = [](std::int64_t mode, DType x, std::int64_t width) {
    return message_bytes(checked_quantisation(mode, x), width);
  };
  EXPECT_EQ(bytes(0, DType::bf16, 1024), 2048);
  EXPECT_EQ(bytes(0, DType::bf16, 1025), 2560);
  EXPECT_EQ(bytes(1, DType::bf16, 7168), 7168);
  EXPECT_EQ(bytes(2, DType::bf16, 7168), 7680);  // a scale of 4 bytes begins another line
  EXPECT_EQ(bytes(3, DType::bf16, 7168), 7680);  // 56 scales, 224 bytes
  EXPECT_EQ(bytes(4, DType::bf16, 7168), 7680);  // 224 bytes
  EXPECT_EQ(scales_at(checked_quantisation(2, DType::bf16), 1030), 1056);
  EXPECT_EQ(scales_of_row(checked_quantisation(3, DType::bf16), 1030), 9);
  EXPECT_EQ(scales_of_row(checked_quantisation(4, DType::bf16), 1030), 34);
  EXPECT_EQ(scale_dtype(checked_quantisation(4, DType::bf16)), DType::fp8_e8m0);
}

TEST(AscendQuantise, refuses_modes_and_dtypes_that_there_are_not) {
  const auto refusal = [](std::int64_t mode, DType x, std::optional<DType> y = {}) {
    return test::refusal_of([&] { checked_quantisation(mode, x, y); });
  };
  EXPECT_EQ(refusal(5, DType::bf16), "quant_mode is 5, not from 0 to 4");
  EXPECT_EQ(refusal(-1, DType::bf16), "quant_mode is -1, not from 0 to 4");
  EXPECT_EQ(refusal(0, DType::int8), "x is int8, not f32, bf16 or f16");
  EXPECT_EQ(refusal(0, DType::bf16, DType::int8), "y_dtype is int8, which quant_mode 0 does not change from bf16");
  EXPECT_EQ(refusal(2, DType::bf16, DType::f16),
            "y_dtype is f16, which quant_mode 2 has not: int8, fp8_e4m3 or fp8_e5m2");
  EXPECT_EQ(refusal(3, DType::bf16, DType::int8), "y_dtype is int8, which quant_mode 3 has not: fp8_e4m3 or fp8_e5m2");
  EXPECT_EQ(refusal(4, DType::f32, DType::fp8_e8m0),
            "y_dtype is fp8_e8m0, which quant_mode 4 has not: fp8_e4m3 or fp8_e5m2");
  EXPECT_EQ(checked_quantisation(1, DType::f16).dtype, DType::int8);
  EXPECT_EQ(checked_quantisation(3, DType::f16).dtype, DType::fp8_e4m3);
  EXPECT_EQ(checked_quantisation(2, DType::f16, DType::fp8_e5m2).dtype, DType::fp8_e5m2);
}

}  // namespace
}  // namespace expar::ascend
