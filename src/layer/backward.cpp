// A layer's backward pass, along the plan of the forward one.
#include <cstring>
#include <string>

#include "src/layer/agree.h"
#include "src/layer/convert.h"
#include "src/layer/state.h"

namespace expar {
namespace {

/// One backward pass, step by step.
class BackwardPass {
 public:
  BackwardPass(MoeLayer::State& layer, const Context& context, MoeRecord& record, ConstTensor dout)
      : layer_(layer),
        context_(context),
        record_(record),
        kept_(kept_of(record)),
        dout_(dout),
        workspace_(layer.workspaces.borrow()) {}

  void run(Tensor dx);

 private:
  bool recomputes() const { return layer_.options.recompute; }
  Inbox dispatch_gradients(Tensor dx);
  void differentiate_own_part();
  void differentiate_experts(const Inbox& gradients);
  ConstTensor differentiate_router();

  MoeLayer::State& layer_;
  Context context_;
  MoeRecord& record_;
  MoeRecord::Kept& kept_;
  ConstTensor dout_;
  Workspaces::Loan workspace_;
  Tensor own_dx_;  // [T, H] f32, of what each rank computed for its own tokens; absent: nothing
  Outbox dx_rows_, dweights_rows_;
  Tensor dweights_;  // [T, K, 1] f32
};

void BackwardPass::run(Tensor dx) {
  const Inbox gradients = dispatch_gradients(dx);
  alone(context_, [&] { differentiate_experts(gradients); });
  fetch_slots(context_, record_.plan, dweights_rows_, dweights_);
  layer_.slices.sum(dweights_);
  // The router's part of dx is rounded to dtype and then added last to the experts' rows: an order that is the same
  // for every P.
  CombineOptions added{.sum_over = layer_.options.tensor};
  alone(context_, [&] {
    const Phase part(context_.trace(), "route");
    added.residual = differentiate_router();
    added.shared = own_dx_;
  });
  const Phase part(context_.trace(), "combine");
  combine(context_, record_.plan, dx_rows_, unweighted, dx, added);
}

/// Between start and end the part of dx of this rank's own tokens is computed.
Inbox BackwardPass::dispatch_gradients(Tensor dx) {
  DispatchOptions options;
  options.lists_of = &kept_.inbox;
  options.payload = layer_.options.gradient_payload;
  context_ = context_.attempt([&] {
    layer_.check_trains();
    if (!record_.plan) throw Error(ErrorCode::bad_argument, "the record holds no forward pass for training");
    layer_.check_context(context_);
    layer_.check_rows("dout", dout_, kept_.x.size(0));
    layer_.check_rows("dx", dx, kept_.x.size(0));
  });
  const Phase phase(context_.trace(), "dispatch");
  PendingDispatch rows = start_dispatch(context_, dout_, {}, record_.plan, options);
  if (layer_.has_own_part() && !context_.declines()) {
    const Phase part(context_.trace(), "shared experts");
    alone(context_, [&] { differentiate_own_part(); });
  }
  return rows.finish();
}

void BackwardPass::differentiate_own_part() {
  if (layer_.shares_here()) {
    const SharedWeights weights = layer_.parameters->shared();
    SharedRecord& made = recomputes() ? workspace_->shared : kept_.shared;
    if (recomputes()) layer_.shared.forward(context_, weights, kept_.x, record_.routing.mask, made);
    own_dx_ = layer_.shared.backward(context_, weights, record_, dout_, made);
  } else {
    own_dx_ = workspace_->special.view(DType::f32, kept_.x.shape());
    std::memset(own_dx_.data(), 0, own_dx_.byte_size());
  }
}

void BackwardPass::differentiate_experts(const Inbox& gradients) {
  const Phase part(context_.trace(), "experts");
  const Plan& plan = record_.plan;
  const std::int64_t hidden = layer_.options.hidden;
  const DType dtype = layer_.options.dtype;
  const ExpertWeights weights = layer_.parameters->plain();
  dx_rows_ = make_outbox(context_, plan, hidden, dtype);
  dweights_rows_ = make_outbox(context_, plan, 1, DType::f32);
  ExpertsRecord& made = recomputes() ? workspace_->record : kept_.experts;
  Outbox again;
  if (recomputes()) {
    again = make_outbox(context_, plan, hidden, dtype);
    experts_forward(context_, layer_.shape, weights, kept_.inbox, again, made);
  }
  experts_backward(context_, layer_.shape, weights, kept_.inbox, gradients, recomputes() ? again : kept_.y, made,
                   layer_.parameters->gradients(), &dx_rows_, dweights_rows_, workspace_->scratch);
  dweights_ = workspace_->dweights.view(DType::f32, {plan.tokens(), plan.topk(), 1});
}

/// Its part of dx; the special experts' part goes beside that of the shared ones.
ConstTensor BackwardPass::differentiate_router() {
  const Tensor by_slot(dweights_.data(), DType::f32, record_.routing.weights.shape());
  if (layer_.special) {
    Pool& pool = context_.pool();
    const ConstTensor x = in_f32(kept_.x, workspace_->wide, pool);
    const SpecialPass pass = layer_.special.pass(record_.routing, x, *layer_.parameters);
    const ConstTensor dout = in_f32(dout_, workspace_->wide_dout, pool);
    layer_.special.backward(context_, pass, kept_.shards, dout, own_dx_, by_slot);
  }
  return layer_.router.backward(context_, *layer_.parameters, record_, by_slot,
                                layer_.jitter_of(record_, record_.routing.mask));
}

}  // namespace

void MoeLayer::State::backward(const Context& c, MoeRecord& record, ConstTensor dout, Tensor dx) {
  const Phase phase(c.trace(), "backward", &times.backward);
  parameters->expect_step();
  BackwardPass(*this, c, record, dout).run(dx);
}

}  // namespace expar
