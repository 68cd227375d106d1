"""An MoE layer in plain PyTorch, token by token and in double precision: what expar's layer must compute."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

import expar


def activate(pre, activation):
    """h of one row."""
    alpha, limit, offset = {"clamped_swiglu": (1.702, 7.0, 1.0), "quick_geglu": (1.702, math.inf, 0.0)}.get(
        activation, (1.0, math.inf, 0.0)
    )
    if activation in ("swiglu", "clamped_swiglu", "quick_geglu", "geglu"):
        gate, up = pre.chunk(2)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        gated = F.gelu(gate) if activation == "geglu" else gate * torch.sigmoid(alpha * gate)
        return gated * (up + offset)
    return {"gelu": F.gelu, "silu": F.silu, "relu2": lambda v: F.relu(v) ** 2}[activation](pre)


def choose(context, options, logits, scores, selection_bias, mask):
    """[T, K] ids, by this page's own reckoning where a token decides alone."""
    if options.choice in ("sinkhorn", "experts"):
        routing = expar.Routing()
        expar.route(context, options, logits.float().contiguous(), routing)
        return torch.from_dlpack(routing.ids).long()
    by = logits if options.choice == "logits" else scores
    if selection_bias is not None:
        by = by + selection_bias
    if options.groups > 1:
        grouped = by.unflatten(1, (options.groups, -1))
        worth = grouped.topk(2).values.sum(2) if selection_bias is not None else grouped.amax(2)
        out_of_use = torch.ones_like(worth, dtype=torch.bool).scatter(1, worth.topk(options.groups_used).indices, False)
        by = grouped.masked_fill(out_of_use[:, :, None], -math.inf).flatten(1)
    ids = by.topk(options.topk).indices
    return ids if mask is None else ids.masked_fill(mask[:, None] == 0, -1)


def losses(options, scores, logits, ids, sequence):
    """The sum of the router's losses, of a batch without padding."""
    tokens, experts = scores.shape
    p = scores / scores.sum(1, keepdim=True)

    def balance(p, ids):
        counts = torch.bincount(ids.flatten()[ids.flatten() >= 0], minlength=experts)
        return experts * (counts / ids.numel() * p.mean(0)).sum()

    importance = p.sum(0)
    last = p.gather(1, ids[:, -1:].clamp(min=0))
    load = torch.special.ndtr((p - last) / options.load_deviation).sum(0) if options.load else importance
    per_sequence = [balance(p[a : a + sequence], ids[a : a + sequence]) for a in range(0, tokens, sequence)]

    def variation(v):
        return v.var() / (v.mean() ** 2 + 1e-10)

    return (
        options.balance * balance(p, ids)
        + options.sequence_balance * sum(per_sequence) / len(per_sequence)
        + options.importance * importance.var() / experts**2
        + options.importance_cv * variation(importance)
        + options.load * variation(load)
        + options.z * (logits.logsumexp(1) ** 2).mean()
    )


def twin(context, layer, p, x, mask=None, residual=None, sequence=None, keeps=lambda t, k, e: True):
    """(out, losses) of all tokens x [T, H], given all experts' parameters ``p`` by name, all in double precision.

    keeps(t, k, e) : whether a capacity leaves slot k of token t its place with expert e
    """
    options, made = layer.router_options, layer._options
    logits = x @ p["router.weight"].T + p.get("router.bias", 0)
    scores = {
        "softmax": lambda z: z.softmax(1),
        "sigmoid": torch.sigmoid,
        "sqrt_softplus": lambda z: F.softplus(z).sqrt(),
    }[options.score](logits)
    bias = None if layer.selection_bias is None else layer.selection_bias.double()
    with torch.no_grad():
        ids = choose(context, options, logits, scores, bias, mask)
    weights = scores.gather(1, ids.clamp(min=0)).where(ids >= 0, 0.0)
    if options.renormalise:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    weights = weights * options.scaling
    zero, same, constant = made["special"]
    routed = options.experts - zero - same - constant

    def special(e, row):
        if e < routed + zero:
            return torch.zeros_like(row)
        if e < routed + zero + same:
            return row
        c = e - routed - zero - same
        a, b = (p["special.mix"][c] @ row).softmax(0)
        return a * row + b * p["special.value"][c]

    def expert(e, row, weight):
        on = made["weights_on"]
        if on == "input":
            row = weight * row
        pre = p["experts.up"][e] @ row
        h = activate(pre + p["experts.up_bias"][e] if made["bias"] else pre, made["activation"])
        y = p["experts.down"][e] @ (weight * h if on == "inner" else h)
        if made["bias"]:
            y = y + (weight * p["experts.down_bias"][e] if on == "inner" else p["experts.down_bias"][e])
        return weight * y if on == "output" else y

    rows = []
    for t, row in enumerate(x):
        out = torch.zeros_like(row)
        padding = mask is not None and mask[t] == 0
        for k, e in enumerate([] if padding else ids[t].tolist()):
            if e >= routed:
                out = out + weights[t, k] * special(e, row)
            elif e >= 0 and keeps(t, k, e):
                out = out + expert(e, row, weights[t, k])
        if made["shared_inner"] and not padding:
            y = p["shared.down"] @ activate(p["shared.up"] @ row, made["activation"])
            out = out + (torch.sigmoid(row @ p["shared.gate"]) * y if made["shared_gate"] else y)
        rows.append(out)
    out = torch.stack(rows)
    if residual is not None:
        out = out + residual
    return out, losses(options, scores, logits, ids, sequence or len(x))
