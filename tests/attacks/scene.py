"""A base, an adapter and an output of one test's own, to be spoiled; and the proof that a refusal leaves no trace."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import distmerge
from distmerge import AdapterChoice, MergeConfig
from distmerge.errors import DistmergeError, InputError
from tests import factories

LONGEST_MESSAGE = 4000
Q = "model.layers.0.self_attn.q_proj"
TABLE, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
FRONT = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def traces(folder: Path) -> dict[str, str]:
    """What every name below `folder` is: a file's digest, a link's target, or the kind of anything else."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            what = f"-> {os.readlink(path)}"
        elif stat.S_ISREG(mode):
            what = hashlib.sha256(path.read_bytes()).hexdigest() if path.stat().st_size < 1 << 28 else "huge"
        else:
            what = oct(stat.S_IFMT(mode))
        found[str(path.relative_to(folder))] = what
    return found


def failure(call: Callable[[], Any]) -> DistmergeError | None:
    """The expected error that `call` ends with, if any; anything else is a bug and passes through."""
    try:
        call()
    except DistmergeError as error:
        return error
    return None


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Folders below `folder` that belong to one test."""

    folder: Path
    base: Path
    adapter: Path
    output: Path

    def config(self, **changes: Any) -> MergeConfig:
        values: dict[str, Any] = {"base": self.base, "output": self.output, "device": "cpu", "timeout": 20.0}
        adapters = changes.pop("adapters", (self.adapter,))
        chosen = tuple(a if isinstance(a, AdapterChoice) else AdapterChoice(folder=a) for a in adapters)
        return MergeConfig(**{**values, **changes}, adapters=chosen)

    def merge(self, **changes: Any) -> Any:
        return distmerge.merge(self.config(**changes))

    def refuse(
        self, *words: object, error: type[DistmergeError] = InputError, hint: str | None = None, **changes: Any
    ) -> str:
        """Merges, which must raise exactly `error` with `words` (and `hint`) in its message and leave no trace."""
        before = traces(self.folder)
        with pytest.raises(DistmergeError) as caught:
            self.merge(**changes)
        message = str(caught.value)
        assert type(caught.value) is error, message
        assert traces(self.folder) == before, message
        assert caught.value.where, f"says not where: {message}"
        assert caught.value.what
        for word in words:
            assert str(word) in message, message
        if hint is not None:
            assert hint in caught.value.hint, message
        assert len(message) < LONGEST_MESSAGE
        assert all(char.isprintable() or char == "\n" for char in message), repr(message)
        return message

    def spoil_factors(self, change: Callable[[dict[str, Tensor]], Any]) -> None:
        """Saves the adapter's tensors anew after `change`."""
        factories.rewrite_adapter(self.adapter, change)

    def rename_factors(self, rename: Callable[[str], str]) -> None:
        self.spoil_factors(lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})

    def spoil_config(self, **fields: Any) -> None:
        """Sets fields of adapter_config.json."""
        factories.edit_json(self.adapter / "adapter_config.json", **fields)

    def drop_config(self, *fields: str) -> None:
        path = self.adapter / "adapter_config.json"
        values = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in values.items() if key not in fields}))

    def write(self, tensors: dict[str, Tensor], **config: Any) -> None:
        """Writes another adapter in place of this one."""
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self.adapter / WEIGHTS)
        (self.adapter / CONFIG).write_text(json.dumps(config))

    def try_plan(self, **changes: Any) -> DistmergeError | None:
        """The error that planning ends with, if any, which must be a refusal that a person can read."""
        error = failure(lambda: distmerge.plan(self.config(**changes)))
        assert error is None or (type(error) is InputError and error.where and error.what), error
        assert len(str(error)) < LONGEST_MESSAGE
        assert all(char.isprintable() or char == "\n" for char in str(error)), repr(str(error))
        return error

    @property
    def index(self) -> Path:
        return self.base / "model.safetensors.index.json"

    @property
    def shard(self) -> Path:
        """One of the base's weight files."""
        return sorted(self.base.glob("*.safetensors"))[0]

    def spoil_weight_map(self, change: Callable[[dict[str, str]], Any]) -> None:
        index = json.loads(self.index.read_text())
        index["weight_map"] = change(index["weight_map"])
        self.index.write_text(json.dumps(index))

    def single(self, change: Callable[[dict[str, Tensor]], Any] | None = None) -> Path:
        """Puts all tensors of the base into one model.safetensors, after `change`."""
        tensors = factories.load_folder(self.base)
        tensors = (change(tensors) if change else None) or tensors
        for path in (*self.base.glob("*.safetensors"), self.index):
            path.unlink(missing_ok=True)
        path = self.base / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        return path


def crafted(header: bytes, data: bytes = b"") -> bytes:
    """The bytes of a weight file with this header."""
    return len(header).to_bytes(8, "little") + header + data


def header_of(entries: Any) -> bytes:
    return json.dumps(entries).encode()


def entry(begin: Any = 0, end: Any = 16, *, dtype: Any = "F32", shape: Any = (2, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def small_scene(folder: Path, **config: Any) -> Scene:
    """A model of one tuned layer `Q` (8, 12) with a bias, embedding, norm and head, in float32, and a LoRA on `Q`."""
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{Q}.weight": (8, 12), f"{Q}.bias": (8,), TABLE: (20, 12), NORM: (12,), HEAD: (20, 12)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    base = factories.write_base(folder / "base", tensors, **{"vocab_size": 20, "tie_word_embeddings": False, **config})
    pair = (torch.randn(2, 12, generator=generator), torch.randn(8, 2, generator=generator))
    adapter = factories.write_adapter(folder / "lora", {Q: pair}, alpha=4)
    return Scene(folder=folder, base=base, adapter=adapter, output=folder / "out")
