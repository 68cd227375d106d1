// Rows as they travel: every table against double precision, the rows that hold NaN or infinity, and every code.
#include <algorithm>
#include <limits>

#include "tests/unit/kernels_testing.h"

namespace expar {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Some rows, in an order, on their way and back.
struct Trip {
  Trip(DType type, DType p, std::int64_t w, std::vector<std::int32_t> i)
      : payload(p),
        width(w),
        index(std::move(i)),
        rows(Operand::random(type, (1 + *std::max_element(index.begin(), index.end())) * w, 3, 5)) {}

  std::int64_t count() const { return static_cast<std::int64_t>(index.size()); }
  float x(std::int64_t i, std::int64_t h) const { return rows[index[static_cast<std::size_t>(i)] * width + h]; }

  void run(const Kernels& kernels, Pool& pool) {
    way = Array(DType::int8, {count() * payload_bytes(payload, width)});
    back = Operand(rows.dtype, count() * width);
    kernels.quantise({.payload = payload,
                      .dtype = rows.dtype,
                      .count = count(),
                      .width = width,
                      .rows = rows.data(),
                      .index = index.data(),
                      .out = way.view().data()},
                     pool);
    kernels.dequantise({.payload = payload,
                        .dtype = rows.dtype,
                        .count = count(),
                        .width = width,
                        .rows = way.view().data(),
                        .out = back.data()},
                       pool);
  }
  std::string bytes() const {
    return std::string(reinterpret_cast<const char*>(way.view().bytes()), way.view().byte_size()) + back.bytes();
  }

  DType payload;
  std::int64_t width;
  std::vector<std::int32_t> index;
  Operand rows, back;
  Array way;
};

template <class F>
void for_trips(F f) {
  for (const auto& [payload, limit, group] : kPayloads) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const std::int64_t width : {1, 7, 128, 129, 300}) f(Trip(dtype, payload, width, {4, 0, 2, 2}));
    }
  }
}

/// The magnitude that the scale of element (i, h) follows from.
double most(const Trip& t, std::int64_t i, std::int64_t h) {
  const std::int64_t group = scale_group(t.payload, t.width), first = h / group * group;
  double value = 0;
  for (std::int64_t j = first; j < std::min(first + group, t.width); ++j)
    value = std::max(value, std::abs(static_cast<double>(t.x(i, j))));
  return value;
}

EXPAR_FOR_EVERY_TABLE(Quantise);

TEST_P(Quantise, rounds_each_value_to_the_nearest_that_the_payload_has) {
  Pool pool(2);
  for_trips([&](Trip t) {
    t.run(kernels(), pool);
    Worst worst;
    for (std::int64_t at = 0; at < t.count() * t.width; ++at) {
      const std::int64_t i = at / t.width, h = at % t.width;
      const double x = t.x(i, h);
      double step = 0;  // between neighbours of the payload at x
      if (t.payload == DType::int8) step = most(t, i, h) / 127;
      if (t.payload == DType::fp8_e4m3) {
        const double unit = most(t, i, h) / 448;
        step = unit * std::exp2(std::max(std::floor(std::log2(std::abs(x) / unit)), -6.0) - 3);
      }
      if (t.payload == DType::f16) step = std::exp2(std::max(std::floor(std::log2(std::abs(x))), -14.0) - 10);
      if (t.payload == DType::bf16) step = std::exp2(std::floor(std::log2(std::abs(x))) - 7);
      worst.see(at, t.back[at], x, step / 2 + (3 * kEpsF32 + rounding(t.rows.dtype)) * std::abs(x) + 1e-38);
    }
    EXPECT_TRUE(worst.good()) << worst << " as " << name(t.payload) << ", width " << t.width;
  });
}

TEST_P(Quantise, gives_the_bytes_of_the_reference) {
  Pool pool(3);
  for_trips([&](Trip t) {
    for (const std::int64_t at : {t.width * 2, t.width * 5 - 1}) {
      for (const float value : {0.0F, -0.0F, 1e-39F, 3e-37F, 1e30F, -3e38F, kInfinity, -kInfinity, kNan}) {
        t.rows.set(at, value);
        t.run(reference_kernels(), pool);
        const std::string wanted = t.bytes();
        t.run(kernels(), pool);
        EXPECT_TRUE(t.bytes() == wanted) << value << " as " << name(t.payload) << ", width " << t.width;
      }
    }
  });
}

TEST_P(Quantise, does_not_depend_on_the_rounding_mode_of_the_caller) {
  Pool pool(2);
  for (const auto& [payload, limit, group] : kPayloads) {
    expect_the_same_in_every_mode([&] {
      Trip t(DType::f32, payload, 130, {0, 1});
      t.run(kernels(), pool);
      return t.bytes();
    });
  }
}

TEST_P(Quantise, keeps_what_shares_no_scale_with_a_NaN_or_an_infinity) {
  Pool pool;
  for (const float wrong : {kNan, kInfinity, -kInfinity}) {
    for (const DType payload : {DType::int8, DType::fp8_e4m3}) {
      Trip t(DType::f32, payload, 300, {0, 1});
      t.rows.set(140, wrong);
      t.run(kernels(), pool);
      const std::int64_t first = payload == DType::int8 ? 0 : 128, end = payload == DType::int8 ? 300 : 256;
      for (std::int64_t at = 0; at < 600; ++at) EXPECT_EQ(std::isnan(t.back[at]), at >= first && at < end) << at;
    }
    Trip t(DType::f32, DType::f16, 300, {0});
    t.rows.set(140, wrong);
    t.rows.set(141, 65520);  // beyond the largest, 65504, by as much as rounds up
    t.rows.set(142, 65519);
    t.run(kernels(), pool);
    EXPECT_TRUE(std::isnan(wrong) ? std::isnan(t.back[140]) : t.back[140] == wrong);
    EXPECT_EQ(t.back[141], kInfinity);
    EXPECT_EQ(t.back[142], 65504);
  }
}

TEST_P(Quantise, keeps_the_largest_and_gives_zeros_for_what_is_too_small_for_a_scale) {
  Pool pool;
  for (const DType payload : {DType::int8, DType::fp8_e4m3}) {
    Trip t(DType::f32, payload, 4, {0, 1, 2});
    const float limit = payload == DType::int8 ? 127 : 448;
    const float values[12] = {0, -0.0F, 0, 0, limit * 0x1p-127F, 0, -limit * 0x1p-127F, 0, -limit, 64, -2, limit / 2};
    for (std::int64_t i = 0; i < 12; ++i) t.rows.set(i, values[i]);
    t.run(kernels(), pool);
    for (std::int64_t i = 0; i < 8; ++i) EXPECT_EQ(t.back[i], 0) << i;
    EXPECT_EQ(t.back[8], -limit);
    EXPECT_EQ(t.back[9], 64);
    EXPECT_EQ(t.back[10], -2);
    EXPECT_EQ(t.back[11], payload == DType::int8 ? 64 : 224) << "a tie goes to the even one";
  }
}

TEST_P(Quantise, reads_every_code) {
  Pool pool;
  // 256 codes of fp8 in two groups of scale 1, all codes of f16 in one row.
  Array row(DType::int8, {payload_bytes(DType::fp8_e4m3, 256)});
  const float scales[2] = {1, 1};
  std::memcpy(row.view().data(), scales, sizeof scales);
  for (int code = 0; code < 256; ++code) row.view().bytes()[8 + code] = static_cast<std::byte>(code);
  Operand out(DType::f32, 256);
  kernels().dequantise(
      {.payload = DType::fp8_e4m3, .count = 1, .width = 256, .rows = row.view().data(), .out = out.data()}, pool);
  for (int code = 0; code < 256; ++code) {
    fp8_e4m3 wanted;
    wanted.bits = static_cast<std::uint8_t>(code);
    const auto value = static_cast<float>(wanted);
    EXPECT_TRUE(std::isnan(value) ? std::isnan(out[code]) : out[code] == value) << code;
  }
  std::vector<std::uint16_t> codes(1 << 16);
  for (std::size_t code = 0; code < codes.size(); ++code) codes[code] = static_cast<std::uint16_t>(code);
  Operand wide(DType::f32, 1 << 16);
  kernels().dequantise({.payload = DType::f16, .count = 1, .width = 1 << 16, .rows = codes.data(), .out = wide.data()},
                       pool);
  std::int64_t wrong = 0;
  for (std::size_t code = 0; code < codes.size(); ++code) {
    f16 half;
    half.bits = codes[code];
    const auto value = static_cast<float>(half), got = wide[static_cast<std::int64_t>(code)];
    wrong += std::isnan(value) ? !std::isnan(got) : std::memcmp(&value, &got, sizeof value) != 0;
  }
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace expar
