"""Experts: merged one by one on any number of ranks, wherever their tensors lie, without their neighbours in memory."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import factories
from tests.conftest import Command, tree
from tests.ranks.launching import assert_absent_or_whole, finished_segments, launch
from tests.ranks.test_memory import BUDGET, MERGE, PEAK, peak

pytestmark = pytest.mark.ranks

EXPERTS, HIDDEN, INNER = 6, 512, 640


def _model() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
    )
    return transformers.MixtralForCausalLM(config).to(torch.bfloat16)


@dataclass(frozen=True)
class Experts:
    """A base whose experts lie in several shards, an adapter on all of them, and the output of one rank."""

    args: tuple[object, ...]
    files: dict[str, str]


@pytest.fixture(scope="module", params=["per-expert", "fused"])
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Experts:
    folder = tmp_path_factory.mktemp("experts")
    model = _model()
    fused = request.param == "fused"
    model.save_pretrained(folder / "base", max_shard_size="7MB", save_original_format=not fused)
    shards: dict[str, set[str]] = {}
    for name, file in json.loads((folder / "base/model.safetensors.index.json").read_text())["weight_map"].items():
        if ".experts." in name:
            shards.setdefault(name.split(".experts.")[0], set()).add(file)
    assert all(len(files) > 1 for files in shards.values()), "the experts of a layer must lie in several shards"
    adapter = factories.save_adapter(
        folder / "lora",
        model=_model(),
        r=3,
        alpha=5,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    factories.merge(folder / "base", adapter, folder / "one")
    return Experts(args=("--base", folder / "base", "--adapter", adapter), files=tree(folder / "one"))


def test_experts_give_the_same_bytes_on_every_number_of_ranks(
    experts: Experts, distmerge: Command, tmp_path: Path
) -> None:
    for nproc, budget in ((2, "2GiB"), (3, "128MiB")):
        output = tmp_path / str(nproc)
        distmerge("merge", *experts.args, "--output", output, "--memory-budget", budget, "--nproc", nproc)
        assert tree(output) == experts.files


@pytest.mark.parametrize("experts", ["per-expert"], indirect=True)
def test_a_merge_of_experts_that_is_killed_is_finished_by_the_same_command(experts: Experts, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with launch(*experts.args, output=output, nproc=2) as running:
        running.until_journal_has(1)
        for rank in running.ranks().values():
            rank.send_signal(signal.SIGKILL)
        running.wait()
    assert_absent_or_whole(output, experts.files)
    if not output.exists():
        assert finished_segments(running.work)
    with launch(*experts.args, output=output, nproc=2) as again:
        assert again.wait() == 0, again.stderr
    assert tree(output) == experts.files


@pytest.mark.real
def test_a_stack_of_experts_larger_than_the_budget_is_merged_within_it(tmp_path: Path) -> None:
    shape = (64, 4096, 1024)  # 512 MiB of bfloat16, twice the budget
    base, adapter, output = (tmp_path / name for name in ("base", "lora", "merged"))
    base.mkdir()
    adapter.mkdir()
    stack = torch.randn(shape[1:]).bfloat16().expand(shape).contiguous()
    assert stack.nbytes >= 2 * BUDGET
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({name: stack}, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    del stack
    key = "base_model.model.model.layers.0.mlp.experts"
    factors = {"A": torch.randn(64 * 4, 1024), "B": torch.randn(4096, 64 * 4)}
    save_file(
        {f"{key}.lora_{letter}.weight": factor for letter, factor in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_parameters": ["mlp.experts.gate_up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.21.2"}))
    largest = peak(
        MERGE,
        *("merge", "--base", base, "--adapter", adapter, "--output", output),
        *("--nproc", 1, "--memory-budget", BUDGET),
    )
    imported = peak("import torch" + PEAK)
    print(f"import torch: {imported / 2**20:.1f} MiB, peak {largest / 2**20:.1f} MiB, budget: {BUDGET / 2**20:.0f} MiB")
    assert largest < imported + BUDGET
    assert json.loads((output / "merge_receipt.json").read_text())["ledger"]
    shutil.rmtree(output)
