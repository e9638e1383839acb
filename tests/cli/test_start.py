"""How a merge starts: torch is imported once, and nothing that takes long is imported that the merge does not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment, tree

# What torch itself imports is torch's own choice; these it leaves alone.
HEAVY = {
    *("transformers", "tokenizers", "peft", "accelerate", "bitsandbytes", "huggingface_hub", "datasets"),
    *("matplotlib", "rich", "yaml", "scipy", "pandas", "sympy", "psutil", "filelock"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.elastic", "torch.distributed.launcher"),
    *("torch.distributed.run", "distmerge.audit", "distmerge.evaluation", "distmerge.report.figures"),
}
# Runs the command line, and at the end of each process that has Python code of ours says what it was.
PROGRAM = """
import json, os, sys, threading
def told(how):
    import torch
    facts = {"how": how, "pid": os.getpid(), "session": os.getsid(0), "parent": os.getppid(),
             "threads": torch.get_num_threads(), "rank": os.environ.get("RANK"),
             "heavy": sorted(HEAVY & sys.modules.keys())}
    os.write(2, (json.dumps(facts) + "\\n").encode())
forks = []
os.register_at_fork(after_in_child=lambda: forks.append(os.getpid()))
leave = os._exit
os._exit = lambda code: (told("forked" if forks else "exit"), leave(code))
from distmerge.cli.main import main
try:
    main()
finally:
    told("main")
"""


def merge(*args: object, **variables: str) -> list[dict[str, object]]:
    """What each process of `distmerge merge ARGS` says of itself at its end."""
    program = PROGRAM.replace("HEAVY", repr(HEAVY))
    command = [sys.executable, "-c", program, "merge", *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(**variables), check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("what", ["base", "packed_base", "adapter"])
def test_inspect_imports_no_torch(what: str, request: pytest.FixtureRequest) -> None:
    program = (
        "import sys; from distmerge.cli.main import main\n"
        "try: main()\n"
        "finally: print([n for n in ('torch', 'numpy', 'transformers') if n in sys.modules], file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, "inspect", str(request.getfixturevalue(what))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=60)
    assert done.stderr == "[]\n"
    assert done.stdout


@pytest.fixture
def inputs(base: Path, adapter: Path) -> tuple[object, ...]:
    return ("--base", base, "--adapter", adapter)


def test_a_plain_merge_imports_nothing_that_takes_long(inputs: tuple[object, ...], tmp_path: Path) -> None:
    (alone,) = merge(*inputs, "--output", tmp_path / "out", "--nproc", 1)
    assert alone["heavy"] == []


def test_ranks_are_forks_of_the_launcher_with_sessions_and_one_thread_each(
    inputs: tuple[object, ...], tmp_path: Path
) -> None:
    said = merge(*inputs, "--output", tmp_path / "two", "--nproc", 2, OMP_NUM_THREADS="")
    ranks, (launcher,) = [one for one in said if one["how"] == "forked"], [one for one in said if one["how"] == "main"]
    assert sorted(str(rank["rank"]) for rank in ranks) == ["0", "1"]
    assert all(rank["parent"] == launcher["pid"] and rank["session"] == rank["pid"] for rank in ranks)
    assert [rank["threads"] for rank in ranks] == [1, 1]
    assert launcher["rank"] is None
    assert [one["heavy"] for one in said] == [[]] * 3
    merge(*inputs, "--output", tmp_path / "one", "--nproc", 1)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_a_process_that_has_used_torch_is_not_forked(inputs: tuple[object, ...], tmp_path: Path) -> None:
    program = (
        "import os, sys, torch; os.register_at_fork(before=lambda: print('fork', file=sys.stderr))\n"
        "from distmerge.cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, "merge", *map(str, inputs), "--output", tmp_path / "out", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "fork" not in done.stderr
    assert (tmp_path / "out" / "merge_receipt.json").exists()
