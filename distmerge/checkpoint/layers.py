"""A base whose layers are used several times: the stack that `layer_replication` built for training."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from distmerge.checkpoint.base import Base
from distmerge.checkpoint.quantization import nested_configs
from distmerge.errors import InputError

_LAYER = re.compile(r"(?P<stack>(?:.*\.)?(?:layers|layer|h|blocks))\.(?P<number>\d+)\.(?P<rest>.+)")


def replicate_layers(base: Base, ranges: tuple[tuple[int, int], ...]) -> Base:
    """`base` with a new stack of layers, range after range of its own (`[[0, 4], [2, 5]]` gives 0 1 2 3 2 3 4), its
    configuration made true to it. The copies have tensors of their own names.

    Raises InputError for a base with several stacks or without the layers (peft.utils.other.replicate_layers).
    """
    sources = [number for first, last in ranges for number in range(first, last)]
    matches = {name: match for name in base.tensors if (match := _LAYER.fullmatch(name))}
    stacks = {match["stack"] for match in matches.values()}
    if len(stacks) != 1:
        raise InputError(
            f"layer_replication needs one stack of layers, the base has {len(stacks)}", where=str(base.folder)
        )
    have = {int(match["number"]) for match in matches.values()}
    if lost := sorted(set(sources) - have):
        raise InputError(f"layer_replication uses layer {lost[0]}, the base has {len(have)}", where=str(base.folder))
    stack = stacks.pop()
    by_layer: dict[int, list[tuple[str, str]]] = {}
    for name, match in matches.items():
        by_layer.setdefault(int(match["number"]), []).append((match["rest"], name))
    tensors = {name: stored for name, stored in base.tensors.items() if name not in matches}
    for number, source in enumerate(sources):
        tensors |= {f"{stack}.{number}.{rest}": base.tensors[name] for rest, name in by_layer[source]}
    config = _with_layers(base.config, sources, len(have))
    return replace(base, tensors=tensors, config=config)


def _with_layers(config: dict[str, Any], sources: list[int], num_layers: int) -> dict[str, Any]:
    """The configuration with the new number of layers, and lists of one entry a layer in the new order."""
    changed = {
        key: _with_layers(value, sources, num_layers) if isinstance(value, dict) else value
        for key, value in config.items()
    }
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if changed.get(key) == num_layers:
            changed[key] = len(sources)
    for key, value in changed.items():
        if isinstance(value, list) and len(value) == num_layers and key in _PER_LAYER:
            changed[key] = [value[source] for source in sources]
    return changed


_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "no_rope_layers", "attn_layers")


def vocab_sizes(config: dict[str, Any]) -> list[int]:
    """Every vocabulary size that `config` names, at any level."""
    return [part["vocab_size"] for part in nested_configs(config) if type(part.get("vocab_size")) is int]
