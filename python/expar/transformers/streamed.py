"""A safetensors file written tensor by tensor, none of which need be in memory before its turn."""

from __future__ import annotations

import json
from typing import Any, Callable, Mapping, Optional

import torch
from torch import Tensor

from ..errors import Unsupported

# Names of the format: https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def bytes_of(tensor: Tensor) -> Tensor:
    """[n] uint8: the elements of a tensor in order; the same memory where they lie in it in order."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def write_safetensors(
    path: Any,
    tensors: Mapping[str, Tensor],
    value: Callable[[str], Tensor],
    metadata: Optional[Mapping[str, str]] = None,
) -> None:
    """Writes a file of ``tensors``; of those on device meta, value(name) is called for each, in the order of the file.

    The bytes are those of safetensors.torch.save_file where all dtypes are alike.
    Raises Unsupported (a dtype that the format, as written here, has no name for), OSError.
    """
    head: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    # Wide elements first, so that all are aligned.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise Unsupported(f"{name} is {tensor.dtype}: cannot be written to {path}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        head[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            tensor = value(name) if tensors[name].is_meta else tensors[name]
            file.write(bytes_of(tensor).numpy().data)
