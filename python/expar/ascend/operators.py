"""How torch_npu's names become operators of PyTorch, and how tensors get to the library and back."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple, Optional, ParamSpec, TypeVar, cast, get_type_hints

import torch
from torch import Tensor

from ..errors import BadArgument
from .groups import by_name

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int8: "int8",
    torch.float8_e4m3fn: "fp8_e4m3",
    torch.float8_e5m2: "fp8_e5m2",
    torch.float8_e8m0fnu: "fp8_e8m0",
    torch.int32: "int32",
    torch.int64: "int64",
}


class Gradient(NamedTuple):
    """What torch.library.register_autograd takes."""

    keep: Callable[..., None]
    backward: Callable[..., Any]


def operator(
    *, fake: Callable[[SimpleNamespace], Any], mutates: str = "", gradient: Optional[Gradient] = None
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes an operator ``expar_ascend::<its name>`` of a function, which is called as before, and with groups that are
    none of strings.

    fake    : of the arguments by name, returns tensors of the shapes and dtypes that the function returns
    mutates : a keyword argument that is written, where it is given
    """

    def make(body: Callable[P, R]) -> Callable[P, R]:
        name, hints = body.__name__, get_type_hints(body)
        parameters = inspect.signature(body).parameters.values()

        def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            return {p.name: p.default for p in parameters} | dict(zip((p.name for p in parameters), args)) | kwargs

        def run(*args: Any, **kwargs: Any) -> R:
            return cast(Callable[..., R], body)(**named(args, kwargs))

        # custom_op takes no tensors that are keyword arguments alone.
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [p.replace(kind=p.POSITIONAL_OR_KEYWORD, annotation=hints[p.name]) for p in parameters],
            return_annotation=hints["return"],
        )

        def register(name: str, writes: tuple[str, ...]) -> Any:
            made = torch.library.custom_op(f"expar_ascend::{name}", run, mutates_args=writes)
            made.register_fake(lambda *args, **kwargs: fake(SimpleNamespace(**named(args, kwargs))))
            if gradient:
                made.register_autograd(gradient.backward, setup_context=gradient.keep)
            return getattr(torch.ops.expar_ascend, name).default

        reads = register(name, ())
        # Inductor does not take an operator of one result that may write and is given nothing to write.
        writing = register(f"{name}_writing_{mutates}", (mutates,)) if mutates else reads

        @functools.wraps(body)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            registered = reads if kwargs.get(mutates) is None else writing
            result: R = registered(
                *[by_name(value) for value in args], **{key: by_name(value) for key, value in kwargs.items()}
            )
            return result

        return call

    return make


def dtype_name(dtype: Optional[torch.dtype]) -> Optional[str]:
    """As the library calls it; one that it has not, by a name that it will refuse."""
    return None if dtype is None else DTYPES.get(dtype, str(dtype))


def dense(tensor: Optional[Tensor]) -> Any:
    """As the library reads it: without strides, bool as int8."""
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int8) if tensor.dtype == torch.bool else tensor


def taken(array: Any) -> Any:
    """Memory of the library as a tensor; one of no elements where the library has nothing to tell."""
    return torch.empty(0) if array is None else torch.utils.dlpack.from_dlpack(array)


def results(room: dict[str, Any]) -> Any:
    """The tensors of an operator, one without elements in the place of each None."""
    return tuple(torch.empty(0) if made is None else made for made in room.values())


def new_like(tensor: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
    """Room for as many elements in the same order of axes."""
    return tensor.new_empty(tensor.shape, dtype=dtype or tensor.dtype)


def refuse_unless(**values: tuple[Any, ...]) -> None:
    """name=(value, what it may be, ...). Raises BadArgument."""
    for name, (value, *allowed) in values.items():
        if value not in allowed:
            raise BadArgument(f"{name} is {value}, should be {' or '.join(map(str, allowed))}")
