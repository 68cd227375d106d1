// Chooses K experts per token and says how much each counts.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include <expar/context.h>

namespace expar {

/// What to do with a logit that is NaN or infinite.
enum class NanPolicy : std::uint8_t { error, propagate };

/// How a logit z becomes a score.
enum class Score : std::uint8_t {
  softmax,        // over all experts; renormalised it is the softmax over the chosen ones (GPT-OSS)
  sigmoid,        // 1 / (1 + exp(-z))
  sqrt_softplus,  // sqrt(log(1 + exp(z)))
};

/// Who says which K experts a token goes to.
enum class Choice : std::uint8_t {
  scores,       // the largest scores, the selection bias added, in the best groups
  logits,       // the largest logits: they still differ where a sigmoid rounds to 1 (Llama 4)
  token_table,  // a table by token id, whatever the scores are (Roller et al. 2021; DeepSeek-V4's first layers)
  round_robin,  // slot k of token t goes to expert (t K + k) mod E: what perfect balance would cost
  /// The largest of exp(logits), scaled until experts share the global batch evenly (Clark et al. 2022; Megatron). In
  /// training: at inference a layer goes by the plain logits.
  sinkhorn,
  /// Each expert takes the ceil(T K / E) tokens with the highest Routing::scores for it, ties to the earlier, T of the
  /// global batch: a token has from 0 to E experts (Zhou et al. 2022). At inference too, so that a token's output
  /// depends on all others of the call, later ones included: such a model is not causal.
  experts,
};

/// Whether a choice looks at the tokens of all ranks. The global batch is then that of one call, padding left out, and
/// the choice does not depend on P. There are no groups, selection bias or balancing losses.
constexpr bool is_collective(Choice choice) { return choice == Choice::sinkhorn || choice == Choice::experts; }

struct RouterOptions {
  std::int64_t experts = 0;  // E
  std::int64_t topk = 0;     // K <= E
  Score score = Score::softmax;
  Choice choice = Choice::scores;
  /// Divide the K chosen scores by their sum (+ 1e-20). Off: the plain scores.
  bool renormalise = true;
  float scaling = 1.0F;  // the weights are multiplied by it at last
  /// Experts e E / groups ... belong to group e; a token chooses among the experts of its `groups_used` best groups. A
  /// group is as good as its best score or, with a selection bias, as the sum of its two best (DeepSeek-V2 and -V3).
  std::int64_t groups = 1, groups_used = 1;
  std::int64_t vocabulary = 0;    // V, rows of the token table
  bool selection_bias = false;    // [E] is added to the scores for the choice alone (Wang et al. 2024)
  bool bias = false;              // [E] is added to the logits and trained; by the layer
  float jitter = 0.0F;            // in training the layer multiplies what the router reads by U(1 - jitter, 1 + jitter)
  bool double_scores = false;     // choose and weigh in double; off: round each score to f32 first
  float balance = 0.0F;           // coefficient of the balancing loss; 0.01 is usual
  float z = 0.0F;                 // coefficient of the z-loss; 0.001 is usual
  float sequence_balance = 0.0F;  // coefficient of the balancing loss of each sequence; 0.0001 is DeepSeek-V3's
  float importance = 0.0F;        // coefficients of the other losses of RouterLosses
  float importance_cv = 0.0F;
  float load = 0.0F;
  float load_deviation = 0.0F;  // of the noise that `load` supposes on a score
  NanPolicy nan = NanPolicy::error;
};

/// Slots per token: K, or E where experts choose; slots that nobody takes are -1.
constexpr std::int64_t slots_of(const RouterOptions& options) {
  return options.choice == Choice::experts ? options.experts : options.topk;
}

/// Throws Error: bad_argument (a number out of its range, options that contradict each other), naming the value.
void validate(const RouterOptions& options);

/// The router of a family of models: mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, gpt_oss, llama4;
/// or sinkhorn, with Megatron's weights (a sigmoid of one expert, else the softmax over all), and expert_choice.
/// DeepSeek's groups are those of its 160 and 256 experts; with other numbers there are none. Llama 4's weights count
/// on the experts' input, which is theirs to do: MoeLayerOptions::weights_on. Throws Error: bad_argument (an unknown
/// name, with the list of them).
RouterOptions router_preset(std::string_view name, std::int64_t experts, std::int64_t topk);
std::span<const std::string_view> router_presets();

/// What a router may need beside the logits. Absent: not given.
struct RouteInputs {
  ConstTensor selection_bias = {};  // [E] f32, where the options have one
  ConstTensor mask = {};            // [T] int8: 0 is padding, which goes nowhere and counts nowhere
  ConstTensor tokens = {};          // [T] int32: token ids, for a token table
  ConstTensor token_table = {};     // [V, K] int32: the experts of each token id
  ConstTensor ids = {};  // [T, K] int32 in [-1, E): go where a Routing went before; weights are of today's scores
  std::int64_t first_token = 0;  // how many tokens that are no padding earlier ranks have, for round_robin
};

/// What the router decided for T tokens, and what its backward pass needs. Reuse one object: it keeps its memory.
/// Rows of padding have ids -1 and zeros elsewhere. K stands for slots_of(options).
struct Routing {
  Tensor ids;              // [T, K] int32, best first, ties to the lower expert; -1: no expert
  Tensor weights;          // [T, K] f32
  Tensor scores;           // [T, E] f32
  Tensor choice_scores;    // [T, E] f32, what the choice compared, biases included, -inf outside the token's groups; of
                           // plain scores, and where nothing was compared, the scores themselves
  Tensor loss_scores;      // [T, E] f32, scores over their sum: what losses count; of softmax the scores themselves
  Tensor probabilities;    // [T, E] f32, softmax of the logits; of softmax the scores themselves
  Tensor top;              // [T, K] f32, the chosen scores before renormalisation
  Tensor logsumexp;        // [T] f32, of the logits
  Tensor mask;             // [T] int8, or absent: no token is padding
  std::int64_t valid = 0;  // tokens that are no padding
  Buffer memory, scratch;
};

/// Scores, then K experts per token and their weights (Shazeer et al. 2017; Fedus et al. 2021; DeepSeek-V3 2024).
///   logits  : [T, E] f32, this rank's tokens
/// Collective where is_collective(options.choice) and no ids are given; then every rank throws the error of the lowest
/// rank that found one, and the communicator stays usable.
/// Throws Error: bad_argument (shape or dtype; an input that is missing or of no use; with nan = error also
/// "logits[3,5] is nan"); where it is collective also no_memory, mismatch, timeout, peer_lost, internal.
/// Cost: one pass over the logits. A collective choice meets once, in which every rank reads the rows [E] f32 of all
/// tokens, and then works through all of them, each rank the same: for sinkhorn two multiplications per number and
/// round (some ten rounds, at most 1000), for experts one selection per column; ten milliseconds for 8,192 tokens of 64
/// experts.
void route(const Context& context, const RouterOptions& options, ConstTensor logits, Routing& routing,
           const RouteInputs& inputs = {});

/// How the selection bias follows the loads.
enum class BiasRule : std::uint8_t {
  sign,     // b_i += rate * sign(mean(c) - c_i)                    (Wang et al. 2024)
  centred,  // the same, less the mean of these steps over experts  (torchtitan)
};

/// One step of the selection bias [E] f32 towards even loads. Not collective: equal counts give equal biases.
///   counts : [E] slots per expert over the global batch of an optimizer step; not of evaluations, and each once
/// Throws Error: bad_argument (shapes; a rate that is no number from 0).
void update_selection_bias(Tensor bias, std::span<const std::int64_t> counts, float rate,
                           BiasRule rule = BiasRule::sign);

/// Over the global batch of T tokens (all that the context's ranks hold of this call, padding left out), of whose T K
/// slots c_i went to expert i, with p = Routing::loss_scores, I_i = sum_t p[t, i], and Var unbiased:
///   balance          = coefficient * E * sum_i (c_i / (T K)) * mean_t p[t, i]      (Fedus et al. 2021, eq. 4)
///   sequence_balance = the same of each sequence, mean over sequences              (DeepSeek-V3 2024, eq. 17)
///   importance       = coefficient * Var(I) / E^2
///   importance_cv    = coefficient * Var(I) / (mean(I)^2 + 1e-10)                  (Shazeer et al. 2017, eq. 7)
///   load             = the same of L_i = sum_t Phi((p[t, i] - p[t, last chosen]) / load_deviation)        (eq. 10)
///   z                = coefficient * mean_t logsumexp[t]^2                         (Zoph et al. 2022, eq. 5)
/// Perfectly balanced, the first two are their coefficients, importance, importance_cv and load are 0; of logits that
/// are all 0, z is its coefficient times log(E)^2. Only importance grows with T, by T^2.
struct RouterLosses {
  float balance = 0.0F;
  float sequence_balance = 0.0F;
  float importance = 0.0F, importance_cv = 0.0F;
  float load = 0.0F;
  float z = 0.0F;
  std::int64_t tokens = 0;           // T of the global batch
  std::vector<float> load_fraction;  // [E] c_i / (T K), with what was given so far
  /// c_i and T with what was given so far: what LossInputs of the next micro-batch takes, and at the end of the
  /// optimizer step update_selection_bias.
  std::vector<std::int64_t> counts_so_far;
  std::int64_t tokens_so_far = 0;

  // The gradient of all that, as route_backward reads it. Most losses are linear in a score, so that all tokens of a
  // segment have the same gradient.
  std::vector<std::int64_t> segments;  // [n + 1] ascending from 0 to this rank's tokens; empty: no losses by scores
  std::vector<float> dscores;          // [n, E] by a score of a token of the segment
  float dlogsumexp = 0.0F;             // by a token's logsumexp, over that logsumexp
};

/// The coefficient for RouterOptions::balance that weighs as much as `router_aux_loss_coef` of Hugging Face, whose
/// fractions sum to K and not to 1. It takes one loss of the means over all layers where expar adds up each layer's:
/// for the same weight in a model of several, divide by their number.
float balance_from_hugging_face(float coefficient, std::int64_t topk);

/// What the losses may count besides the tokens of this call.
struct LossInputs {
  /// [Q + 1] from 0 to T, ascending: this rank's sequences, of which none lies on two ranks. Empty: each shard is one.
  std::span<const std::int64_t> sequences = {};
  /// With gradient accumulation: of the micro-batches before this one, [E] slots and the tokens that they belong to.
  /// `balance` then takes c_i / (T K) over all of them, as if they were one batch, and the scores of this call.
  std::span<const std::int64_t> counts_so_far = {};
  std::int64_t tokens_so_far = 0;
};

/// `shards` splits this rank's tokens into the micro-shards of the global batch: [S + 1] ascending from 0 to T. Means
/// are summed shard by shard over all ranks, so that they do not depend on which rank holds a shard.
///   counts : [E] slots per expert over the global batch (Plan::expert_totals, or Capacity::chosen)
/// Sequences count the slots of Routing::ids. Nothing depends on P.
/// Collective. Throws Error: bad_argument (shapes, shards, sequences or options), no_memory, mismatch, timeout,
/// peer_lost: the same on every rank, as all_reduce.
/// Cost: one all_reduce of a row of E numbers per shard, of 2 E with `load`; with `sequence_balance` a second one.
RouterLosses router_losses(const Context& context, const RouterOptions& options, const Routing& routing,
                           std::span<const std::int64_t> counts, std::span<const std::int64_t> shards,
                           const LossInputs& inputs = {});

/// dlogits [T, E] f32 of (weights . dweights) + losses: their segments, dscores and dlogsumexp.
///   dweights : [T, K] f32, the gradient of the weights; 0 where a slot was dropped
/// Not collective. Throws Error: bad_argument (shapes or dtypes, also of routing and losses). Cost: one pass over the
/// scores.
void route_backward(const Context& context, const RouterOptions& options, const Routing& routing,
                    const RouterLosses& losses, ConstTensor dweights, Tensor dlogits);

}  // namespace expar
