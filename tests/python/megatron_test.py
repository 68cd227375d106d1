"""expar's router, losses and capacity beside Megatron's own functions, on the same logits: megatron_test.py CLIENT."""

import os
import subprocess
import sys
import tempfile
import unittest
import warnings
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
try:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
except Exception as error:
    sys.exit(f"megatron_test: Megatron's functions cannot be imported without a GPU: {error!r}. "
             "Pin another megatron-core in tests/python/requirements_torch.txt.")

CLIENT = sys.argv[1]
EXPERTS, SEQUENCES, LENGTH = 12, 4, 15
TOKENS = SEQUENCES * LENGTH


def drawn(seed, *shape, deviation=1.0):
    return deviation * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOGITS = drawn(1, TOKENS, EXPERTS, deviation=1.5)
LOGITS[:, 2] += 1  # an expert that many tokens want
BIAS = drawn(2, EXPERTS, deviation=0.3)
DWEIGHTS = drawn(3, TOKENS, EXPERTS)

# A rounding to f32 changes a number by UNIT of itself at most. That of z - max counts z - max times in its exp; each
# term of the sums over all and over chosen experts once; exp, divisions, scaling and storing make eight more. All that
# may go one way in expar and the other way in Megatron.
UNIT = 2.0**-24
ROUNDINGS = 2 * (float(LOGITS.max() - LOGITS.min()) + 2 * EXPERTS + 8)

# Megatron's arguments and expar's options. Megatron takes a group for the sum of its topk / group_topk best, whatever
# the scores are; expar for the sum of two with a bias and for the best one without: as many as are chosen here.
ROUTERS = {
    "softmax after": (dict(topk=3), dict()),
    "softmax after, in groups": (dict(topk=2, num_groups=4, group_topk=2), dict(groups=4, groups_used=2)),
    "softmax before": (dict(topk=3, use_pre_softmax=True), dict(renormalise=0)),
    "softmax before, in groups": (dict(topk=3, use_pre_softmax=True, num_groups=4, group_topk=3, scaling_factor=16.0),
                                  dict(renormalise=0, groups=4, groups_used=3, scaling=16.0)),
    "sigmoid": (dict(topk=3, score_function="sigmoid", scaling_factor=1.5), dict(score="sigmoid", scaling=1.5)),
    # Megatron never divides a single sigmoid by itself.
    "sigmoid of one": (dict(topk=1, score_function="sigmoid"), dict(score="sigmoid", renormalise=0)),
    "sigmoid, biased": (dict(topk=3, score_function="sigmoid", expert_bias=BIAS),
                        dict(score="sigmoid", selection_bias=BIAS)),
    "sigmoid, biased, in groups": (
        dict(topk=4, score_function="sigmoid", expert_bias=BIAS, num_groups=4, group_topk=2, scaling_factor=2.5),
        dict(score="sigmoid", selection_bias=BIAS, groups=4, groups_used=2, scaling=2.5)),
}


def by_expert(ids, values):
    """[T, K] as Megatron has it: [T, E], zero where an expert was not chosen."""
    slots = torch.zeros(len(ids), EXPERTS + 1).scatter(1, (ids.long() + EXPERTS + 1) % (EXPERTS + 1), values)
    return slots[:, :EXPERTS]


def chosen(ids):
    return by_expert(ids, torch.ones(ids.shape)).bool()


def interleaved(rows):
    """Of tokens [sequences, length], as expar has them, the order of Megatron: [length, sequences]."""
    return rows.reshape(SEQUENCES, LENGTH, EXPERTS).transpose(0, 1).reshape(TOKENS, EXPERTS)


def router_of(topk, coefficient):
    """What Megatron's methods need of a router, whose losses they then return."""
    world = torch.distributed.group.WORLD
    return SimpleNamespace(
        topk=topk, training=True, tp_cp_group=world, tp_dp_cp_group=world, global_tokens_per_expert=0, ga_steps=0,
        config=SimpleNamespace(num_moe_experts=EXPERTS, moe_router_fusion=False, moe_aux_loss_coeff=0),
        get_aux_loss_coeff=lambda name: coefficient,
        attach_and_log_load_balancing_loss=lambda probs, coefficient, loss, *_, **__: loss)


class Megatron(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        # Some of the functions sum over ranks: over this one.
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        parallel_state.initialize_model_parallel()

    @classmethod
    def tearDownClass(cls):
        torch.distributed.destroy_process_group()

    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.path = lambda name: os.path.join(directory.name, name)

    def expar(self, logits=LOGITS, **given):
        tensors = {name: value.contiguous() for name, value in given.items() if torch.is_tensor(value)}
        options = {name: str(value) for name, value in given.items() if not torch.is_tensor(value)}
        save_file({"logits": logits, **tensors}, self.path("in"), metadata=options)
        subprocess.run([CLIENT, self.path("in"), self.path("out")], check=True)
        return SimpleNamespace(**load_file(self.path("out")))

    def assert_gradients_close(self, ours, theirs, topk, largest):
        # Products of at most four numbers that are off by ROUNDINGS, less a mean of such over the chosen or over all,
        # which is a sum of that many. `largest` bounds what comes from behind the scores, which make it no larger.
        atol = (4 * ROUNDINGS + EXPERTS + topk + 3) * UNIT * 2 * largest
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)

    def test_chooses_and_weighs_as_expar_does(self):
        for name, (arguments, options) in ROUTERS.items():
            with self.subTest(router=name):
                logits = LOGITS.clone().requires_grad_()
                probs, routed = moe_utils.topk_routing_with_score_function(logits, **arguments)
                (probs * DWEIGHTS).sum().backward()
                ours = self.expar(topk=arguments["topk"], dweights=DWEIGHTS, **options)
                torch.testing.assert_close(chosen(ours.ids), routed, rtol=0, atol=0)
                torch.testing.assert_close(by_expert(ours.ids, ours.weights), probs.detach(), rtol=ROUNDINGS * UNIT,
                                           atol=0)
                largest = options.get("scaling", 1.0) * float(DWEIGHTS.abs().max())
                self.assert_gradients_close(ours.dlogits, logits.grad, arguments["topk"], largest)

    def test_replays_routes_as_expar_does(self):
        # Of other logits; the weights are of today's.
        arguments, options = ROUTERS["sigmoid"]
        ids = self.expar(LOGITS.flip(0), topk=3, **options).ids
        replay = RouterReplay()
        replay.set_target_indices(ids.long())
        replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        probs, routed = moe_utils.topk_routing_with_score_function(LOGITS, router_replay=replay, **arguments)
        ours = self.expar(topk=3, ids=ids, **options)
        self.assertTrue(torch.equal(chosen(ours.ids), routed))
        torch.testing.assert_close(by_expert(ours.ids, ours.weights), probs, rtol=ROUNDINGS * UNIT, atol=0)

    def losses(self, name, padding):
        """Megatron's three losses of a router, with their gradients, and expar's."""
        arguments, options = ROUTERS[name]
        topk = arguments["topk"]
        coefficients = dict(balance=0.5, sequence_balance=2.0, z=0.25)
        logits = LOGITS.clone().requires_grad_()
        routed, scores = moe_utils.compute_routing_scores_for_aux_loss(
            logits, topk, arguments.get("score_function", "softmax"), padding_mask=padding)
        masked = padding is not None
        theirs = [
            TopKRouter._apply_aux_loss(router_of(topk, coefficients["balance"]), None, scores, routed, masked),
            TopKRouter._apply_seq_aux_loss(router_of(topk, coefficients["sequence_balance"]), None,
                                           interleaved(scores), interleaved(routed), LENGTH, SEQUENCES, masked),
            moe_utils.z_loss_func(logits, coefficients["z"], padding_mask=padding)]
        sum(theirs).backward()
        mask = dict(mask=(~padding).to(torch.int8)) if masked else {}
        ours = self.expar(topk=topk, sequences=torch.arange(SEQUENCES + 1) * LENGTH, **coefficients, **options, **mask)
        valid = int((~padding).sum()) if masked else TOKENS
        lse = float(torch.logsumexp(LOGITS, 1).abs().max())
        share = float(routed.reshape(SEQUENCES, LENGTH, EXPERTS).sum(1).max()) / (valid / SEQUENCES * topk)
        largest = (EXPERTS * share * (coefficients["balance"] + coefficients["sequence_balance"])
                   + 2 * coefficients["z"] * lse) / valid
        # Sums of TOKENS numbers, none negative. A logsumexp is off by ROUNDINGS, its square by as many times 2 lse.
        torch.testing.assert_close(ours.losses, torch.stack(theirs).detach(), rtol=2 * (ROUNDINGS + TOKENS) * UNIT,
                                   atol=2 * lse * ROUNDINGS * UNIT * coefficients["z"])
        self.assert_gradients_close(ours.dlogits, logits.grad, topk, largest)

    # Megatron's losses count the choice without groups and bias, expar's where tokens went: the same for these.
    UNBIASED = "softmax after", "softmax before", "sigmoid"

    def test_has_the_losses_of_expar(self):
        for name in self.UNBIASED:
            with self.subTest(router=name):
                self.losses(name, None)

    def test_has_the_losses_of_expar_beside_padding(self):
        # Megatron divides each sequence by the mean of their lengths, expar by its own: as many tokens of each here.
        padding = torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)
        for sequence in range(SEQUENCES):
            padding[sequence, [sequence, 5, 14 - sequence]] = True
        for name in self.UNBIASED:
            with self.subTest(router=name):
                self.losses(name, padding.flatten())

    def test_balances_over_the_micro_batches_of_a_step_as_expar_does(self):
        # Megatron takes the mean of the counts and this micro-batch's tokens: batches of one size agree.
        arguments, options = ROUTERS["sigmoid"]
        router = router_of(topk=3, coefficient=0.5)
        so_far = {}
        for logits in LOGITS, drawn(4, TOKENS, EXPERTS), drawn(5, TOKENS, EXPERTS, deviation=2.0):
            routed, scores = moe_utils.compute_routing_scores_for_aux_loss(logits, 3, "sigmoid")
            theirs = TopKRouter._apply_global_aux_loss(router, None, scores, routed)
            ours = self.expar(logits, topk=3, balance=0.5, **options, **so_far)
            torch.testing.assert_close(ours.losses[0], theirs, rtol=2 * (ROUNDINGS + TOKENS) * UNIT, atol=0)
            so_far = dict(counts_so_far=router.global_tokens_per_expert.clone(),
                          tokens_so_far=int(router.ga_steps) * TOKENS)

    def test_balances_by_sinkhorn_as_expar_does(self):
        plan = moe_utils.sinkhorn(LOGITS.double())
        for topk in 1, 2:
            with self.subTest(topk=topk):
                logits = LOGITS.clone().requires_grad_()
                probs, routed = TopKRouter.sinkhorn_load_balancing(router_of(topk, 0), logits)
                (probs * DWEIGHTS).sum().backward()
                ours = self.expar(topk=topk, choice="sinkhorn", score="sigmoid" if topk == 1 else "softmax",
                                  renormalise=0, dweights=DWEIGHTS)
                self.assertTrue(torch.equal(chosen(ours.ids), routed))
                torch.testing.assert_close(by_expert(ours.ids, ours.weights), probs.detach(), rtol=ROUNDINGS * UNIT,
                                           atol=0)
                self.assert_gradients_close(ours.dlogits, logits.grad, topk, float(DWEIGHTS.abs().max()))
                # What was compared is the plan's logarithm, less a number for each token, stored in f32. Both add
                # 1e-8 to sums that are above 0.01, of rows that expar has scaled, in less than ten rounds.
                values = ours.choice_scores.double()
                torch.testing.assert_close(torch.softmax(values, 1), plan / plan.sum(1, keepdim=True), atol=0,
                                           rtol=2 * UNIT * float(values.abs().max()) + 10 * 1e-8 / 0.01)

    def test_has_the_capacity_of_expar(self):
        # 60 * 3 / 12 * 2.2 is 33 in double, but 60 * 3 * 2.2 / 12 is above it.
        for tokens, topk, factor in ((60, 3, 1.0), (60, 3, 2.2), (59, 3, 1.1), (60, 2, 0.7), (7, 1, 1.25), (1, 3, 0.1),
                                     (60, 1, 1.2), (60, 4, 0.05), (53, 5, 1 / 3)):
            with self.subTest(tokens=tokens, topk=topk, factor=factor):
                ours = self.expar(LOGITS[:tokens], topk=topk, policy="drop_by_position", factor=factor)
                self.assertEqual(ours.rows.item(), moe_utils.get_capacity(tokens * topk, EXPERTS, factor))

    # Megatron drops by weight and expar by score, which are the same without renormalisation.
    PLAIN = "softmax before", "softmax before, in groups", "sigmoid of one"

    def test_drops_by_score_what_expar_drops(self):
        for name in self.PLAIN:
            for factor in 0.3, 0.8, 1.3:
                with self.subTest(router=name, factor=factor):
                    arguments, options = ROUTERS[name]
                    topk = arguments["topk"]
                    probs, routed = moe_utils.topk_routing_with_score_function(LOGITS, **arguments)
                    probs, left = moe_utils.apply_router_token_dropping(probs, routed, topk, factor, "probs")
                    self.assertLess(left.sum(), routed.sum())
                    ours = self.expar(topk=topk, policy="drop_by_score", factor=factor, **options)
                    self.assertTrue(torch.equal(chosen(ours.kept_ids), left))
                    torch.testing.assert_close(by_expert(ours.kept_ids, ours.kept_weights), probs,
                                               rtol=ROUNDINGS * UNIT, atol=0)

    def test_drops_by_position_what_expar_drops(self):
        for name, (arguments, options) in ROUTERS.items():
            for factor in 0.3, 0.8:
                with self.subTest(router=name, factor=factor):
                    topk = arguments["topk"]
                    probs, routed = moe_utils.topk_routing_with_score_function(LOGITS, **arguments)
                    ours = self.expar(topk=topk, policy="drop_by_position", factor=factor, **options)
                    kept = chosen(ours.kept_ids)
                    # Its function for that leaves it to torch.topk which of the ones count as the largest: how many
                    # stay is certain. Its permute() takes the first: those that stay are the same.
                    left = moe_utils.apply_router_token_dropping(probs, routed, topk, factor, "position")[1]
                    self.assertLess(left.sum(), routed.sum())
                    self.assertTrue(torch.equal(kept.sum(0), left.sum(0)))
                    capacity = moe_utils.get_capacity(TOKENS * topk, EXPERTS, factor)
                    tokens = moe_utils.permute(torch.zeros(TOKENS, 1), routed, num_out_tokens=capacity * EXPERTS,
                                               drop_and_pad=True)[2].view(EXPERTS, capacity)
                    first = torch.zeros(EXPERTS, TOKENS, dtype=torch.bool).scatter(1, tokens, True).T & routed
                    self.assertTrue(torch.equal(kept, first))
                    torch.testing.assert_close(by_expert(ours.kept_ids, ours.kept_weights), probs * first,
                                               rtol=ROUNDINGS * UNIT, atol=0)

    def test_steps_the_bias_as_expar_does(self):
        arguments, options = ROUTERS["sigmoid, biased"]
        level = 0  # experts that stay where they are
        for seed in range(5):
            bias = drawn(seed, EXPERTS, deviation=0.3)
            with self.subTest(bias=bias):
                _, routed = moe_utils.topk_routing_with_score_function(LOGITS, **{**arguments, "expert_bias": bias})
                counts = routed.sum(0).float()
                level += int((counts == counts.mean()).sum())
                theirs = moe_utils.get_updated_expert_bias(counts, bias, 1e-3)
                ours = self.expar(topk=arguments["topk"], rate=1e-3, **{**options, "selection_bias": bias})
                self.assertTrue(torch.equal(ours.stepped_bias, theirs))  # one sum of two numbers, rounded once
        self.assertGreater(level, 0)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
