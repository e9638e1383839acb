"""Where parameters lie in a checkpoint, held against what save_pretrained wrote for real models in both formats."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distmerge.adapter.naming.conversion import ModelNames, read_names
from distmerge.adapter.naming.slots import Slot
from tests import models

VLMS = ("llava", "llava_next", "gemma3", "paligemma")


@dataclass(frozen=True)
class Saved:
    """A checkpoint, and the values that the model had."""

    folder: Path
    tensors: dict[str, Tensor]
    state: dict[str, Tensor]


def names_of(folder: Path, tensors: dict[str, Tensor]) -> ModelNames:
    names = read_names(folder, {name: tuple(value.shape) for name, value in tensors.items()})
    assert isinstance(names, ModelNames), names
    return names


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """The checkpoint of the model `name`, in the format of old checkpoints or of the modules. Read only."""
    made: dict[tuple[str, bool], Saved] = {}

    def get(name: str, original: bool = True) -> Saved:
        if (name, original) not in made:
            folder = models.save(name, tmp_path_factory.mktemp(name), original=original)
            state = models.build(name).state_dict()
            made[name, original] = Saved(folder, load_file(folder / "model.safetensors"), state)
        return made[name, original]

    return get


def assert_filled(names: ModelNames, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Every parameter's slots cover it once and hold its values; every tensor is in a slot."""
    assert list(names.shapes) == list(state)
    tied = {name for group in names.tied for name in group}
    used: list[str] = []
    for name, value in state.items():
        assert names.shapes[name] == tuple(value.shape)
        slots = names.slots(name)
        assert slots or name in tied, f"{name} is not found"
        covered = torch.zeros(value.shape)
        for slot in slots:
            assert torch.equal(models.cut(value, slot), tensors[slot.name]), slot
            covered[tuple(slice(a, a + n) for a, n in zip(slot.starts, slot.sizes, strict=True))] += 1
        assert not slots or torch.all(covered == 1), name
        used += [slot.name for slot in slots]
    assert sorted(used) == sorted(tensors)


def described(folder: Path, kind: str, *, original: bool = True, backwards: bool = False, **config: Any) -> ModelNames:
    """The names of a checkpoint of the class `kind` that has shapes only, too many for values."""
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    if not hasattr(transformers, kind):
        pytest.skip(f"this transformers has no {kind}")
    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    model.config.architectures = [kind]
    model.config.save_pretrained(folder)
    tensors = dict(model.state_dict())
    tensors = revert_weight_conversion(model, tensors) if original else tensors
    return names_of(folder, dict(sorted(tensors.items(), reverse=backwards)))


@pytest.mark.parametrize("original", [True, False], ids=["original", "modules"])
@pytest.mark.parametrize("name", models.NAMES)
def test_slots_partition_every_parameter_and_hold_what_was_saved(
    saved: Callable[..., Saved], name: str, original: bool
) -> None:
    one = saved(name, original)
    assert_filled(names_of(one.folder, one.tensors), one.tensors, one.state)


@pytest.mark.parametrize("original", [True, False], ids=["original", "modules"])
@pytest.mark.parametrize("name", models.NAMES)
def test_a_path_of_modules_or_of_old_checkpoints_names_its_part_on_either_format(
    saved: Callable[..., Saved], name: str, original: bool
) -> None:
    one, old = saved(name, original), saved(name, True)
    names = names_of(one.folder, one.tensors)
    for path, value in one.state.items():
        assert names.find(path) == Slot.whole(path, tuple(value.shape))
    for path, tensor in old.tensors.items():
        slot = names.find(path)
        assert slot is not None, path
        assert torch.equal(models.cut(one.state[slot.name], slot), tensor)


@pytest.mark.parametrize("original", [True, False], ids=["original", "modules"])
def test_a_path_of_an_expert_names_its_box_of_the_fused_parameter(saved: Callable[..., Saved], original: bool) -> None:
    one = saved("mixtral", original)
    found = names_of(one.folder, one.tensors).find("model.layers.1.block_sparse_moe.experts.2.w3.weight")
    gate_up = "model.layers.1.mlp.experts.gate_up_proj"
    assert found == Slot(name=gate_up, starts=(2, 20, 0), sizes=(1, 20, 32), order=(1, 2))


@pytest.mark.parametrize("original", [True, False], ids=["original", "modules"])
@pytest.mark.parametrize("name", VLMS)
def test_the_names_of_the_releases_between_are_found(saved: Callable[..., Saved], name: str, original: bool) -> None:
    one = saved(name, original)
    names = names_of(one.folder, one.tensors)
    towers = [path for path in one.state if path.startswith("model.vision_tower.")]
    if ".vision_model." in towers[0]:
        pytest.skip("the modules of this transformers still have these names")
    for path in towers:
        between = path.replace("model.vision_tower.", "model.vision_tower.vision_model.")
        assert names.find(between) == names.find(path)
        assert names.find(between.removeprefix("model.")) == names.find(path)


@pytest.mark.parametrize("name", VLMS)
def test_a_vision_tower_with_the_prefix_of_the_hub_is_found(saved: Callable[..., Saved], name: str) -> None:
    one = saved(name)
    if any(".vision_model." in key for key in one.tensors):
        pytest.skip("this transformers still saves these names")
    hub = {key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in one.tensors.items()}
    assert_filled(names_of(one.folder, hub), hub, one.state)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3", "phimoe"])
def test_layers_may_be_fused_and_others_not(saved: Callable[..., Saved], name: str) -> None:
    old, new = saved(name, True), saved(name, False)
    mixed = {key: value for key, value in old.tensors.items() if ".layers.1." not in key}
    mixed |= {key: value for key, value in new.tensors.items() if ".layers.1." in key}
    assert mixed.keys() not in (old.tensors.keys(), new.tensors.keys())
    assert_filled(names_of(old.folder, mixed), mixed, old.state)


def test_experts_that_are_transposed_on_disk_are_seen_by_their_shapes(saved: Callable[..., Saved]) -> None:
    one = saved("qwen3_vl_moe")
    down = one.tensors.get("model.language_model.layers.0.mlp.experts.down_proj")
    if down is None or down.shape != (3, 32, 20):
        pytest.skip("the experts of this transformers are those of the file")
    hub = {
        key: value.transpose(1, 2).contiguous() if ".experts." in key else value for key, value in one.tensors.items()
    }
    names = names_of(one.folder, hub)
    assert_filled(names, hub, one.state)
    assert names.slots("model.language_model.layers.0.mlp.experts.down_proj")[0].order == (0, 2, 1)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_the_prefix_of_the_base_model_may_be_missing_on_either_side(saved: Callable[..., Saved], name: str) -> None:
    one = saved(name)
    bare = {key.removeprefix("model."): value for key, value in one.tensors.items()}
    names = names_of(one.folder, bare)
    assert_filled(names, bare, one.state)
    assert names.find("layers.0.self_attn.q_proj.weight") == names.find("model.layers.0.self_attn.q_proj.weight")


def test_the_class_may_be_the_bare_base_model(saved: Callable[..., Saved], tmp_path: Path) -> None:
    one = saved("mixtral")
    config = json.loads((one.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["MixtralModel"]}))
    names = names_of(tmp_path, one.tensors)
    gate_up = "layers.0.mlp.experts.gate_up_proj"
    assert [slot.name for slot in names.slots(gate_up)] == sorted(
        name for name in one.tensors if ".0.block" in name and name.endswith(("w1.weight", "w3.weight"))
    )
    for path in (gate_up, f"model.{gate_up}"):
        assert names.find(path) == Slot.whole(gate_up, (3, 40, 32))
    assert names.find("model.layers.0.block_sparse_moe.experts.0.w1.weight") == names.find(
        "layers.0.block_sparse_moe.experts.0.w1.weight"
    )


@pytest.mark.parametrize(
    "path",
    [
        "",
        "model",
        "model.layers.9.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.q_proj.weight.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "model.layers.0.block_sparse_moe.experts.-1.w1.weight",
        "model.layers.0.block_sparse_moe.experts.00.w1.weight",
        "model.layers.0.block_sparse_moe.experts.w1.weight",
        "model.layers.0.block_sparse_moe.experts.0.w4.weight",
        "model.layers.2.block_sparse_moe.experts.0.w1.weight",
        "model.layers.0.mlp.rotary_emb.inv_freq",
        "lm_head.bias",
    ],
)
def test_an_unknown_path_is_nothing(saved: Callable[..., Saved], path: str) -> None:
    one = saved("mixtral")
    assert names_of(one.folder, one.tensors).find(path) is None


def test_tensors_that_the_class_lacks_change_nothing(saved: Callable[..., Saved]) -> None:
    one = saved("deepseek_v3")
    extra = {key.replace(".1.", ".3.", 1): value for key, value in one.tensors.items() if ".layers.1." in key}
    extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    names = names_of(one.folder, one.tensors | extra)
    assert_filled(names, one.tensors, one.state)
    assert not any(names.find(key) for key in extra)


def test_a_parameter_of_which_the_checkpoint_lacks_a_part_has_no_slots(saved: Callable[..., Saved]) -> None:
    one = saved("mixtral")
    key = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    names = names_of(one.folder, {name: value for name, value in one.tensors.items() if name != key})
    assert names.slots("model.layers.1.mlp.experts.gate_up_proj") == ()
    assert len(names.slots("model.layers.0.mlp.experts.gate_up_proj")) == 6


@pytest.mark.parametrize("shape", [(20, 31), (32, 20), (640,), (20, 32, 1)])
def test_a_tensor_of_another_shape_is_no_part(saved: Callable[..., Saved], shape: tuple[int, ...]) -> None:
    one = saved("mixtral")
    key = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    names = names_of(one.folder, one.tensors | {key: torch.zeros(shape)})
    assert names.slots("model.layers.1.mlp.experts.gate_up_proj") == ()


@pytest.mark.parametrize(
    ("kind", "parameter", "tensor"),
    [
        ("HrmText", "model.H_module.layers.0.mlp.up_proj.weight", "model.H_module.layers.0.mlp.gate_up_proj.weight"),
        ("Inkling2", "model.layers.0.mlp.experts.gate_up_proj", "model.llm.layers.0.mlp.experts.w13_weight"),
    ],
    ids=["joined", "interleaved"],
)
def test_a_tensor_that_is_no_box_of_one_parameter_is_not_guessed(
    tmp_path: Path, kind: str, parameter: str, tensor: str
) -> None:
    names = described(tmp_path, f"{kind}ForCausalLM")
    assert parameter in names.shapes
    assert names.slots(parameter) == ()
    assert names.find(tensor) is None
    assert names.find(parameter) == Slot.whole(parameter, names.shapes[parameter])


KIMI_TEXT = {"num_hidden_layers": 1, "n_routed_experts": 8, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.mark.parametrize("backwards", [True, False])
def test_renamings_that_depend_on_each_other_do_not_depend_on_the_order_of_the_tensors(
    tmp_path: Path, backwards: bool
) -> None:
    config = {"text_config": KIMI_TEXT, "vision_config": {"num_hidden_layers": 1}}
    names = described(tmp_path, "Kimi_K25ForConditionalGeneration", backwards=backwards, **config)
    old, new = "vision_tower.encoder.blocks.0", "model.vision_tower.layers.0"
    for before, after in (("mlp.fc1", "mlp.fc2"), ("mlp.fc0", "mlp.fc1"), ("norm1", "norm2"), ("norm0", "norm1")):
        (slot,) = names.slots(f"{new}.{after}.weight")
        assert slot.name == f"{old}.{before}.weight"
        assert names.find(slot.name) == names.find(f"{new}.{after}.weight")


@pytest.mark.parametrize("first", ["mlp.fc0", "mlp.fc1"])
def test_a_path_that_means_something_only_beside_others_is_nothing(tmp_path: Path, first: str) -> None:
    config = {"text_config": KIMI_TEXT, "vision_config": {"num_hidden_layers": 1}}
    names = described(tmp_path, "Kimi_K25ForConditionalGeneration", original=False, **config)
    for name in (first, "mlp.fc1", "mlp.fc0"):
        assert names.find(f"vision_tower.encoder.blocks.0.{name}.weight") is None


def test_names_of_modules_stand_where_a_renaming_of_old_names_would_change_them(tmp_path: Path) -> None:
    names = described(tmp_path, "DeepseekV4ForCausalLM", original=False, num_hidden_layers=1)
    assert names.slots("model.norm.weight") == (Slot.whole("model.norm.weight", names.shapes["model.norm.weight"]),)
    assert names.find("model.norm.weight") == Slot.whole("model.norm.weight", names.shapes["model.norm.weight"])


@pytest.mark.parametrize("rows", [56, 64])
def test_a_parameter_that_is_there_twice_has_no_slots(saved: Callable[..., Saved], rows: int) -> None:
    one = saved("llama")
    names = names_of(one.folder, one.tensors | {"embed_tokens.weight": torch.zeros(rows, 32)})
    assert names.slots("model.embed_tokens.weight") == ()


def test_a_vocabulary_has_the_size_that_it_has_on_disk(saved: Callable[..., Saved]) -> None:
    one = saved("mixtral")
    names = names_of(one.folder, one.tensors | {"lm_head.weight": torch.zeros(64, 32)})
    assert names.shapes["lm_head.weight"] == (64, 32)
    assert names.slots("lm_head.weight") == (Slot.whole("lm_head.weight", (64, 32)),)
    assert names.find("lm_head.weight") == Slot.whole("lm_head.weight", (64, 32))


def test_groups_are_tied_only_where_the_configuration_ties(saved: Callable[..., Saved]) -> None:
    def tied(name: str) -> tuple[tuple[str, ...], ...]:
        return names_of(saved(name).folder, saved(name).tensors).tied

    assert tied("llama_tied") == (("model.embed_tokens.weight", "lm_head.weight"),)
    assert tied("gpt2") == (("transformer.wte.weight", "lm_head.weight"),)
    assert tied("llama") == tied("gemma3") == ()


def test_only_experts_that_the_class_marks_are_transposed(saved: Callable[..., Saved]) -> None:
    gpt_oss, mixtral = (names_of(saved(name).folder, saved(name).tensors) for name in ("gpt_oss", "mixtral"))
    assert gpt_oss.is_transposed("model.layers.0.mlp.experts")
    assert not gpt_oss.is_transposed("model.layers.0.mlp")
    assert not mixtral.is_transposed("model.layers.0.mlp.experts")
    assert not mixtral.is_transposed("no.such.module")


def test_a_checkpoint_of_deepseek_v3_takes_seconds(tmp_path: Path) -> None:
    config = json.loads((models.save("deepseek_v3", tmp_path) / "config.json").read_text())
    sizes = {
        "num_hidden_layers": 61,
        "n_routed_experts": 256,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    disk = {
        f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight": (32, 20) if kind == "down" else (20, 32)
        for layer in range(3, 62)
        for expert in range(256)
        for kind in ("gate", "up", "down")
    }
    before = time.process_time()
    names = read_names(tmp_path, disk)
    assert isinstance(names, ModelNames)
    slots = [names.slots(f"model.layers.{layer}.mlp.experts.gate_up_proj") for layer in range(3, 61)]
    assert time.process_time() - before < 30
    assert {len(found) for found in slots} == {512}
    assert sum(slot.numel for slot in slots[0]) == math.prod((256, 40, 32))
