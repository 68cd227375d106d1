"""The programs of torch_npu's pages themselves, with only their import, device and backend lines replaced.

EXPAR_SEEDS names a folder with torch_npu.npu_moe_distribute_combine_setup.md and torch_npu.npu_moe_eplb_update_expert.md.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

FOLDER = os.environ.get("EXPAR_SEEDS")
pytestmark = pytest.mark.skipif(not FOLDER, reason="EXPAR_SEEDS does not name the folder of torch_npu's pages")

# What the pages have, and what takes its place.
REPLACED = {
    r"^import torch_npu$": "import expar.ascend as torch_npu",
    r"^import torchair$": "",
    r"(?P<q>['\"])hccl(?P=q)": "'gloo'",
    r"torch_npu\.npu\.set_device\(rank\)": "torch.set_num_threads(1)",
    r"torch\.npu\.synchronize\(\)": "pass",
    r"\.npu\(\)": "",
    r"(\w+)\._get_backend\(torch\.device\(\"npu\"\)\)\.get_hccl_comm_name\(rank\)": r"torch_npu.get_hccl_comm_name(\1)",
    r"torchair\.get_npu_backend\(\)": "'aot_eager'",
}


def programs(page):
    """The Python blocks of a page that are programs."""
    text = (pathlib.Path(FOLDER) / f"torch_npu.{page}.md").read_text()
    blocks = re.findall(r"^ *```python\n(.*?)^ *```", text, re.S | re.M)
    return [textwrap.dedent(block) for block in blocks if "__main__" in block]


def run(tmp_path, program):
    """What it prints."""
    for had, has in REPLACED.items():
        program = re.sub(had, has, program, flags=re.M)
    assert "npu()" not in program and "hccl'" not in program
    file = tmp_path / "program.py"
    file.write_text(program)
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_the_page_of_combine_setup(tmp_path):
    (program,) = programs("npu_moe_distribute_combine_setup")
    printed = run(tmp_path, program)
    assert sorted(re.findall(r"recv rank (\d+) data success", printed), key=int) == [str(r) for r in range(16)]


@pytest.mark.parametrize("mode", ["operators", "graph"])
def test_the_page_of_eplb_update_expert(tmp_path, mode):
    single, graph = programs("npu_moe_eplb_update_expert")
    printed = run(tmp_path, {"operators": single, "graph": graph}[mode])
    assert len(re.findall(r"rank \d+ epid \d+ tpid 0 npu finished!", printed)) == 16
    assert printed.endswith("run npu success.\n")
