"""Arrays as users have them: PyTorch's tensors of every dtype, read-only ones, ones with gradients; and their types."""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from ranks import on_ranks

import expar

TOKENS, HIDDEN, EXPERTS = 6, 8, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_pytorch_go_in_and_come_out_without_a_copy(dtype):
    x = torch.arange(TOKENS * HIDDEN).view(TOKENS, HIDDEN).to(dtype)
    ids = torch.arange(TOKENS, dtype=torch.int32)[:, None] % EXPERTS

    def body(context):
        plan = expar.make_plan(context, ids, EXPERTS)
        inbox = expar.dispatch(context, x, torch.ones(TOKENS, 1), plan, layout="expert_major")
        packed = torch.from_dlpack(inbox.packed)
        assert packed.dtype == dtype and packed.data_ptr() == torch.from_dlpack(inbox.packed).data_ptr()
        y = expar.make_outbox(context, inbox, HIDDEN, "bf16" if dtype == torch.bfloat16 else "f32")
        rows = torch.from_dlpack(y.rows)
        rows.copy_(2 * packed)
        out = torch.empty_like(x)
        expar.combine(context, plan, y, expar.unweighted, out)
        assert torch.equal(out, 2 * x)
        assert plan.sent_bytes(HIDDEN, "bf16") * 2 == plan.sent_bytes(HIDDEN)

    on_ranks(2, body)


def test_a_tensor_with_a_gradient_is_refused_by_name_and_told_what_to_do():
    x = torch.ones(TOKENS, HIDDEN, requires_grad=True)
    ids = torch.zeros(TOKENS, 1, dtype=torch.int32)

    def body(context):
        plan = expar.make_plan(context, ids, EXPERTS)
        with pytest.raises(expar.BadArgument, match=r"x requires a gradient, which is lost here; pass x.detach\(\)"):
            expar.dispatch(context, x, None, plan)
        with pytest.raises(expar.BadArgument, match="out requires a gradient"):
            expar.all_reduce(context, x.detach(), torch.ones(HIDDEN, requires_grad=True))
        expar.dispatch(context, x.detach(), None, plan)
        with torch.no_grad():
            expar.dispatch(context, x, None, plan)

    on_ranks(1, body)


def test_read_only_arrays_are_read_and_refused_where_they_would_be_written():
    rows = np.ones((2, HIDDEN), np.float32)
    rows.flags.writeable = False

    def body(context):
        total = np.empty(HIDDEN, np.float32)
        expar.all_reduce(context, rows, total)
        assert (total == 2).all()
        total.flags.writeable = False
        with pytest.raises(expar.BadArgument, match="out is read-only and would be written; pass a copy"):
            expar.all_reduce(context, rows, total)
        with pytest.raises(TypeError, match="out: Array"):
            expar.all_reduce(context, rows, [0.0] * HIDDEN)
        with pytest.raises(TypeError, match="rows: Array"):
            expar.all_reduce(context, None, np.empty(HIDDEN, np.float32))

    on_ranks(1, body)


def test_other_layouts_are_refused_with_what_to_do():
    x = torch.ones(HIDDEN, TOKENS).T

    def body(context):
        with pytest.raises(expar.BadArgument, match=r"rows is strided.*x.contiguous\(\)"):
            expar.all_reduce(context, x, torch.empty(HIDDEN))
        with pytest.raises(expar.BadArgument, match="dtype of 64 bits.*it takes f32, bf16"):
            expar.all_reduce(context, torch.ones(1, HIDDEN, dtype=torch.float64), torch.empty(HIDDEN))

    on_ranks(1, body)


def stub():
    return os.path.join(os.path.dirname(os.path.realpath(expar._native.__file__)), "_native.pyi")


def test_stubs_name_every_type():
    with open(stub()) as file:
        text = file.read()
    assert "std::" not in text and "expar::" not in text
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef):
            continue
        where = f"{function.name}, line {function.lineno}"
        assert function.returns is not None, where
        assert ast.unparse(function.returns) not in ("object", "tuple", "list", "dict"), where
        arguments = function.args.args + function.args.kwonlyargs
        assert all(a.annotation is not None for a in arguments if a.arg != "self"), where


PROGRAM = '''
import numpy as np
import expar

def rank_main(communicator: expar.Communicator) -> None:
    context = expar.Context(communicator)
    x = np.ones((4, 8), np.float32)
    plan = expar.make_plan(context, np.zeros((4, 1), np.int32), experts=4)
    begins: list[int] = plan.offsets.tolist()
    inbox = expar.dispatch(context, x, None, plan, layout="expert_major")
    y = expar.make_outbox(context, inbox, width=8)
    np.asarray(y.rows)[:] = np.asarray(inbox.packed)
    try:
        expar.combine(context, plan, y, expar.unweighted, x)
    except expar.Error as error:
        print(error.code, error.rank, begins)
    layer = expar.MoeLayer(context, hidden=8, inner=4, router=expar.RouterOptions(4, 1, balance=0.01))
    values = layer.expert_parameters()[0].value
    assert values is not None

expar.run_threads(2, rank_main)
'''


def test_a_users_program_passes_mypy_strict(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(PROGRAM + "\nexpar.run_threads('2', rank_main)\nexpar.part_of(1, 2, None)\n")
    environment = dict(os.environ, MYPYPATH=os.path.dirname(os.path.dirname(stub())))

    def check(name):
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout

    code, text = check("program.py")
    assert code == 0, text
    assert "Found 2 errors" in check("wrong.py")[1]
