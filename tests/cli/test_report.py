"""`distmerge report`: where it writes, what it prints, and which exit codes it ends with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import factories
from tests.cli.conftest import Cli
from tests.conftest import tree


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adapter` merged into `base`. Read only."""
    return factories.merge(base, adapter, tmp_path_factory.mktemp("merged") / "out")


def test_report_writes_beside_the_output_and_says_where(cli: Cli, merged: Path) -> None:
    said = cli("report", merged)
    assert said.out.startswith("The tune is there: 100.0 % of the change is left")
    assert f"{merged}-report/report.html" in said.out
    assert said.err == ""
    page = merged.with_name("out-report")
    assert sorted(path.name for path in page.iterdir()) == [
        *("change.png", "layers.png", "left.png", "report.html", "spectrum.png")
    ]


def test_report_prints_its_summary_as_json(cli: Cli, merged: Path, tmp_path: Path) -> None:
    facts = json.loads(cli("report", merged, "--output", tmp_path / "here", "--json").out)
    assert facts["page"] == str(tmp_path / "here" / "report.html")
    assert (facts["level"], facts["num_changed"], facts["num_lost"]) == ("kept", 14, 0)
    assert 0.99 < facts["cosine"] <= 1
    assert all(Path(path).is_file() for path in facts["figures"])


def test_report_refuses_what_is_no_output_with_exit_3(cli: Cli, base: Path, merged: Path, tmp_path: Path) -> None:
    assert "holds no merge_receipt.json" in cli("report", base, code=3).err
    assert "lies in the output" in cli("report", merged, "--output", merged / "report", code=3).err
    assert "run.jsonl" in cli("report", merged, "--run-log", tmp_path / "run.jsonl", code=3).err


def test_profile_says_on_stderr_where_the_time_of_each_rank_went(
    cli: Cli, base: Path, adapter: Path, tmp_path: Path
) -> None:
    merge = ("merge", "--base", base, "--adapter", adapter, "--nproc", 1)
    said = cli(*merge, "--output", tmp_path / "told", "--profile", "--json")
    json.loads(said.out)
    lines = [line.split() for line in said.err.splitlines()]
    head = next(line for line in lines if line[:2] == ["rank", "lanes"])
    assert {"start", "read", "compute", "measure", "hash", "write", "wait", "digest", "fsync", "publish"} <= set(head)
    (rank,) = [line for line in lines if line[0] == "0"]
    assert len(rank) == len(head)
    assert all(float(cell) >= 0 for cell in rank)
    assert "rank  lanes" not in cli(*merge, "--output", tmp_path / "quiet").err
    assert tree(tmp_path / "told") == tree(tmp_path / "quiet")


def test_a_run_log_goes_from_merge_to_report(cli: Cli, base: Path, adapter: Path, tmp_path: Path) -> None:
    log, out = tmp_path / "run.jsonl", tmp_path / "out"
    cli("merge", "--base", base, "--adapter", adapter, "--output", out, "--nproc", 1, "--run-log", log)
    facts = json.loads(cli("report", out, "--run-log", log, "--json").out)
    assert [Path(path).name for path in facts["figures"]][-1] == "ranks.png"
