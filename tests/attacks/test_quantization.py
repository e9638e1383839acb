"""Quantization states that are incomplete, or contradict the tensors they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attacks.scene import Scene

W = "model.layers.0.self_attn.q_proj.weight"
STATE = f"{W}.quant_state.bitsandbytes__nf4"


def blob(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)


def with_state(tensors: dict[str, Tensor], **fields: Any) -> None:
    state = {**json.loads(bytes(tensors[STATE].tolist())), **fields}
    tensors[STATE] = blob(json.dumps({key: value for key, value in state.items() if value is not ...}).encode())


def test_the_packed_scene_itself_merges(packed_scene: Scene) -> None:
    assert packed_scene.merge().num_adapter_tensors == 28


@pytest.mark.parametrize("tail", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
def test_each_missing_companion_is_named(packed_scene: Scene, tail: str) -> None:
    packed_scene.single(lambda tensors: {name: t for name, t in tensors.items() if name != f"{W}.{tail}"})
    packed_scene.refuse(W, f"{W}.{tail}", "missing")


def test_a_missing_state_is_refused(packed_scene: Scene) -> None:
    packed_scene.single(lambda tensors: {name: t for name, t in tensors.items() if name != STATE})
    packed_scene.refuse(f"{W}.absmax", "quantization state", hint="incomplete")


def test_all_companions_missing_is_refused(packed_scene: Scene) -> None:
    packed_scene.single(lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(f"{W}.")})
    packed_scene.refuse(W.removesuffix(".weight"), "(2048, 1)")


def test_a_state_without_its_weight_is_refused(packed_scene: Scene) -> None:
    packed_scene.single(lambda tensors: {name: t for name, t in tensors.items() if name != W})
    packed_scene.refuse(STATE, "no weight")


@pytest.mark.parametrize("field", ["blocksize", "shape", "dtype", "quant_type", "nested_blocksize"])
@pytest.mark.parametrize(
    "value", [..., None, [], {}, "x", -1, 0, 1.5, True, [[1]], 10**400], ids=lambda value: str(value)[:20]
)
def test_each_field_of_the_state_is_checked(packed_scene: Scene, field: str, value: Any) -> None:
    if field == "nested_blocksize" and value is ...:
        value = 7  # without it the state is one of simple quantization, and complete
    packed_scene.single(lambda tensors: with_state(tensors, **{field: value}))
    packed_scene.refuse(W)


@pytest.mark.parametrize("value", [None, "x", [], float("nan"), float("inf"), 10**400], ids=lambda v: str(v)[:20])
def test_the_offset_of_nested_scales_is_checked(packed_scene: Scene, value: Any) -> None:
    packed_scene.single(lambda tensors: with_state(tensors, nested_offset=value))
    packed_scene.refuse(W, "nested_offset")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"blocksize": 128}, ("absmax", "32")),
        ({"blocksize": 32}, ("absmax", "128")),
        ({"shape": [64, 128]}, (W, "4096 bytes")),
        ({"shape": [64, 63]}, (W,)),
        ({"shape": [4096]}, ("(4096,)",)),
        ({"shape": [32, 128]}, ("(32, 128)",)),
        ({"shape": [1 << 50, 64]}, ("shape",)),
        ({"shape": "\x1b[31m"}, ("shape '\\x1b[31m'",)),
        ({"dtype": "float64"}, ("'float64'",)),
        ({"dtype": "bf16"}, ("'bf16'",)),
        ({"quant_type": "fp4"}, ("'fp4'", "'nf4'")),
        ({"quant_type": "int8"}, ("'int8'",)),
        ({"nested_blocksize": 8}, ("nested_absmax",)),
    ],
    ids=str,
)
def test_a_state_that_contradicts_the_tensors_is_refused_with_both_sides(
    packed_scene: Scene, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    packed_scene.single(lambda tensors: with_state(tensors, **fields))
    packed_scene.refuse(*words)


@pytest.mark.parametrize(
    ("tail", "tensor"),
    [
        ("absmax", torch.zeros(63, dtype=torch.uint8)),
        ("absmax", torch.zeros(65, dtype=torch.uint8)),
        ("absmax", torch.zeros(0, dtype=torch.uint8)),
        ("absmax", torch.zeros(64, 1, dtype=torch.uint8)),
        ("absmax", torch.zeros(64, dtype=torch.float32)),
        ("absmax", torch.zeros(64, dtype=torch.int8)),
        ("quant_map", torch.zeros(15)),
        ("quant_map", torch.zeros(16, dtype=torch.bfloat16)),
        ("quant_map", torch.zeros(4, 4)),
        ("nested_absmax", torch.zeros(2)),
        ("nested_absmax", torch.zeros(1, dtype=torch.float64)),
        ("nested_quant_map", torch.zeros(255)),
        ("nested_quant_map", torch.zeros(256, dtype=torch.float16)),
    ],
    ids=lambda value: f"{tuple(value.shape)}-{value.dtype}" if isinstance(value, Tensor) else value,
)
def test_a_companion_of_another_shape_or_dtype_is_refused_with_both_sides(
    packed_scene: Scene, tail: str, tensor: Tensor
) -> None:
    packed_scene.single(lambda tensors: {**tensors, f"{W}.{tail}": tensor})
    packed_scene.refuse(f"{W}.{tail}", "expected", tuple(tensor.shape))


@pytest.mark.parametrize("length", [2047, 2056, 4096, 1])
def test_codes_of_another_length_than_the_shape_are_refused(packed_scene: Scene, length: int) -> None:
    packed_scene.single(lambda tensors: {**tensors, W: torch.zeros(length, 1, dtype=torch.uint8)})
    packed_scene.refuse(W, "2048 bytes", (length, 1))


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"a":1,"a":2}', b"\xff" * 50, b"{" * 5000, b"[" * 60_000, b"\x80\x04pickle"]
)
def test_a_state_that_is_no_plain_json_object_is_refused(packed_scene: Scene, text: bytes) -> None:
    packed_scene.single(lambda tensors: {**tensors, STATE: blob(text)})
    packed_scene.refuse(STATE)


def test_a_huge_state_is_refused_before_it_is_read(packed_scene: Scene) -> None:
    packed_scene.single(lambda tensors: {**tensors, STATE: torch.zeros(1 << 20, dtype=torch.uint8)})
    packed_scene.refuse(STATE, 1 << 20)


def test_scales_of_int8_beside_4_bits_are_refused(packed_scene: Scene) -> None:
    name = "model.layers.0.self_attn.q_proj.SCB"
    packed_scene.single(lambda tensors: {**tensors, name: torch.ones(64)})
    packed_scene.refuse(name, W)


def test_two_states_for_one_weight_are_refused(packed_scene: Scene) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        state = {**json.loads(bytes(tensors[STATE].tolist())), "quant_type": "fp4"}
        tensors[STATE.replace("nf4", "fp4")] = blob(json.dumps(state).encode())

    packed_scene.single(add)
    packed_scene.refuse(W)


def test_an_unknown_kind_of_state_is_refused(packed_scene: Scene) -> None:
    strange = STATE.replace("nf4", "af4")
    packed_scene.single(lambda ts: {strange if name == STATE else name: t for name, t in ts.items()})
    packed_scene.refuse("af4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tail", ["quant_map", "nested_absmax", "nested_quant_map"])
def test_scales_that_are_not_finite_publish_nothing(packed_scene: Scene, tail: str, value: float) -> None:
    from distmerge.errors import InputError, VerifyError

    key = f"{W}.{tail}"
    packed_scene.single(lambda tensors: {**tensors, key: torch.full_like(tensors[key], value)})
    with pytest.raises((InputError, VerifyError), match="q_proj"):
        packed_scene.merge()
    assert not packed_scene.output.exists()


def test_text_that_utf_8_cannot_hold_is_no_bug(packed_scene: Scene, tmp_path: Path) -> None:
    from tests.factories import edit_json

    edit_json(packed_scene.base / "config.json", note="\ud800")
    packed_scene.merge()
    assert json.loads((packed_scene.output / "config.json").read_text())["note"] == "\ud800"
