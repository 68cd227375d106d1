"""The notebook's run of 10,000 steps on two ranks: minutes, so for ``script/test --all``. ``pytest -s`` shows its lines."""

from __future__ import annotations

from tutorial_test import trained


def test_the_notebooks_run_has_the_notebooks_losses(tmp_path):
    """Its task loss falls from 1/3 to the plateau that two targets leave, a sixth and a little, and its auxiliary loss to
    less than half of what it rises to."""
    lines = trained(2, tmp_path, "--profile", timeout=1200)
    print(*lines, sep="\n")
    assert [line[0] for line in lines] == list(range(0, 10_000, 1000))
    task, aux = ([line[i] for line in lines] for i in (1, 2))
    assert 0.30 < task[0] < 0.36 and 0.18 < task[1] < 0.23
    assert all(0.155 < loss < 0.20 for loss in task[4:])
    assert max(aux) < 1.5 and max(aux[-2:]) < max(aux) / 2


def test_with_one_target_the_ranks_learn_it(tmp_path):
    lines = trained(2, tmp_path, "--profile", "--seed", 0, "--steps", 1001, timeout=600)
    print(*lines, sep="\n")
    assert lines[-1][1] < 0.06
