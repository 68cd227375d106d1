// Calls of the kernels that work element by element or row by row, with random operands.
#pragma once

#include <functional>

#include "tests/unit/kernels_testing.h"

namespace expar {

inline constexpr std::int64_t kWidths[] = {1, 2, 3, 15, 16, 17, 64, 130};

struct ActivationProblem {
  ActivationProblem(const NamedActivation& named, DType dtype_, std::int64_t rows_, std::int64_t inner_,
                    float range = 12)
      : name(named.name),
        act(named.activation),
        numbers(named.numbers),
        dtype(dtype_),
        rows(rows_),
        inner(inner_),
        columns(gated(act) ? 2 * inner_ : inner_),
        pre(Operand::random(dtype_, rows * columns, 11, range)),
        dh(Operand::random(dtype_, rows * inner, 12)) {}

  Operand forward(const Kernels& kernels, Pool& pool) const {
    Operand h(dtype, rows * inner);
    kernels.activate({act, numbers, rows, inner, dtype, pre.data(), h.data()}, pool);
    return h;
  }
  Operand backward(const Kernels& kernels, Pool& pool) const {
    Operand dpre(dtype, rows * columns);
    kernels.activate_grad({act, numbers, rows, inner, dtype, pre.data(), dh.data(), dpre.data()}, pool);
    return dpre;
  }

  std::string_view name;
  Activation act;
  ActivationNumbers numbers;
  DType dtype;
  std::int64_t rows, inner, columns;
  Operand pre, dh;
};

inline void for_activations(const std::function<void(const ActivationProblem&)>& body) {
  for (const NamedActivation& named : kActivations) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      for (const std::int64_t inner : kWidths) body({named, dtype, inner % 4, inner});
      body({named, dtype, 301, 67});
      body({named, dtype, 3, 400, 100});  // far into both tails
    }
  }
}

struct GatherProblem {
  GatherProblem(DType dtype_, std::int64_t count_, std::int64_t width_)
      : dtype(dtype_),
        count(count_),
        width(width_),
        other(Operand::random(dtype_, count_ * width_, 23)),
        weights(Operand::random(DType::f32, count_, 24)) {
    for (unsigned b = 0; b < 2; ++b) base[b] = Operand::random(dtype, (count + 1) * width, 21 + b, 3);
    for (std::int64_t i = 0; i < count; ++i) {
      refs.push_back({static_cast<std::int32_t>(i % 2), static_cast<std::int32_t>(i * 7 % count)});
    }
  }
  struct Out {
    Operand rows, dot;
  };
  Out run(const Kernels& kernels, Pool& pool, bool listed, bool scaled, bool dotted, bool copied = true) const {
    Out out{Operand(dtype, count * width), Operand(DType::f32, count)};
    kernels.gather({{{base[0].data(), base[1].data()}, dtype, width, listed ? refs.data() : nullptr},
                    count,
                    scaled ? weights.memory.as<float>() : nullptr,
                    copied ? out.rows.data() : nullptr,
                    dotted ? other.data() : nullptr,
                    dotted ? out.dot.f32() : nullptr},
                   pool);
    return out;
  }
  float at(std::int64_t i, std::int64_t h, bool listed) const {
    if (!listed) return base[0][i * width + h];
    const RowRef& ref = refs[static_cast<std::size_t>(i)];
    return base[ref.base][ref.row * width + h];
  }

  DType dtype;
  std::int64_t count, width;
  Operand base[2], other, weights;
  std::vector<RowRef> refs;
};

struct NormProblem {
  NormProblem(DType dtype_, std::int64_t tokens_, std::int64_t width_)
      : dtype(dtype_),
        tokens(tokens_),
        width(width_),
        x(Operand::random(dtype_, tokens * width, 41, 3)),
        gain(Operand::random(DType::f32, width, 42)) {}

  struct Out {
    Operand y, scale;
  };
  Out room() const { return {Operand(dtype, tokens * width), Operand(DType::f32, tokens)}; }
  NormOutput to(Out& out) const { return {gain.memory.as<float>(), epsilon, out.y.data(), out.scale.f32()}; }
  Out run(const Kernels& kernels, Pool& pool, const Operand& rows) const {
    Out out = room();
    kernels.rms_norm({tokens, width, dtype, rows.data(), to(out)}, pool);
    return out;
  }

  DType dtype;
  std::int64_t tokens, width;
  float epsilon = 1e-3F;
  Operand x, gain;
};

struct ReduceProblem {
  ReduceProblem(DType dtype_, std::int64_t tokens_, std::int64_t topk_, std::int64_t width_)
      : dtype(dtype_),
        tokens(tokens_),
        topk(topk_),
        width(width_),
        rows(Operand::random(dtype_, tokens * topk * width, 31)),
        weights(Operand::random(DType::f32, tokens * topk, 32)),
        residual(Operand::random(dtype_, tokens * width, 33)),
        shared(Operand::random(DType::f32, tokens * width, 34)),
        shared_weights(Operand::random(DType::f32, tokens, 35)) {
    for (std::int64_t i = 0; i < tokens * topk; ++i) {
      const auto offset = static_cast<std::size_t>(i * width) * size_of(dtype);
      slots.push_back(i % 5 == 3 ? nullptr : rows.memory.view().bytes() + offset);
    }
  }
  Operand run(const Kernels& kernels, Pool& pool, bool weighted, bool with_residual, bool with_shared = false) const {
    Operand out(dtype, tokens * width);
    kernels.reduce({tokens, topk, width, dtype, slots.data(), weighted ? weights.memory.as<float>() : nullptr,
                    with_shared ? shared.memory.as<float>() : nullptr,
                    with_shared && weighted ? shared_weights.memory.as<float>() : nullptr,
                    with_residual ? residual.data() : nullptr, out.data()},
                   pool);
    return out;
  }

  /// The same with the norm of each row that comes out.
  NormProblem::Out run_normed(const Kernels& kernels, Pool& pool, Operand& out) const {
    out = Operand(dtype, tokens * width);
    const NormProblem norm(dtype, tokens, width);
    NormProblem::Out normed = norm.room();
    kernels.reduce({.tokens = tokens,
                    .topk = topk,
                    .width = width,
                    .dtype = dtype,
                    .slots = slots.data(),
                    .residual = residual.data(),
                    .out = out.data(),
                    .norm = norm.to(normed)},
                   pool);
    return normed;
  }

  DType dtype;
  std::int64_t tokens, topk, width;
  Operand rows, weights, residual, shared, shared_weights;
  std::vector<const void*> slots;
};

struct TopK {
  TopK(const Kernels& kernels, Pool& pool, const Operand& logits, std::int64_t tokens, std::int64_t experts,
       std::int64_t topk)
      : scores(DType::f32, tokens * experts),
        logsumexp(DType::f32, tokens),
        top(DType::f32, tokens * topk),
        ids(static_cast<std::size_t>(tokens * topk), -7) {
    kernels.softmax_topk(
        {tokens, experts, topk, logits.memory.as<float>(), scores.f32(), logsumexp.f32(), ids.data(), top.f32()}, pool);
  }
  Operand scores, logsumexp, top;
  std::vector<std::int32_t> ids;
};

struct AdamProblem {
  explicit AdamProblem(std::int64_t count_)
      : count(count_),
        g(Operand::random(DType::f32, count, 51, 0.5F)),
        p(Operand::random(DType::f32, count, 52)),
        m(Operand::random(DType::f32, count, 53, 0.1F)),
        v(Operand::random(DType::f32, count, 54)),
        low(DType::bf16, count) {
    for (std::int64_t i = 0; i < count; ++i) v.set(i, std::abs(v[i]));
  }
  AdamWStep step() {
    return {count,
            0.01F,
            0.9F,
            0.999F,
            1e-8F,
            0.1F,
            0.271F,
            0.002997F,
            g.f32(),
            p.f32(),
            m.f32(),
            v.f32(),
            low.memory.as<bf16>()};
  }
  std::string bytes() const { return p.bytes() + m.bytes() + v.bytes() + low.bytes(); }

  std::int64_t count;
  Operand g, p, m, v, low;
};

}  // namespace expar
