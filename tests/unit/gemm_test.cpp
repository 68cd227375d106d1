// The grouped matrix products: right, and the same bytes however they are cut.
#include "tests/unit/gemm_testing.h"

namespace expar {
namespace {

EXPAR_FOR_EVERY_TABLE(Gemm);

TEST_P(Gemm, multiplies_rows_by_weights) {
  Pool pool(2);
  for (const GemmShape& shape : odd_shapes()) {
    EXPAR_TRACE(kernels(), shape);
    const GemmProblem problem(shape);
    for (const bool packed : {false, true}) {
      for (const DType out : {DType::f32, shape.dtype}) {
        const GemmOptions options{.packed = packed, .with_bias = !packed, .out = out};
        problem.check_nt(problem.nt(kernels(), pool, options), options);
      }
    }
  }
}

TEST_P(Gemm, weighs_the_bias_of_each_row_where_asked) {
  Pool pool(2);
  for (const GemmShape& shape : odd_shapes()) {
    EXPAR_TRACE(kernels(), shape);
    const GemmProblem problem(shape);
    for (const bool packed : {false, true}) {
      const GemmOptions options{.packed = packed, .weighted_bias = true, .out = shape.dtype};
      problem.check_nt(problem.nt(kernels(), pool, options), options);
    }
  }
}

TEST_P(Gemm, multiplies_gradients_by_weights) {
  Pool pool(2);
  for (const GemmShape& shape : odd_shapes()) {
    EXPAR_TRACE(kernels(), shape);
    const GemmProblem problem(shape);
    for (const DType out : {DType::f32, shape.dtype}) {
      problem.check_nn(problem.nn(kernels(), pool, {.out = out}), {.out = out});
    }
  }
}

TEST_P(Gemm, sums_weight_gradients_over_the_rows_of_a_group) {
  Pool pool(2);
  for (const GemmShape& shape : odd_shapes()) {
    EXPAR_TRACE(kernels(), shape);
    const GemmProblem problem(shape);
    problem.check_tn(problem.tn(kernels(), pool), {});
    problem.check_tn(problem.tn(kernels(), pool, {.with_bias = false}), {.with_bias = false});
  }
}

/// All results of a problem as one string of bytes.
std::string bytes_of(const GemmProblem& problem, const Kernels& kernels, Pool& pool) {
  std::string all;
  for (const bool flag : {false, true}) {
    const GemmOptions o{.packed = flag, .out = flag ? problem.shape.dtype : DType::f32};
    const auto gradient = problem.tn(kernels, pool, o);
    all += problem.nt(kernels, pool, o).bytes() + problem.nn(kernels, pool, o).bytes() + gradient.dw.bytes() +
           gradient.dbias.bytes();
  }
  return all;
}

TEST_P(Gemm, gives_the_same_bits_for_any_number_of_threads) {
  Pool one(1), two(2), three(3);
  for (const GemmShape& shape : odd_shapes()) {
    EXPAR_TRACE(kernels(), shape);
    const GemmProblem problem(shape);
    const std::string bytes = bytes_of(problem, kernels(), one);
    EXPECT_TRUE(bytes == bytes_of(problem, kernels(), two));
    EXPECT_TRUE(bytes == bytes_of(problem, kernels(), three));
  }
}

TEST_P(Gemm, gives_the_same_bits_for_packed_and_plain_weights) {
  Pool pool(2);
  for (const GemmShape& shape : odd_shapes()) {
    EXPAR_TRACE(kernels(), shape);
    const GemmProblem problem(shape);
    EXPECT_TRUE(problem.nt(kernels(), pool, {.packed = false}).bytes() ==
                problem.nt(kernels(), pool, {.packed = true}).bytes());
  }
}

TEST_P(Gemm, gives_the_same_bits_for_any_number_of_rows) {
  Pool pool(1);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const GemmProblem problem({dtype, 67, 131, {77}, true});
    EXPAR_TRACE(kernels(), problem.shape);
    const std::int64_t n = problem.shape.n, k = problem.shape.k;
    const auto row_bytes = [](const Operand& o, std::int64_t i, std::int64_t width) {
      return o.bytes().substr(static_cast<std::size_t>(i * width) * 4, static_cast<std::size_t>(width) * 4);
    };
    for (const bool packed : {false, true}) {
      const Operand y = problem.nt(kernels(), pool, {.packed = packed});
      const Operand dx = problem.nn(kernels(), pool);
      for (std::int64_t first = 0; first < 77; first += 1 + first % 5) {
        for (const std::int64_t rows : {1, 2, 9, 17}) {
          if (first + rows > 77) continue;
          GemmProblem part({dtype, n, k, {77}, true});
          part.offsets = {0, rows};
          part.shape.rows = {rows};
          part.refs.assign(problem.refs.begin() + first, problem.refs.begin() + first + rows);
          for (std::int64_t i = 0; i < rows * n; ++i) part.dy.set(i, problem.dy[first * n + i]);
          const Operand part_y = part.nt(kernels(), pool, {.packed = packed});
          const Operand part_dx = part.nn(kernels(), pool);
          for (std::int64_t i = 0; i < rows; ++i) {
            ASSERT_EQ(row_bytes(part_y, i, n), row_bytes(y, first + i, n)) << "row " << first + i;
            ASSERT_EQ(row_bytes(part_dx, i, k), row_bytes(dx, first + i, k)) << "row " << first + i;
          }
        }
      }
    }
  }
}

TEST_P(Gemm, does_not_depend_on_the_callers_mode_which_is_kept) {
  Pool pool(1);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const GemmProblem problem({dtype, 66, 37, {5, 20}, true});
    expect_the_same_in_every_mode([&] { return bytes_of(problem, kernels(), pool); });
  }
}

TEST(GemmIsas, all_give_the_same_bits) {
  Pool pool(2);
  const auto isas = cpu_kernels();
  for (const GemmShape& shape : odd_shapes()) {
    const GemmProblem problem(shape);
    const std::string bytes = bytes_of(problem, *isas.back(), pool);
    for (const Kernels* kernels : isas) {
      EXPAR_TRACE(*kernels, shape);
      EXPECT_TRUE(bytes == bytes_of(problem, *kernels, pool));
      if (!shape.gathered) continue;
      EXPECT_TRUE(problem.nt(*kernels, pool, {.weighted_bias = true}).bytes() ==
                  problem.nt(*isas.back(), pool, {.packed = true, .weighted_bias = true}).bytes());
    }
  }
}

// Measured once: processors of different kinds must give the same bits, too.
TEST(GemmIsas, give_the_bits_of_all_processors) {
  Pool pool(1);
  std::string bytes;
  for (const GemmShape& shape : odd_shapes(kAllLengths)) {
    bytes += bytes_of(GemmProblem(shape), *cpu_kernels().front(), pool);
  }
  EXPECT_EQ(hash_of(bytes), 7193453040763265200u);
}

// Products far below the smallest normal, and sums that cross it.
TEST(GemmIsas, all_flush_denormals_alike) {
  Pool pool(1);
  const auto isas = cpu_kernels();
  for (const DType dtype : {DType::f32, DType::bf16}) {
    GemmProblem problem({dtype, 66, 37, {5, 20}, true});
    std::mt19937 bits(7);
    for (Operand* o : {&problem.x[0], &problem.x[1], &problem.w, &problem.dy}) {
      for (std::int64_t i = 0; i < o->count(); ++i) {
        o->set(i, std::ldexp((*o)[i], -58 - static_cast<int>(bits() % 12)));
      }
      if (o->count() > 3) o->set(3, std::ldexp(1.0F, -130));
      if (o->count() > 9) o->set(9, std::ldexp(1.0F, 127));
    }
    const std::string bytes = bytes_of(problem, *isas.back(), pool);
    for (const Kernels* kernels : isas) {
      EXPAR_TRACE(*kernels, problem.shape);
      EXPECT_TRUE(bytes == bytes_of(problem, *kernels, pool));
    }
  }
}

}  // namespace
}  // namespace expar
