"""What the commands print, where, and with which exit code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import factories
from tests.attacks.scene import traces
from tests.cli.conftest import Cli, Inputs
from tests.conftest import Command, environment
from tests.factories import edit_json, rewrite_adapter


@pytest.fixture
def own(inputs: Inputs, tmp_path: Path) -> Inputs:
    """Inputs that the test may change."""
    shutil.copytree(inputs.base, tmp_path / "base")
    shutil.copytree(inputs.adapter, tmp_path / "lora")
    return Inputs(base=tmp_path / "base", adapter=tmp_path / "lora", output=tmp_path / "out")


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in (folder, *folder.rglob("*"))}


# -- one JSON object


def test_json_is_exactly_one_object_on_stdout(cli: Cli, inputs: Inputs) -> None:
    keys = {
        ("plan", *inputs.folders): {"plan", "kinds", "adapters", "files", "warnings", "room_needed", "memory_per_rank"},
        ("merge", *inputs.folders): {"output", "num_adapter_tensors", "num_files", "nbytes", "seconds"},
        ("verify", inputs.output): {"num_files", "num_tensors", "num_adapter_tensors", "recomputed"},
        ("inspect", inputs.base): {"kind", "tensors", "parameters", "formats"},
        ("inspect", inputs.adapter): {"kind", "r", "scaling", "modules"},
        ("inspect", inputs.output): {"kind", "merged"},
    }
    for command, expected in keys.items():
        said = cli(*command, "--json")
        lines = said.out.splitlines()
        assert len(lines) == 1
        assert expected <= json.loads(lines[0]).keys()


def test_without_json_a_merge_keeps_stdout_for_nobody(cli: Cli, inputs: Inputs) -> None:
    said = cli("merge", *inputs.folders)
    assert said.out == ""
    assert str(inputs.output) in said.err


def test_every_line_of_a_merge_is_said_once(cli: Cli, inputs: Inputs) -> None:
    lines = cli("merge", *inputs.folders).err.splitlines()
    assert len(lines) == len(set(lines))
    assert [line.split()[0] for line in lines if not line.startswith(("warning", "merging"))] == [
        "plan",
        "proven",
        "done",
    ]


@pytest.mark.ranks
def test_json_of_several_ranks_is_one_object_too(distmerge: Command, inputs: Inputs) -> None:
    done = distmerge("merge", *inputs.folders, "--json", "--nproc", 2)
    assert json.loads(done.stdout)["num_adapter_tensors"] == 28
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.ranks
def test_a_refusal_on_several_ranks_is_said_once(distmerge: Command, own: Inputs) -> None:
    edit_json(own.adapter / "adapter_config.json", lora_alpha=None)
    done = distmerge("merge", *own.folders, "--nproc", 2, code=3)
    assert done.stderr.count("lora_alpha must be") == 1
    assert done.stderr.count("error") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not own.output.exists()


# -- plan


def test_plan_writes_nothing(cli: Cli, own: Inputs) -> None:
    before, dates = traces(own.output.parent), stamps(own.output.parent)
    cli("plan", *own.folders)
    cli("plan", *own.folders, "--output", own.output.parent / "a" / "b" / "c")
    assert (traces(own.output.parent), stamps(own.output.parent)) == (before, dates)


def test_plan_lists_what_a_person_decides_by(cli: Cli, inputs: Inputs) -> None:
    said = cli("plan", *inputs.folders)
    assert said.err == ""
    rows = {line.split()[0]: line for line in said.out.splitlines()}
    assert {"base", "adapter", "merge", "copy", "output", "device", "memory", "room"} <= rows.keys()
    assert "14 tensors" in rows["merge"]
    assert "28 tensors" in rows["adapter"]
    assert "shards" in rows["output"]
    assert "cpu" in rows["device"]
    assert "free" in rows["room"]
    assert "read" in rows["merge"]
    assert "write" in rows["merge"]


def test_plan_says_what_is_dequantized(cli: Cli, packed_base: Path, adapter: Path, tmp_path: Path) -> None:
    said = cli("plan", "--base", packed_base, "--adapter", adapter, "--output", tmp_path / "out")
    assert "14 tensors are dequantized" in said.out
    assert "config.json" in said.out


def _warnings(cli: Cli, own: Inputs, *args: object) -> list[str]:
    text = [line for line in cli("plan", *own.folders, *args).out.splitlines() if line.startswith("warning")]
    listed: list[str] = json.loads(cli("plan", "--json", *own.folders, *args).out)["warnings"]
    assert len(text) == len(listed)
    said = cli("merge", *own.folders, *args).err.splitlines()
    assert [line for line in said if line.startswith("warning")] == text
    return listed


def test_a_base_of_another_name_is_a_warning(cli: Cli, own: Inputs) -> None:
    edit_json(own.adapter / "adapter_config.json", base_model_name_or_path="org/another-model")
    assert any("another-model" in text and "base" in text for text in _warnings(cli, own))


def test_a_base_of_the_same_name_is_none(cli: Cli, own: Inputs) -> None:
    for name in ("org/base", "/somewhere/base", "base", "", None):
        edit_json(own.adapter / "adapter_config.json", base_model_name_or_path=name)
        facts = json.loads(cli("plan", "--json", *own.folders).out)
        assert facts["warnings"] == [], name


def test_a_4_bit_base_in_the_adapter_and_a_16_bit_one_given_is_a_warning(cli: Cli, own: Inputs) -> None:
    edit_json(own.adapter / "adapter_config.json", base_model_name_or_path="unsloth/base-bnb-4bit")
    assert any("4-bit" in text and "16-bit" in text for text in _warnings(cli, own))


def test_a_targeted_module_without_weights_is_a_warning(cli: Cli, own: Inputs) -> None:
    rewrite_adapter(own.adapter, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n})
    assert any("layers.1.mlp.up_proj" in text for text in _warnings(cli, own))


def test_a_module_that_the_configuration_does_not_target_is_a_warning(cli: Cli, own: Inputs) -> None:
    edit_json(own.adapter / "adapter_config.json", target_modules=["q_proj"])
    assert any("target_modules" in text and "12" in text for text in _warnings(cli, own))


# -- inspect


def test_inspect_tells_what_a_folder_holds(cli: Cli, inputs: Inputs, packed_base: Path, tmp_path: Path) -> None:
    cli("merge", *inputs.folders)
    facts = {
        name: json.loads(cli("inspect", path, "--json").out)
        for name, path in {
            "base": inputs.base,
            "packed": packed_base,
            "adapter": inputs.adapter,
            "output": inputs.output,
        }.items()
    }
    assert [facts[name]["kind"] for name in facts] == ["base", "base", "adapter", "output"]
    assert facts["base"]["formats"] == {"BF16": facts["base"]["tensors"]}
    assert facts["packed"]["formats"]["nf4 (BF16)"] == 14
    assert facts["packed"]["parameters"] == facts["base"]["parameters"]
    assert facts["adapter"]["r"] == {"4": 14}
    assert facts["adapter"]["scaling"] == {"1.5": 14}
    assert facts["output"]["merged"][0]["num_tensors"] == 28
    for path in (inputs.base, packed_base, inputs.adapter, inputs.output):
        text = cli("inspect", path)
        assert "parameters" in text.out
        assert text.err == ""


@pytest.mark.parametrize("text", ["a\x1b[31mred", "a\x07b", "a\nkind          forged", "\ud800"])
def test_inspect_shows_text_of_strangers_safely(cli: Cli, own: Inputs, text: str) -> None:
    from distmerge.inspection import inspect, render

    edit_json(own.adapter / "adapter_config.json", base_model_name_or_path=text)
    edit_json(own.base / "config.json", model_type=text)
    for folder in (own.adapter, own.base):
        shown = render(inspect(folder))  # the terminal's view: without one, click takes colours away
        assert all(char.isprintable() or char == "\n" for char in shown), repr(shown)
        assert sum(line.startswith("kind") for line in shown.splitlines()) == 1
        cli("inspect", folder)
        cli("inspect", folder, "--json")


# -- verify


def test_verify_says_what_it_checked(cli: Cli, inputs: Inputs) -> None:
    cli("merge", *inputs.folders)
    assert "28 adapter tensors" in cli("verify", inputs.output).out
    said = cli("verify", inputs.output, "--base", inputs.base, "--adapter", inputs.adapter)
    assert "14 merged tensors" in said.out
    assert "float64" in said.out


@pytest.mark.parametrize("which", ["first", "last", "config.json", "model.safetensors.index.json"])
def test_verify_exits_with_4_on_a_flipped_byte(cli: Cli, inputs: Inputs, which: str) -> None:
    cli("merge", *inputs.folders)
    shards = sorted(inputs.output.glob("*.safetensors"))
    path = {"first": shards[0], "last": shards[-1]}.get(which, inputs.output / which)
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    said = cli("verify", inputs.output, code=4)
    assert path.name in said.err
    assert "sha256" in said.err
    assert said.out == ""


def _cut(output: Path) -> None:
    path = sorted(output.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "spoil",
    [
        _cut,
        lambda output: sorted(output.glob("*.safetensors"))[0].unlink(),
        lambda output: (output / "config.json").unlink(),
        lambda output: (output / "extra.safetensors").write_bytes(b"x"),
        lambda output: (output / "pytorch_model.bin").write_bytes(b"x"),
        lambda output: (output / "adapter_config.json").write_text("{}"),
    ],
    ids=["cut", "shard gone", "config gone", "stray weights", "stray pickle", "stray adapter"],
)
def test_verify_exits_with_4_on_any_other_damage(cli: Cli, inputs: Inputs, spoil: Callable[[Path], Any]) -> None:
    cli("merge", *inputs.folders)
    spoil(inputs.output)
    assert cli("verify", inputs.output, code=4).out == ""


def test_verify_tells_programs_what_is_wrong(cli: Cli, inputs: Inputs) -> None:
    cli("merge", *inputs.folders)
    for path in sorted(inputs.output.glob("*.safetensors"))[:2]:
        path.write_bytes(path.read_bytes()[:-1])
    said = cli("verify", inputs.output, "--json", code=4)
    findings = json.loads(said.out)["findings"]
    assert [finding.keys() for finding in findings] == [{"where", "what", "hint"}] * 2
    assert said.err.count("error:") == 1
    assert all(finding["where"] in said.err for finding in findings)


@pytest.mark.parametrize("depth", ["sample", "probe", "full"])
def test_verify_says_how_deep_it_looked(depth: str, cli: Cli, inputs: Inputs) -> None:
    cli("merge", *inputs.folders)
    said = cli("verify", inputs.output, "--base", inputs.base, "--adapter", inputs.adapter, "--depth", depth)
    words = {"sample": "100.0 % were looked at", "probe": "14 merged linears", "full": "56 norms"}
    assert words[depth] in said.out


def test_verify_refuses_other_inputs_than_those_of_the_merge(cli: Cli, own: Inputs) -> None:
    cli("merge", *own.folders)
    inputs = ("--base", own.base, "--adapter", own.adapter)
    cli("verify", own.output, *inputs)
    assert "--weight" in cli("verify", own.output, *inputs, "--weight", "2", code=3).err
    cli("verify", own.output, *inputs, "--adapter", own.adapter, code=3)
    rewrite_adapter(own.adapter, lambda tensors: {name: tensor * 2 for name, tensor in tensors.items()})
    cli("verify", own.output, *inputs, code=3)


def test_verify_notices_another_base(cli: Cli, own: Inputs, tmp_path: Path) -> None:
    cli("merge", *own.folders)
    other = factories.save_base(tmp_path / "other", hidden_size=64, rms_norm_eps=1e-3)
    path = other / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    said = cli("verify", own.output, "--base", other, "--adapter", own.adapter, code=4)
    assert said.err.startswith("error: ")


# -- a second time


def test_a_second_identical_merge_is_done_already_and_changes_no_file(cli: Cli, inputs: Inputs) -> None:
    cli("merge", *inputs.folders)
    before = stamps(inputs.output)
    said = cli("merge", *inputs.folders, "--json")
    assert "already" in said.err
    assert stamps(inputs.output) == before
    assert json.loads(said.out)["num_adapter_tensors"] == 28
    assert not inputs.output.with_name("out.distmerge").exists()


@pytest.mark.parametrize("extra", [("--dtype", "float32"), ("--weight", "0.5"), ("--max-shard-size", "100KB")])
def test_a_second_merge_with_other_options_is_refused(cli: Cli, inputs: Inputs, extra: tuple[str, ...]) -> None:
    cli("merge", *inputs.folders)
    before = stamps(inputs.output)
    said = cli("merge", *inputs.folders, *extra, code=3)
    assert "--overwrite" in said.err.split("hint:")[1]
    assert stamps(inputs.output) == before
    cli("merge", *inputs.folders, *extra, "--overwrite")
    cli(
        "verify",
        inputs.output,
        "--base",
        inputs.base,
        "--adapter",
        inputs.adapter,
        *extra[: 2 * (extra[0] == "--weight")],
    )
    assert not inputs.output.with_name("out.distmerge").exists()


def test_options_that_cannot_change_the_output_do_not_count_as_other(cli: Cli, inputs: Inputs) -> None:
    cli("merge", *inputs.folders)
    assert "already" in cli("merge", *inputs.folders, "--memory-budget", "1GiB", "--timeout", "5").err


def test_overwrite_never_replaces_a_foreign_folder(cli: Cli, inputs: Inputs) -> None:
    inputs.output.mkdir()
    (inputs.output / "thesis.txt").write_text("mine")
    said = cli("merge", *inputs.folders, "--overwrite", code=3)
    assert "not written by distmerge" in said.err
    assert (inputs.output / "thesis.txt").read_text() == "mine"


def test_plan_refuses_what_merge_refuses(cli: Cli, inputs: Inputs) -> None:
    cli("merge", *inputs.folders)
    merge = cli("merge", *inputs.folders, "--dtype", "float32", code=3)
    plan = cli("plan", *inputs.folders, "--dtype", "float32", code=3)
    assert plan.err == merge.err


# -- streams


def test_a_reader_that_leaves_early_is_no_error(inputs: Inputs) -> None:
    command = [sys.executable, "-m", "distmerge", "inspect", str(inputs.base)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()
    error = child.stderr.read()
    assert (child.wait(timeout=60), error) == (0, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&- <&-"])
def test_closed_streams_do_not_stop_a_merge(inputs: Inputs, closed: str) -> None:
    program = f'exec "$0" -m distmerge merge --json "$@" {closed}'
    command = ["bash", "-c", program, sys.executable, *map(str, inputs.folders)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert inputs.output.is_dir()


def test_a_full_stdout_is_an_error_in_words(inputs: Inputs) -> None:
    program = 'exec "$0" -m distmerge inspect "$1" > /dev/full'
    command = ["bash", "-c", program, sys.executable, str(inputs.base)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, timeout=120)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr


def test_a_process_says_errors_once_without_colours_and_with_its_exit_code(distmerge: Command, own: Inputs) -> None:
    done = distmerge("merge", *own.folders, TERM="xterm-256color")
    assert "\x1b" not in done.stdout + done.stderr
    done = distmerge("merge", *own.folders, "--dtype", "float32", code=3)
    assert done.stdout == ""
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def test_the_module_and_the_program_are_the_same(inputs: Inputs) -> None:
    program = Path(sys.executable).with_name("distmerge")
    if not program.exists():
        pytest.skip("the program is not installed")
    done = subprocess.run([program, "inspect", inputs.base], capture_output=True, env=environment(), check=False)
    assert done.returncode == 0


@pytest.mark.ranks
def test_the_demo_runs_from_end_to_end(distmerge: Command, cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    done = distmerge("demo", "--output", folder, "--nproc", 2)
    assert "on 2 ranks" in done.stdout
    assert "float64" in done.stdout
    assert str(folder / "merged") in done.stdout
    cli("verify", folder / "merged")


# -- evaluate


@pytest.mark.filterwarnings("ignore")
def test_evaluate_says_its_verdict_in_words_and_as_json(cli: Cli, own: Inputs, tmp_path: Path) -> None:
    factories.add_tokenizer(own.base)
    cli("merge", *own.folders)
    (tmp_path / "text.txt").write_text(" ".join(factories.WORDS * 2))
    command = ("evaluate", own.output, "--base", own.base, "--adapter", own.adapter, "--text", tmp_path / "text.txt")
    said = cli(*command)
    assert re.search(r"^merged equals unmerged: mean KL \d\.\d\de-\d\d, top-1 \d+\.\d\d %$", said.out, re.MULTILINE)
    found = json.loads(cli(*command, "--json", "--max-tokens", "20").out)
    assert found["num_tokens"] == 20
    assert 0 < found["mean_kl"] < 1e-4
    said = cli(*command, "--max-kl", "0", code=4)
    assert "merged differs from unmerged" in said.err
    assert said.out == ""


def test_evaluate_says_what_to_install(cli: Cli, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("merge", *inputs.folders)
    monkeypatch.setitem(sys.modules, "peft", None)  # what an import finds that is not installed
    command = ("evaluate", inputs.output, "--base", inputs.base, "--adapter", inputs.adapter, "--text", __file__)
    said = cli(*command, code=2)
    assert "'peft' not installed" in said.err
    assert "pip install 'distmerge[evaluate]'" in said.err
