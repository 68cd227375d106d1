"""Tokens visit experts on other ranks and come back, in NumPy.

    expar launch -n 4 -- python examples/python/dispatch.py     (or torchrun --no-python, mpirun, srun; or alone)
"""

import numpy as np

import expar

TOKENS, HIDDEN, EXPERTS, TOPK = 6, 4, 8, 2

context = expar.Context(expar.init())
random = np.random.default_rng(context.rank)
x = random.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
ids = random.integers(0, EXPERTS, (TOKENS, TOPK)).astype(np.int32)
weights = np.full((TOKENS, TOPK), 1 / TOPK, np.float32)

plan = expar.make_plan(context, ids, EXPERTS)
inbox = expar.dispatch(context, x, None, plan, layout="expert_major")

# Expert e multiplies by e.
y = expar.make_outbox(context, inbox, HIDDEN)
rows, results = np.asarray(inbox.packed), np.asarray(y.rows)
first, _ = plan.local
for expert, (begin, end) in enumerate(zip(plan.offsets[:-1], plan.offsets[1:]), start=first):
    results[begin:end] = expert * rows[begin:end]

out = np.empty_like(x)
expar.combine(context, plan, y, weights, out)
np.testing.assert_allclose(out, x * ids.mean(axis=1, keepdims=True), rtol=1e-6)
print(f"rank {context.rank} of {context.size}: {plan.received} rows for {len(plan.rows)} experts, {plan.unique} from other ranks")
