"""Every name of the public headers is bound, or left out for a reason: a new one cannot be forgotten."""

from __future__ import annotations

import pathlib
import re

import expar

HEADERS = pathlib.Path(__file__).resolve().parents[2] / "include" / "expar"

# Left to authors in C++.
FOR_AUTHORS = {"carried.h", "kernels.h", "operation.h", "pool.h", "transport.h"}

KEYWORDS = "its members are keyword arguments"
NAMES = "an enumeration: its values are names"
TUPLE = "a tuple"
AUTHORS = "for authors in C++"
MEMORY = "memory belongs to arrays"
NOT_BOUND = {
    "AdamWMoments": TUPLE,
    "AdamWOptions": KEYWORDS,
    "Array": MEMORY,
    "Block": AUTHORS,
    "BlockRef": AUTHORS,
    "Buffer": MEMORY,
    "BiasRule": NAMES,
    "CapacityPolicy": NAMES,
    "CapacityScope": NAMES,
    "Choice": NAMES,
    "CombineOptions": KEYWORDS,
    "ConstTensor": MEMORY,
    "ContextOptions": KEYWORDS,
    "DType": NAMES,
    "Device": MEMORY,
    "DispatchOptions": KEYWORDS,
    "ErrorCode": NAMES,
    "ExpertRange": TUPLE,
    "ExpertSource": KEYWORDS,
    "GroupList": NAMES,
    "HiddenMoeInputs": KEYWORDS,
    "HiddenMoeOptions": KEYWORDS,
    "HiddenPartition": NAMES,
    "Layout": NAMES,
    "LossInputs": KEYWORDS,
    "MeshDim": TUPLE,
    "MoeInputs": KEYWORDS,
    "MoeLayerOptions": KEYWORDS,
    "NamedNumber": AUTHORS,
    "NanPolicy": NAMES,
    "Part": TUPLE,
    "PendingForward": "MoeLayer.start_forward, which overlaps micro-batches, is for C++ so far",
    "PlanOptions": KEYWORDS,
    "RouteInputs": KEYWORDS,
    "RunOptions": KEYWORDS,
    "Score": NAMES,
    "Shape": MEMORY,
    "SlotRow": TUPLE,
    "SpecialGradients": KEYWORDS,
    "Stream": AUTHORS,
    "Tensor": MEMORY,
    "WeightsOn": NAMES,
    "bf16": MEMORY,
    "check_dims": "Parallel checks them",
    "checked": AUTHORS,
    "current_error": AUTHORS,
    "f16": MEMORY,
    "find_kernels": AUTHORS,
    "fp8_e4m3": MEMORY,
    "fp8_e5m2": MEMORY,
    "fp8_e8m0": MEMORY,
    "make_experts_workspace": AUTHORS,
    "name": NAMES,
    "operation_span": "Span(..., kind='operation')",
    "parse_capacity_policy": NAMES,
    "parse_dtype": NAMES,
    "validate": "a method of what it checks, or its __init__",
    "version": "__version__",
}

# Of expar/ascend.h, whose names are bound as _ascend_<name>, for expar.ascend.
ASCEND_NOT_BOUND = {
    "ClippedSwigluOptions": KEYWORDS,
    "CombineAddRmsNorm": KEYWORDS,
    "CombineSetup": KEYWORDS,
    "CombineTeardown": KEYWORDS,
    "DequantSwigluQuantOptions": KEYWORDS,
    "DispatchSetup": KEYWORDS,
    "DispatchTeardown": KEYWORDS,
    "DispatchV2": KEYWORDS,
    "Dispatched": KEYWORDS,
    "DispatchedV2": KEYWORDS,
    "FinalizeRoutingInputs": KEYWORDS,
    "Gating": TUPLE,
    "GatingOptions": KEYWORDS,
    "GroupedMatmulOptions": KEYWORDS,
    "InitRouting": TUPLE,
    "InitRoutingOptions": KEYWORDS,
    "InitRoutingV2": TUPLE,
    "QuantisedRows": TUPLE,
    "ReRouting": TUPLE,
    "ReRoutingOptions": KEYWORDS,
    "SoftmaxGating": TUPLE,
    "SwigluQuantOptions": KEYWORDS,
    "TokenPermutation": TUPLE,
    "TokenUnpermuteGrad": TUPLE,
    "UpdateExpertOptions": KEYWORDS,
    "UpdatedExperts": TUPLE,
}


def headers():
    """Those that expar.h includes, and that these include."""
    found, new = set(), {"expar.h"}
    while new:
        found |= new
        new = {h for name in new for h in re.findall(r"#include <expar/(\w+\.h)>", (HEADERS / name).read_text())} - found
    return found


def public_names(header, namespace="expar"):
    """What a header defines in a namespace: classes, and functions, which begin in the first column."""
    text = (HEADERS / header).read_text().partition(f"namespace {namespace} {{")[2]
    text = re.sub(r"^namespace \w+ \{.*?^\}", "", text, flags=re.S | re.M)
    found = set(re.findall(r"^(?:struct|class|enum class)(?: alignas\(\d+\))? (\w+)[^;\n]*\{", text, re.M))
    function = r"^(?:inline |constexpr )*(?!namespace|struct|class|enum|template|using|#)[\w:][\w:<>,&* ]*[ &*>](\w+)\("
    return found | set(re.findall(function, text, re.M))


def test_every_public_name_is_bound_or_left_out_for_a_reason():
    missing = {
        f"{header}: {name}"
        for header in headers()
        if header not in FOR_AUTHORS
        for name in public_names(header)
        if name not in NOT_BOUND and not hasattr(expar, name)
    }
    assert not missing


def test_the_list_of_what_is_left_out_has_nothing_else():
    names = {name for header in headers() for name in public_names(header)} | {"version"}
    assert set(headers()) > FOR_AUTHORS
    for name in NOT_BOUND:
        assert name in names, f"{name} is no name of the headers any more"
        assert not hasattr(expar, name), f"{name} is bound"
    assert {"make_plan", "Inbox", "run_threads", "init", "all_to_all_v", "SpecialPass", "is_collective"} <= names


def ascend_names():
    headers = re.findall(r"#include <expar/(ascend/\w+\.h)>", (HEADERS / "ascend.h").read_text())
    return {name for header in headers for name in public_names(header, "expar::ascend")}


def test_every_name_of_ascend_is_bound_or_left_out_for_a_reason():
    names = ascend_names()
    bound = {name for name in names if hasattr(expar._native, f"_ascend_{name}")}
    assert names - bound == set(ASCEND_NOT_BOUND)
    assert {"Domain", "expand_rows", "moe_distribute_dispatch_v2", "swiglu_grad", "CommCmdInfo"} <= bound
