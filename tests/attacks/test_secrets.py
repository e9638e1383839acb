"""Secrets of the user and of strangers' files: in nothing that is shown, written or told to other processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from distmerge import AdapterChoice, MergeConfig, launcher
from distmerge.adapter.saved import pickles
from distmerge.errors import MachineError, UsageError
from distmerge.inspection import inspect
from distmerge.report.folder import write_report
from distmerge.work import WorkFolder
from tests.attacks.scene import Scene
from tests.conftest import Command

TOKEN = "hf_" + "Qw7Er9Ty1" * 4
PASSWORD = "correct-horse-battery"
ADDRESS = f"https://me:{TOKEN}@huggingface.co/org/base?access_token={PASSWORD}"


def hold(folder: Path) -> list[str]:
    """The files below `folder` in which a secret stands."""
    found = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in found if any(word.encode() in path.read_bytes() for word in (TOKEN, PASSWORD))]


def test_what_a_run_writes_and_says_holds_no_secret(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HTTP_PASSWORD", PASSWORD)
    scene.spoil_config(base_model_name_or_path=ADDRESS)
    kept = scene.adapter.rename(scene.folder.parent / f"lora-{scene.folder.name}")  # the one file that holds them
    seen: list[str] = []
    discard = WorkFolder.discard

    def looked_at(self: WorkFolder) -> None:
        seen.extend(path.name for path in self.path.rglob("*"))
        assert hold(self.path) == []
        discard(self)

    monkeypatch.setattr(WorkFolder, "discard", looked_at)
    scene.merge(adapters=(kept,), run_log=scene.folder / "log.jsonl", profile=True, hash_inputs=True)
    write_report(scene.output, scene.folder / "report", run_log=scene.folder / "log.jsonl")
    assert {"manifest.json", "events.jsonl", "done"} <= set(seen)
    assert hold(scene.folder) == []
    said = capfd.readouterr()
    assert all(word not in said.out + said.err for word in (TOKEN, PASSWORD))
    assert TOKEN not in str(inspect(kept))
    receipt = json.loads((scene.output / "merge_receipt.json").read_text())
    assert receipt["adapters"][0]["base_model"] == "https://***@huggingface.co/org/base?access_token=***"


def test_what_a_failure_leaves_and_says_holds_no_secret(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> None:
        raise MachineError(f"cannot be reached: {ADDRESS}", where=TOKEN, hint=f"Authorization: Bearer {TOKEN}")

    monkeypatch.setattr("distmerge.stream.write_values", failing)
    with pytest.raises(MachineError) as caught:
        scene.merge()
    status = json.loads((scene.folder / "out.distmerge" / "status.json").read_text())
    assert "https://***@huggingface.co" in status["error"]
    assert hold(scene.folder) == []
    for text in (str(caught.value), repr(caught.value), capfd.readouterr().err):
        assert TOKEN not in text


@pytest.mark.parametrize("name", ["base", "adapter", "output", "initial-adapter"])
def test_an_address_in_place_of_a_folder_is_refused_without_its_password(name: str, scene: Scene) -> None:
    places: dict[str, Any] = {"base": scene.base, "adapter": scene.adapter, "output": scene.output}
    places[name.replace("-", "_")] = Path(ADDRESS)
    choice = AdapterChoice(folder=places["adapter"], initial=places.get("initial_adapter"))
    with pytest.raises(UsageError, match=rf"{name} is a URL, https:/\*\*\*@huggingface") as caught:
        MergeConfig(base=places["base"], adapters=(choice,), output=places["output"])
    assert all(word not in str(caught.value) for word in (TOKEN, PASSWORD))
    assert "hf download" in caught.value.hint


def test_no_secret_reaches_the_command_line_of_a_rank_or_the_environment_of_a_pickle(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PASSWORD)
    started: list[list[str]] = []

    class Noted:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    launcher.start_ranks(["merge", *scene.config().to_argv()], [{"RANK": "0"}])
    assert len(started) == 1
    assert all(word not in "\0".join(started[0]) for word in (TOKEN, PASSWORD))
    environment = pickles._environment()
    assert {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"}.isdisjoint(environment)
    assert "PATH" in environment


def test_a_traceback_is_shown_without_secrets(distmerge: Command, tmp_path: Path) -> None:
    fails = f"def fail(*_, **__):\n    raise ValueError({ADDRESS!r})\nmain.cli.main = fail\n"
    (tmp_path / "sitecustomize.py").write_text(f"import distmerge.cli.main as main\n{fails}")
    root = Path(__file__).parents[2]
    done = distmerge("inspect", "x", code=1, PYTHONPATH=f"{tmp_path}:{root}", HF_TOKEN=TOKEN)
    assert "ValueError: https://***@huggingface.co/org/base?access_token=***" in done.stderr
    assert all(word not in done.stderr for word in (TOKEN, PASSWORD))
