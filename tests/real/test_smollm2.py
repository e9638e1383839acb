"""A QLoRA that was really trained, merged into the packed model that it was trained on: the fine-tune survives.

Perplexity on held-out text tells. What PEFT makes of the same merge, packed again, is there to compare with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import oracles
from tests.conftest import Command, digests
from tests.factories import load_folder, merge
from tests.real import smollm2

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

NUM_TEXTS = 6


@dataclass(frozen=True)
class Folders:
    """The model in 16 bits and packed."""

    dense: Path
    packed: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    folder = tmp_path_factory.mktemp("smollm2")
    dense = smollm2.save_dense(folder / "SmolLM2-135M-Instruct")
    packed = folder / "SmolLM2-135M-Instruct-nf4"
    smollm2.packed_model(dense).save_pretrained(packed, max_shard_size="30MB")
    assert len(list(packed.glob("*.safetensors"))) >= 3
    yield Folders(dense=dense, packed=packed)
    for path in folder.rglob("*.safetensors"):
        path.unlink()


def test_a_merge_into_the_packed_base_predicts_as_the_unmerged_adapter_does(
    folders: Folders, torchrun: Command, tmp_path: Path
) -> None:
    import peft
    import transformers

    output = tmp_path / "merged"
    torchrun("merge", "--base", folders.packed, "--adapter", smollm2.ADAPTER, "--output", output, nproc=2)
    base = oracles.dense(load_folder(folders.packed))

    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert smollm2.quantization_of(output) is None
    merged = smollm2.perplexity(loaded.eval(), NUM_TEXTS)

    untuned = smollm2.perplexity(smollm2.model_of(folders.dense, base), NUM_TEXTS)
    adapted = peft.PeftModel.from_pretrained(smollm2.model_of(folders.dense, base), smollm2.ADAPTER)
    unmerged = smollm2.perplexity(adapted, NUM_TEXTS)

    repacked = peft.PeftModel.from_pretrained(smollm2.packed_model(folders.dense), smollm2.ADAPTER).merge_and_unload()
    repacked.save_pretrained(tmp_path / "repacked")
    packed_again = smollm2.perplexity(
        smollm2.model_of(folders.dense, oracles.dense(load_folder(tmp_path / "repacked"))), NUM_TEXTS
    )
    print(
        f"NF4 base {untuned:.3f}, with the adapter unmerged {unmerged:.4f}, merged {merged:.4f}, "
        f"merged by PEFT into 4 bits {packed_again:.3f}"
    )
    assert abs(merged / unmerged - 1) < 0.002
    assert merged < 0.7 * untuned
    assert packed_again > 1.2 * merged


def test_verify_recomputes_the_whole_merge_in_float64(
    folders: Folders, distmerge: Command, torchrun: Command, tmp_path: Path
) -> None:
    inputs = ("--base", folders.packed, "--adapter", smollm2.ADAPTER)
    torchrun("merge", *inputs, "--output", tmp_path / "two", "--max-shard-size", "100MB", nproc=2)
    assert len(digests(tmp_path / "two")) >= 3
    verified = distmerge("verify", tmp_path / "two", *inputs)
    assert "computed 210 merged tensors again in float64" in verified.stdout


def test_a_merge_into_the_original_weights_differs_and_loads(
    folders: Folders, torchrun: Command, tmp_path: Path
) -> None:
    import transformers

    output = tmp_path / "merged"
    torchrun("merge", "--base", folders.dense, "--adapter", smollm2.ADAPTER, "--output", output, nproc=2)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        output, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged = smollm2.perplexity(loaded.eval(), NUM_TEXTS)
    original = smollm2.perplexity(smollm2.model_of(folders.dense, load_folder(folders.dense)), NUM_TEXTS)
    print(f"16-bit base {original:.3f}, merged {merged:.4f}")
    assert merged < 0.9 * original


def test_the_original_weights_read_through_nf4_give_what_the_packed_checkpoint_gives(
    folders: Folders, distmerge: Command, torchrun: Command, tmp_path: Path
) -> None:
    adapter = ("--adapter", smollm2.ADAPTER)
    distmerge("merge", "--base", folders.packed, *adapter, "--output", tmp_path / "packed")
    expected = load_folder(tmp_path / "packed")
    simulated = ("merge", "--base", folders.dense, *adapter, "--simulate-quant", "nf4", "--output")
    distmerge(*simulated, tmp_path / "one", "--nproc", "1", "--memory-budget", "96MiB")
    torchrun(*simulated, tmp_path / "three", nproc=3)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    found = load_folder(tmp_path / "one")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_fitted_scales_lose_less_of_every_tensor_of_the_real_model(folders: Folders, tmp_path: Path) -> None:
    dense = load_folder(merge(folders.dense, smollm2.ADAPTER, tmp_path / "dense"))
    errors: dict[str, dict[str, float]] = {}
    for mode in ("plain", "fitted"):
        output = merge(folders.dense, smollm2.ADAPTER, tmp_path / mode, quantize="nf4", quantize_mode=mode)
        packed = oracles.dense(load_folder(output))
        errors[mode] = {name: float((packed[name].double() - dense[name].double()).norm()) for name in dense}
        print(f"{mode}: perplexity {smollm2.perplexity(smollm2.model_of(folders.dense, packed), NUM_TEXTS):.3f}")
    linears = [name for name, error in errors["plain"].items() if error > 0]
    assert len(linears) == 210
    assert all(errors["fitted"][name] < errors["plain"][name] for name in linears)
