"""Two launches of one merge at once are harmless: the lock is a courtesy, correctness does not come from it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from distmerge import AdapterChoice, MergeConfig, work
from distmerge.errors import InputError
from distmerge.plan import Plan, make_plan
from distmerge.work import WorkFolder
from tests.conftest import tree
from tests.ranks.conftest import Undisturbed
from tests.ranks.launching import errors, launch

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("delay", [0.0, 0.5])
def test_two_launches_at_once_give_the_result_of_one(undisturbed: Undisturbed, tmp_path: Path, delay: float) -> None:
    output = tmp_path / "merged"
    with launch(*undisturbed.args, output=output, nproc=1) as first:
        time.sleep(delay)
        with launch(*undisturbed.args, output=output, nproc=1) as second:
            codes = [first.wait(), second.wait()]
    assert 0 in codes, first.stderr + second.stderr
    for code, running in zip(codes, (first, second), strict=True):
        assert code in (0, 3), running.stderr
        assert len(errors(running.stderr)) == (code != 0), running.stderr
    assert tree(output) == undisturbed.files
    assert not first.work.exists()


def test_a_launch_that_is_refused_leaves_the_folder_of_the_one_that_runs(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged"
    plan = make_plan(MergeConfig(base=base, adapters=(AdapterChoice(folder=adapter),), output=output), "cpu")
    running, late = WorkFolder(output), WorkFolder(output)

    def the_other_is_faster(self: WorkFolder, plan: Plan) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(work, "_LOCK_SECONDS", 0.5)
        running.open(plan)

    # Both have found no folder; then the other one makes it and goes to work.
    monkeypatch.setattr(WorkFolder, "_check_room", the_other_is_faster)
    with pytest.raises(InputError, match="another merge into this output is running"):
        late.open(plan)
    assert (running.path / "manifest.json").exists()
    running.discard()
