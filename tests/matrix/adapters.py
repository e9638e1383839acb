"""Adapters for the matrix: made by PEFT and disturbed, or written under the names that older releases gave them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.factories import edit_json, load_folder
from tests.matrix.bases import load, old_names
from tests.matrix.exact import Value

PREFIX = "base_model.model."


def config(kind: str, fields: Mapping[str, Any]) -> Any:
    """PEFT's configuration `kind`; a field of the form `{"": "KasaConfig", ...}` becomes a configuration itself."""
    import peft
    from peft.tuners.lora import config as inner

    def made(value: Any) -> Any:
        if not isinstance(value, dict) or "" not in value:
            return value
        return getattr(inner, value[""])(**{name: item for name, item in value.items() if name})

    return getattr(peft, f"{kind}Config")(**{key: made(value) for key, value in fields.items()})


def train(model: Any, kind: str, fields: Mapping[str, Any], *, noise: float = 0.2, seed: int = 1) -> Any:
    """`model` with an adapter whose trainable tensors were moved, as training would have."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    tuned = get_peft_model(model, config(kind, fields))
    disturb(tuned, noise, seed)
    return tuned.eval()


def begin(model: Any, fields: Mapping[str, Any], start: str, folder: Path) -> Any:
    """`model` with a LoRA whose first factors were taken off its weights, as `start` names an initialisation; saves the
    adapter as it began in `folder`."""
    from peft import get_peft_model
    from peft.tuners.lora import LoraLayer

    tuned = get_peft_model(model, config("Lora", fields))
    disturb(tuned, 0.1, seed=7)
    with torch.no_grad():
        for module in tuned.modules():
            if isinstance(module, LoraLayer):
                first = module.lora_B["default"].weight @ module.lora_A["default"].weight
                module.get_base_layer().weight.sub_(module.scaling["default"] * first)
    save(tuned, folder, start=start)
    return tuned.eval()


def add(tuned: Any, fields: Mapping[str, Any], weight: float, name: str, *, noise: float = 0.2) -> None:
    """Gives `tuned` another LoRA, whose deltas count `weight` times."""
    tuned.add_adapter(name, config("Lora", fields))
    tuned.base_model.set_adapter([*tuned.active_adapters, name])
    disturb(tuned, noise, seed=len(tuned.peft_config), name=f".{name}.")
    weigh(tuned, name, weight)


def weigh(tuned: Any, name: str, weight: float) -> None:
    for module in tuned.modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict) and name in scaling:
            scaling[name] *= weight


def save(tuned: Any, folder: Path, *, start: str = "", tables: bool = False) -> list[Path]:
    """Saves every adapter of `tuned`, the first one in `folder`; returns where they are."""
    names = list(tuned.peft_config)
    tuned.save_pretrained(folder, selected_adapters=names, save_embedding_layers=tables or "auto")
    folders = [folder, *(folder / name for name in names[1:])]
    if start:
        edit_json(folder / "adapter_config.json", init_lora_weights=start)
    return folders


def disturb(model: Any, noise: float, seed: int, name: str = "") -> None:
    """Adds noise to every trainable parameter whose name contains `name`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and parameter.is_floating_point() and "ranknum" not in key and name in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise)


def write_old(
    folder: Path, base: Path, name: str, pattern: str, release: str, *, targets: list[str], r: int = 3, alpha: float = 5
) -> Path:
    """A LoRA as PEFT 0.13 to 0.17 wrote it on transformers of `release`: on every module that `pattern` is found in.
    `base` is the model `name` under the names of that time; nothing in the configuration tells the version."""
    from peft import LoraConfig

    generator = torch.Generator().manual_seed(1)
    stored = load_folder(base)
    tensors: dict[str, Tensor] = {}
    for disk, key in old_names(sorted(stored), name, release).items():
        module, shape = key.removesuffix(".weight"), stored[disk].shape
        if module != key and len(shape) == 2 and re.search(pattern, module):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(r, shape[1], generator=generator) * 0.3
            tensors[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(shape[0], r, generator=generator) * 0.3
    assert tensors, pattern
    folder.mkdir(parents=True)
    LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM").save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    path = folder / "adapter_config.json"
    known = {key: value for key, value in json.loads(path.read_text()).items() if key not in _NEW_FIELDS}
    path.write_text(json.dumps(known))
    return folder


def merge_old(adapter: Path, base: Path, name: str, release: str, scratch: Path) -> dict[str, Value]:
    """The merge of such an adapter in float64, on the checkpoint of its time; transformers then says where in the model
    each element lies."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    stored = load_folder(base)
    found: dict[str, dict[str, Tensor]] = {"exact": {}, "magnitude": {}}
    for disk, key in old_names(sorted(stored), name, release).items():
        found["exact"][disk], found["magnitude"][disk] = stored[disk].double(), torch.zeros(stored[disk].shape).double()
        module = f"{PREFIX}{key.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in factors:
            a, b = (factors.pop(f"{module}.lora_{x}.weight").double() for x in "AB")
            s = config["lora_alpha"] / a.shape[0]
            found["exact"][disk] = found["exact"][disk] + s * (b @ a)
            found["magnitude"][disk] = stored[disk].double().abs() + s * (b.abs() @ a.abs())
    assert not factors
    states = {}
    for what, tensors in found.items():
        shutil.copytree(base, scratch / what)
        save_file(tensors, scratch / what / "model.safetensors", metadata={"format": "pt"})
        states[what] = load(scratch / what, dtype="float64").state_dict()
    return {key: Value(exact=value, magnitude=states["magnitude"][key]) for key, value in states["exact"].items()}


# Fields of adapter_config.json that PEFT 0.17 did not have.
_NEW_FIELDS = (
    *("peft_version", "kasa_config", "velora_config", "monteclora_config", "use_bdlora", "lora_ga_config"),
    *("ensure_weight_tying", "arrow_config", "alora_invocation_tokens"),
)
