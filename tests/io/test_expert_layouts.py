"""How the factors of experts lie in a file: by the release of PEFT, by the shapes, by who ordered the columns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distmerge import DistmergeError
from tests.factories import edit_json, load_folder, merge, rewrite_adapter
from tests.matrix import adapters, bases, exact
from tests.matrix.case import experts
from tests.oracles import assert_rounded_once

pytestmark = pytest.mark.filterwarnings("ignore")
NUM_EXPERTS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bases are, each made once."""
    return tmp_path_factory.mktemp("bases")


def trained(root: Path, folder: Path, name: str, naming: str = "hub", **fields: str | None) -> tuple[Path, Path]:
    """A base, and a LoRA on its experts alone, its configuration changed by `fields`."""
    base = bases.folder(root, name, naming)
    tuned = adapters.train(bases.load(base), "Lora", experts(name, targets=()).fields)
    (adapter,) = adapters.save(tuned, folder)
    edit_json(adapter / "adapter_config.json", **fields)
    return base, adapter


@pytest.mark.parametrize("version", ["0.17.1", "0.18.1", "0.19.0", "0.19.1", "0.21.2"])
@pytest.mark.parametrize("name", ["mixtral_square", "gpt_oss_square"])
def test_the_release_of_peft_says_how_square_experts_lie(name: str, version: str, root: Path, tmp_path: Path) -> None:
    base, adapter = trained(root, tmp_path / "adapter", name, peft_version=version)
    found = bases.load(merge(base, adapter, tmp_path / "out")).state_dict()
    wanted = exact.merged([(adapter, 1.0)], exact.original(bases.load(base)))
    square = [key for key, value in wanted.items() if value.exact.dim() == 3 and len({*value.exact.shape[1:]}) == 1]
    assert square
    for key in square:
        assert_rounded_once(found[key], wanted[key].exact, wanted[key].magnitude, terms=48, name=key)


def test_square_experts_of_an_unknown_release_are_refused(root: Path, tmp_path: Path) -> None:
    base, adapter = trained(root, tmp_path / "adapter", "mixtral_square", peft_version=None)
    with pytest.raises(DistmergeError, match=r"are square, and adapter_config\.json does not tell peft_version"):
        merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("naming", ["hub", "modules"])
def test_experts_that_are_not_square_lie_as_their_shapes_say(naming: str, root: Path, tmp_path: Path) -> None:
    base, adapter = trained(root, tmp_path / "adapter", "mixtral", naming)
    expected = load_folder(merge(base, adapter, tmp_path / "expected"))
    rewrite_adapter(adapter, on_the_first_dimension)
    edit_json(adapter / "adapter_config.json", peft_version="0.18.1")
    found = load_folder(merge(base, adapter, tmp_path / "out"))
    assert all(torch.allclose(found[key], expected[key], rtol=0, atol=1e-6) for key in expected)


def on_the_first_dimension(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same deltas as PEFT 0.17 and 0.18 held them: lora_A and lora_B have changed places."""
    swapped = {}
    for key, value in tensors.items():
        if "lora_B" in key:
            lora_a = value.reshape(value.shape[0], -1, NUM_EXPERTS).permute(2, 1, 0)
            swapped[key.replace("lora_B", "lora_A")] = lora_a.reshape(-1, value.shape[0])
        else:
            lora_b = value.reshape(NUM_EXPERTS, -1, value.shape[1]).permute(2, 1, 0)
            swapped[key.replace("lora_A", "lora_B")] = lora_b.reshape(value.shape[1], -1)
    return swapped


def test_columns_in_the_order_of_experts_give_the_same_merge_if_the_user_says_so(root: Path, tmp_path: Path) -> None:
    base, adapter = trained(root, tmp_path / "adapter", "mixtral")
    expected = load_folder(merge(base, adapter, tmp_path / "expected"))
    rewrite_adapter(adapter, expert_by_expert)
    found = load_folder(merge(base, adapter, tmp_path / "out", expert_b_order="expert-major"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    other = load_folder(merge(base, adapter, tmp_path / "other", expert_b_order="peft"))
    assert not all(torch.equal(other[key], expected[key]) for key in expected)


def expert_by_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value.reshape(value.shape[0], -1, NUM_EXPERTS).transpose(1, 2).flatten(1) if "lora_B" in key else value
        for key, value in tensors.items()
    }


def test_the_first_parameter_that_a_module_registers_is_wrapped_innermost(root: Path, tmp_path: Path) -> None:
    _, adapter = trained(root, tmp_path / "adapter", "mixtral")
    shapes = {key: tensor.shape for key, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    module = "base_model.model.model.layers.0.mlp.experts"
    assert shapes[f"{module}.base_layer.lora_B.weight"][0] == 40, "gate_up_proj"
    assert shapes[f"{module}.lora_B.weight"][0] == 32, "down_proj"
