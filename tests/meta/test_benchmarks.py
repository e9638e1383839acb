"""Benchmarks run on tiny models, so that they are there when figures are asked for; and their arithmetic is right."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import cache, harness
from benchmarks.harness import compared_digests, titled
from benchmarks.machine import describe
from benchmarks.process import Finished, watch
from benchmarks.spread import fit, ratios, spread_of
from benchmarks.tables import contestants, machine_of, ratio_table, read_log, sections, values
from distmerge.cli.main import cli

ROOT = Path(__file__).parents[2]
QUICK = ["--nbytes", "20e6", "--rounds", "1", "--warm-up", "0"]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Gives torch the threads back that a benchmark took."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_here(words: list[str], **_: Any) -> Finished:
    """`distmerge merge` as one rank of this process, any other command as it stands."""
    if "distmerge" not in words:
        done = subprocess.run(words, check=True, capture_output=True, text=True, cwd=ROOT)
        return Finished(seconds=1.0, stdout=done.stdout, peak_nbytes=1, process_peak_nbytes=1)
    argv = words[words.index("distmerge") + 1 :]
    argv[argv.index("--nproc") + 1] = "1"
    CliRunner().invoke(cli, argv, standalone_mode=False, catch_exceptions=False)
    return Finished(seconds=1.0, stdout="", peak_nbytes=1, process_peak_nbytes=1)


def assert_tables_are_made(script: str, results: Path) -> None:
    """The pages' tables that quote this log are made of it, each with the machine below."""
    made = runpy.run_path(str(ROOT / "docs" / "make_performance.py"))
    for name in [name for name, (log, *_) in made["TABLES"].items() if log == script]:
        text = made["filled"](f"<!-- {name} -->\n<!-- end -->\n", results)
        assert name == "profiles" or text.count("\n| ") > 1, name
        assert text.count(" cores (") == 1


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        ("cp", [], {"digest", "r", "cold", "float16", "float32"}),
        ("nf4", ["--no-peers"], {"nf4"}),
        ("ranks", ["--only", "shards1"], {"1 file, r 16", "1 file, r 256"}),
        ("size", [], {"size"}),
        ("memory", ["--single-nbytes", "9e6"], {"many tensors", "one tensor"}),
    ],
)
def test_every_benchmark_of_merges_logs_each_contestant_in_each_round(
    script: str, options: list[str], expected: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "watch", run_here)
    main = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["main"]
    main([*QUICK, "--folder", str(tmp_path), "--log", str(tmp_path / f"{script}.jsonl"), *options])
    log = read_log(tmp_path / f"{script}.jsonl")
    assert {"cpu", "cores", "ram_gb", "kernel", "file_system", "torch"} <= log[0].keys()
    assert expected <= set(sections(log))
    planned = {line["section"]: line["names"] for line in log if "names" in line}
    assert {section: contestants(log, section) for section in planned} == planned
    assert [path.name for path in tmp_path.iterdir()] == [f"{script}.jsonl"], "it cleans up after itself"
    assert_tables_are_made(script, tmp_path)


@pytest.mark.parametrize("script", ["matmul", "steps"])
def test_every_benchmark_of_arithmetic_logs_each_contestant(script: str, tmp_path: Path) -> None:
    main = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["main"]
    options = ["--nbytes", "4e6", "--rounds", "1", "--warm-up", "0"]
    main([*options, "--folder", str(tmp_path), "--log", str(tmp_path / f"{script}.jsonl")])
    log = read_log(tmp_path / f"{script}.jsonl")
    planned = {line["section"]: line["names"] for line in log if "names" in line}
    assert planned
    assert {section: contestants(log, section) for section in planned} == planned
    assert_tables_are_made(script, tmp_path)


@pytest.mark.ranks
def test_a_benchmark_measures_real_ranks_from_their_own_log(tmp_path: Path) -> None:
    log_file = tmp_path / "log.jsonl"
    script = [sys.executable, str(ROOT / "benchmarks" / "cp.py"), "--only", "cold"]
    subprocess.run([*script, *QUICK, "--folder", str(tmp_path), "--log", str(log_file)], check=True, cwd=tmp_path)
    log = read_log(log_file)
    for name in contestants(log, "cold")[1:]:
        stream, ranks, whole = (values(log, "cold", name, measure)[0] for measure in ("stream", "ranks", "whole"))
        assert 0 < stream <= ranks < whole
        assert values(log, "cold", name, "peak")[0] >= values(log, "cold", name, "process_peak")[0] > 100e6


@pytest.mark.real
@pytest.mark.parametrize("script", ["peers", "nf4"])
def test_peers_merge_what_distmerge_merges(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log_file = tmp_path / "log.jsonl"
    monkeypatch.setattr(harness, "compared_digests", lambda: compared_digests()[:1])  # the others are no peers
    main = runpy.run_path(str(ROOT / "benchmarks" / f"{script}.py"))["main"]
    main([*QUICK, "--folder", str(tmp_path), "--log", str(log_file)])
    log = read_log(log_file)
    peer = {"peers": "PEFT", "nf4": "transformers + PEFT"}[script]
    assert 0 < values(log, script, peer, "past")[0] < values(log, script, peer, "whole")[0]
    if script == "peers":
        names = [name for name in contestants(log, script) if values(log, script, name, "equal")]
        assert {"PEFT", titled(compared_digests()[0])} <= set(names)
        assert all(values(log, script, name, "equal")[0] > 0.999 for name in names)


def test_a_contestant_that_fails_is_left_out_and_the_benchmark_ends_with_an_error(tmp_path: Path) -> None:
    def failing() -> dict[str, float]:
        raise subprocess.CalledProcessError(3, ["peer"])

    def run() -> None:
        with harness.bench(harness.arguments(""), ["--rounds", "2", "--folder", str(tmp_path)]) as one:
            one.rounds("race", {"good": lambda: {"whole": 1.0}, "bad": failing})
            assert contestants(one.log, "race") == ["good"]
            assert values(one.log, "race", "good", "whole") == [1.0, 1.0]

    with pytest.raises(SystemExit, match="failed: bad"):
        run()


def test_memory_counts_children_and_cores_are_those_that_were_given() -> None:
    held, cpu = 150_000_000, min(os.sched_getaffinity(0))
    child = f"x = bytearray({held}); x[::4096] = b'1' * len(x[::4096]); import time; time.sleep(1.5)"
    parent = f"subprocess.run([sys.executable, '-c', {child!r}]); print(os.sched_getaffinity(0))"
    done = watch([sys.executable, "-c", f"import os, subprocess, sys; {parent}"], cwd=ROOT, cpus={cpu})
    assert done.stdout.strip() == str({cpu})
    assert held < done.process_peak_nbytes < held + 60e6
    assert done.process_peak_nbytes <= done.peak_nbytes < held + 60e6
    assert done.seconds > 1.5


def test_a_command_that_fails_raises(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        watch([sys.executable, "-c", "raise SystemExit('no such luck')"], cwd=ROOT)
    assert "no such luck" in capfd.readouterr().err


def test_a_cold_folder_is_out_of_the_page_cache_and_a_warm_one_in_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3_000_001))
    if cache.cached_share(tmp_path) is None or describe(tmp_path)["file_system"] == "tmpfs":
        pytest.skip("this kernel does not tell, or the files are in memory anyway")
    assert cache.make_cold(tmp_path) == 0
    assert cache.make_warm(tmp_path) == 1


def test_ratios_are_taken_round_by_round() -> None:
    log = [
        {"section": "s", "names": ["slow", "fast"]},
        *({"section": "s", "round": n, "contestant": "fast", "whole": 1.0 + n} for n in range(3)),
        *({"section": "s", "round": n, "contestant": "slow", "whole": 2.0 + 2 * n} for n in (2, 1, 0)),
    ]
    assert ratios(values(log, "s", "slow", "whole"), values(log, "s", "fast", "whole")) == [2, 2, 2]
    assert ratio_table(log, "s", {"whole": "whole"}, to="fast").splitlines()[2:] == [
        "| slow | 4 | 2 [2, 2] |",
        "| fast | 2 | 1 [1, 1] |",
    ]


def test_a_section_that_is_measured_again_takes_the_place_of_the_old_one_and_others_stay_with_their_machine(
    tmp_path: Path,
) -> None:
    parser, log_file = harness.arguments("", rounds=1), tmp_path / "log.jsonl"
    for whole, only in ((1.0, []), (2.0, ["b"]), (3.0, ["b", "c"])):
        with harness.bench(parser, ["--log", str(log_file), "--folder", str(tmp_path), "--only", *only]) as run:
            for section in ("a", "b", "c"):
                if run.wanted(section):
                    run.rounds(section, {"one": lambda whole=whole: {"whole": whole}})
    log = read_log(log_file)
    assert sections(log) == ["a", "b", "c"]
    assert {section: values(log, section, "one", "whole") for section in "abc"} == {"a": [1.0], "b": [3.0], "c": [3.0]}
    assert [machine_of(log, section)["options"]["only"] for section in "abc"] == [[], ["b", "c"], ["b", "c"]]
    assert [line["section"] for line in log].count("machine") == 2, "of the second run nothing is left"


def test_what_the_pages_lack_or_quote_of_other_code_is_due_by_name_and_holes_say_so(tmp_path: Path) -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_performance.py"))
    logs = {log for log, *_ in made["TABLES"].values()}
    assert set(made["state"](tmp_path)) == logs
    assert {f"bench-{log}" for log in logs} <= {f"bench-{word}" for word in (ROOT / "Makefile").read_text().split()}
    sample = {"stream": 1.0, "ranks": 1.0, "whole": 1.0, "durable": 1.0}
    machine = {**describe(tmp_path), "section": "machine", "options": {"rounds": 1, "nbytes": 1e9}}
    lines = [{**machine, "commit": "0000000"}, {"section": "digest", "round": 0, "contestant": "cp", **sample}]
    lines += [machine, {"section": "r", "round": 0, "contestant": "cp", **sample}]
    (tmp_path / "cp.jsonl").write_text("\n".join(map(json.dumps, lines)))
    due = dict(line.split(": ", 1) for line in made["state"](tmp_path)["cp"])
    assert "not in this history" in due["copies-digest"]
    assert "not measured" in due["copies-cold"]
    assert "not in this history" not in due.get("copies-r", "")
    for name, hole in (("copies-digest", False), ("copies-cold", True), ("copies-r", False), ("peers", True)):
        text = made["filled"](f"<!-- {name} -->\n<!-- end -->\n", tmp_path)
        assert ("Not measured yet: `make bench-" in text) == hole
        assert ("0000000" in text) == (name == "copies-digest")


def test_spreads_are_quartiles_and_lines_least_squares() -> None:
    spread = spread_of([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (spread.median, spread.low, spread.high, spread.count) == (3, 2, 4, 5)
    line = fit([1.0, 2.0, 4.0], [3.0, 5.0, 9.0])
    assert (line.start, line.slope, line.r2) == pytest.approx((1, 2, 1))
    assert fit([0.0, 1.0, 2.0], [0.0, 1.0, 0.0]).r2 == pytest.approx(0)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.jsonl")), ids=lambda path: path.stem)
def test_a_committed_log_says_which_machine_and_how_many_rounds(path: Path) -> None:
    machine = json.loads(path.read_text().splitlines()[0])
    assert machine["section"] == "machine"
    assert machine["options"]["rounds"] >= 1
    assert not [line for line in read_log(path) if "failed" in line]
