"""Tokens and routes for the tests of expar.transformers, and where tests/python/families.py is."""

from __future__ import annotations

import os
import sys

import torch

sys.path.append(os.path.join(os.path.dirname(__file__), "../../tests/python"))

from families import HIDDEN, TOPK, VOCABULARY

from expar.transformers.experts import find_experts

TOKENS, EXPERTS = 10, 5


def routes(experts, topk=TOPK, tokens=TOKENS):
    g = torch.Generator().manual_seed(5)
    ids = torch.rand(tokens, experts, generator=g).argsort(1)[:, :topk]
    return torch.randn(tokens, HIDDEN, generator=g), ids, torch.rand(tokens, topk, generator=g)


def part(tensor, rank, ranks):
    return tensor[len(tensor) * rank // ranks : len(tensor) * (rank + 1) // ranks]


def sequences(rank=0, ranks=1):
    return part(torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(1)), rank, ranks)


def first_experts(model):
    return next(module for _, module in find_experts(model))
