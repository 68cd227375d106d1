// Element types, shapes, views, arrays and errors.
#include <expar/error.h>
#include <expar/tensor.h>

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace expar {
namespace {

#ifdef __aarch64__
using Half = __fp16;  // GCC 12 has no _Float16 in C++ there
#else
using Half = _Float16;
#endif

template <class F>
ErrorCode code_of(F f) {
  try {
    f();
  } catch (const Error& e) {
    return e.code();
  }
  return ErrorCode::internal;
}

// The nearest of the `codes` finite codes 0, 1, 2, ... (which ascend in value), ties to the even
// code.
template <class Narrow, class Bits>
Bits nearest(double value, int codes) {
  int best = 0;
  double distance = std::numeric_limits<double>::infinity();
  for (int code = 0; code < codes; ++code) {
    Narrow n;
    n.bits = static_cast<Bits>(code);
    const double d = std::abs(static_cast<double>(static_cast<float>(n)) - value);
    if (d < distance || (d == distance && code % 2 == 0)) {
      distance = d;
      best = code;
    }
  }
  return static_cast<Bits>(best);
}

TEST(DType, has_a_name_that_parses_back) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16, DType::int8, DType::fp8_e4m3, DType::fp8_e5m2,
                            DType::fp8_e8m0, DType::int32, DType::int64}) {
    EXPECT_EQ(parse_dtype(name(dtype)), dtype);
  }
  EXPECT_EQ(size_of(DType::bf16), 2u);
  EXPECT_EQ(size_of(DType::int64), 8u);
}

TEST(DType, refuses_an_unknown_name_and_lists_the_known) {
  try {
    parse_dtype("float");
    FAIL() << "accepted";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::bad_argument);
    EXPECT_STREQ(
        e.what(),
        "no dtype is called 'float'; the names are f32, bf16, f16, int8, fp8_e4m3, fp8_e5m2, fp8_e8m0, int32, int64");
  }
}

TEST(Bf16, rounds_to_nearest_even_and_keeps_nan) {
  EXPECT_EQ(bf16(1.0F).bits, 0x3f80);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f808001u)).bits, 0x3f81);
  EXPECT_TRUE(std::isnan(static_cast<float>(bf16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_TRUE(std::isinf(static_cast<float>(bf16(std::numeric_limits<float>::max()))));
}

TEST(F16, survives_the_way_to_f32_and_back_for_every_code) {
  for (int code = 0; code < 0x10000; ++code) {
    f16 h;
    h.bits = static_cast<std::uint16_t>(code);
    const float wide = static_cast<float>(h);
    if ((code & 0x7fff) > 0x7c00) {
      EXPECT_TRUE(std::isnan(wide) && std::isnan(static_cast<float>(f16(wide)))) << code;
    } else {
      EXPECT_EQ(f16(wide).bits, h.bits) << code;
    }
  }
}

TEST(F16, agrees_with_the_compilers_half_for_values_between_codes) {
  for (std::uint32_t u = 0x32000000u; u < 0x48000000u; u += 4099) {
    const float value = std::bit_cast<float>(u);
    const auto half = static_cast<Half>(value);
    EXPECT_EQ(f16(value).bits, std::bit_cast<std::uint16_t>(half)) << value;
    EXPECT_EQ(f16(-value).bits, std::bit_cast<std::uint16_t>(half) | 0x8000) << value;
  }
}

TEST(F16, overflows_to_infinity) {
  EXPECT_EQ(f16(65519.996F).bits, 0x7bff);
  EXPECT_EQ(f16(65520.0F).bits, 0x7c00);
  EXPECT_EQ(f16(-1e30F).bits, 0xfc00);
}

TEST(Fp8, takes_the_nearest_code_for_every_magnitude) {
  for (std::uint32_t u = 0x39000000u; u < 0x44100000u; u += 65535) {
    const float value = std::bit_cast<float>(u);
    EXPECT_EQ(fp8_e4m3(value).bits, (nearest<fp8_e4m3, std::uint8_t>(value, 0x7f))) << value;
  }
  for (int code = 0; code < 0x7f; ++code) {
    fp8_e4m3 n;
    n.bits = static_cast<std::uint8_t>(code);
    EXPECT_EQ(fp8_e4m3(static_cast<float>(n)).bits, code);
  }
}

TEST(Fp8, ties_go_to_the_even_code) {
  for (int code = 0; code < 0x7e; ++code) {
    fp8_e4m3 low, high;
    low.bits = static_cast<std::uint8_t>(code);
    high.bits = static_cast<std::uint8_t>(code + 1);
    const float middle = (static_cast<float>(low) + static_cast<float>(high)) / 2;
    EXPECT_EQ(fp8_e4m3(middle).bits, code + code % 2) << middle;
  }
}

TEST(Fp8, saturates_and_keeps_nan) {
  EXPECT_EQ(fp8_e4m3(448.0F).bits, 0x7e);
  EXPECT_EQ(fp8_e4m3(1e9F).bits, 0x7e);
  EXPECT_EQ(fp8_e4m3(-std::numeric_limits<float>::infinity()).bits, 0xfe);
  EXPECT_EQ(fp8_e4m3(std::numeric_limits<float>::quiet_NaN()).bits, 0x7f);
  EXPECT_TRUE(std::isnan(static_cast<float>(fp8_e4m3(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_EQ(static_cast<float>(fp8_e4m3(448.0F)), 448.0F);
}

TEST(Fp8E5m2, takes_the_nearest_code_and_overflows_to_infinity) {
  for (std::uint32_t u = 0x36000000u; u < 0x47600000u; u += 65535) {
    const float value = std::bit_cast<float>(u);
    EXPECT_EQ(fp8_e5m2(value).bits, (nearest<fp8_e5m2, std::uint8_t>(value, 0x7c))) << value;
  }
  for (int code = 0; code < 256; ++code) {
    fp8_e5m2 n;
    n.bits = static_cast<std::uint8_t>(code);
    EXPECT_EQ(fp8_e5m2(static_cast<float>(n)).bits, (code & 0x7f) > 0x7c ? code | 2 : code);
  }
  EXPECT_EQ(static_cast<float>(fp8_e5m2(-57344.0F)), -57344.0F);
  EXPECT_EQ(fp8_e5m2(61439.0F).bits, 0x7b);
  EXPECT_EQ(fp8_e5m2(61440.0F).bits, 0x7c);
  EXPECT_EQ(fp8_e5m2(-std::numeric_limits<float>::infinity()).bits, 0xfc);
  EXPECT_TRUE(std::isnan(static_cast<float>(fp8_e5m2(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(Fp8E8m0, is_a_power_of_two) {
  for (int code = 0; code < 255; ++code) {
    fp8_e8m0 scale;
    scale.bits = static_cast<std::uint8_t>(code);
    EXPECT_EQ(static_cast<float>(scale), std::exp2(code - 127.0)) << code;
  }
  fp8_e8m0 none;
  none.bits = 0xff;
  EXPECT_TRUE(std::isnan(static_cast<float>(none)));
}

TEST(Shape, counts_its_elements_and_prints_itself) {
  EXPECT_EQ(Shape{}.elements(), 1);
  EXPECT_EQ(Shape{}.str(), "[]");
  EXPECT_EQ((Shape{17, 64}).elements(), 1088);
  EXPECT_EQ((Shape{17, 64}).str(), "[17, 64]");
  EXPECT_EQ((Shape{3, 0, 5}).elements(), 0);
  EXPECT_NE((Shape{2, 3}), (Shape{3, 2}));
}

TEST(Shape, refuses_what_no_memory_can_hold) {
  EXPECT_EQ(code_of([] { Shape{2, -1}; }), ErrorCode::bad_argument);
  EXPECT_EQ(code_of([] { Shape{1, 2, 3, 4, 5}; }), ErrorCode::bad_argument);
  EXPECT_EQ(code_of([] { Shape{std::int64_t{1} << 40, std::int64_t{1} << 40}; }), ErrorCode::bad_argument);
  EXPECT_EQ(code_of([] { Shape{0, std::int64_t{1} << 62}; }), ErrorCode::bad_argument);
}

TEST(Tensor, gives_views_of_its_rows) {
  float data[12] = {};
  const Tensor t(data, {4, 3});
  EXPECT_EQ(t.rows(1, 2).as<float>(), data + 3);
  EXPECT_EQ(t.rows(1, 2).shape(), (Shape{2, 3}));
  EXPECT_EQ(ConstTensor(t).rows(4, 0).elements(), 0);
  EXPECT_EQ(t.byte_size(), 48u);
}

TEST(Tensor, refuses_rows_that_it_does_not_have) {
  float data[12] = {};
  const Tensor t(data, {4, 3});
  EXPECT_EQ(code_of([&] { t.rows(3, 2); }), ErrorCode::bad_argument);
  EXPECT_EQ(code_of([&] { t.rows(-1, 1); }), ErrorCode::bad_argument);
  EXPECT_EQ(code_of([&] { t.rows(1, std::numeric_limits<std::int64_t>::max()); }), ErrorCode::bad_argument);
  EXPECT_EQ(code_of([&] { Tensor(data, Shape{}).rows(0, 0); }), ErrorCode::bad_argument);
}

TEST(Tensor, refuses_to_be_read_as_another_type) {
  float data[2] = {};
  EXPECT_EQ(code_of([&] { (void)Tensor(data, {2}).as<bf16>(); }), ErrorCode::bad_argument);
}

TEST(Tensor, without_data_is_absent) {
  EXPECT_TRUE(Tensor().absent());
  EXPECT_FALSE(Tensor(static_cast<float*>(nullptr), {0, 4}).absent());
  EXPECT_EQ(Tensor(static_cast<float*>(nullptr), {0, 4}).rows(0, 0).bytes(), nullptr);
}

TEST(Array, is_aligned_and_zeroed) {
  const Array a(DType::bf16, {5, 7});
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(a.view().data()) % 64, 0u);
  for (int i = 0; i < 35; ++i) EXPECT_EQ(a.as<bf16>()[i].bits, 0);
  EXPECT_TRUE(Array(DType::f32, {0}));
  EXPECT_FALSE(Array());
}

TEST(Buffer, grows_when_it_must_and_keeps_its_memory) {
  Buffer buffer;
  const Tensor small = buffer.view(DType::f32, {4, 5});
  EXPECT_EQ(small.shape(), (Shape{4, 5}));
  EXPECT_EQ(small.dtype(), DType::f32);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(small.data()) % 64, 0u);
  EXPECT_EQ(buffer.view(DType::bf16, {40}).data(), small.data());
  EXPECT_EQ(buffer.view(DType::int64, {3}).data(), small.data());

  const Tensor large = buffer.view(DType::int64, {11});  // 88 bytes where there were 80: takes room for 120
  for (int i = 0; i < 11; ++i) large.as<std::int64_t>()[i] = i;
  EXPECT_EQ(buffer.view(DType::int8, {120}).data(), large.data());
  EXPECT_EQ(buffer.view(DType::f32, {2}).data(), large.data());
}

TEST(Buffer, has_room_for_nothing) {
  Buffer buffer;
  EXPECT_FALSE(buffer.view(DType::f32, {0, 3}).absent());
  EXPECT_EQ(buffer.view(DType::f32, {0, 3}).elements(), 0);
}

TEST(Error, says_which_rank_did_what) {
  const Error e(ErrorCode::timeout, "rank 1 did not arrive", {.rank = 3, .peer = 1, .operation = "dispatch"});
  EXPECT_STREQ(e.what(), "rank 3: dispatch: rank 1 did not arrive");
  EXPECT_EQ(e.message(), "rank 1 did not arrive");
  EXPECT_TRUE(e.fatal());
  EXPECT_EQ(exit_code(e.code()), 4);
  EXPECT_EQ(name(e.code()), "timeout");
  EXPECT_STREQ(Error(ErrorCode::io, "no such file").what(), "no such file");
  EXPECT_FALSE(Error(ErrorCode::mismatch, "").fatal());
}

}  // namespace
}  // namespace expar
