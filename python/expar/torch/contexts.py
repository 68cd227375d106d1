"""Contexts by name: operators of torch.library take tensors, numbers and strings alone."""

from __future__ import annotations

import itertools
import weakref

import torch

from .. import Context
from ..errors import BadArgument

_contexts: weakref.WeakValueDictionary[str, Context] = weakref.WeakValueDictionary()
_names: weakref.WeakKeyDictionary[Context, str] = weakref.WeakKeyDictionary()
_numbers = itertools.count()
NAMES = "expar."  # how every name begins


@torch.compiler.assume_constant_result  # of a graph that is compiled for this context
def name_of(context: Context | None) -> str:
    """What operators call ``context``, as long as somebody holds it; "" is none."""
    if context is None:
        return ""
    name = _names.get(context)
    if name is None:
        name = f"{NAMES}{next(_numbers)}"
        _names[context] = name
        _contexts[name] = context
    return name


def context_of(name: str) -> Context:
    """Raises BadArgument where nobody holds it any more."""
    try:
        return _contexts[name]
    except KeyError:
        raise BadArgument("the context of this operator is gone: keep it as long as you call or compile with it") from None
