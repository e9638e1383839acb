"""Crafted headers, in the place of a base's file and of an adapter's."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

import distmerge
from tests.attacks.scene import Scene, crafted, entry, header_of

BIG = 1 << 62


def _two(first: dict[str, Any], second: dict[str, Any]) -> bytes:
    return header_of({"a": first, "b": second})


def _two_names(first: str, second: str) -> bytes:
    return header_of({first: entry(0, 16), second: entry(16, 32)})


# name: (header, data, words of the message)
HEADERS: dict[str, tuple[bytes, bytes, tuple[str, ...]]] = {
    "hole": (_two(entry(0, 16), entry(32, 48)), bytes(48), ("hole", "'b'")),
    "hole at the front": (header_of({"a": entry(8, 24)}), bytes(24), ("hole", "'a'")),
    "overlap": (_two(entry(0, 16), entry(8, 24)), bytes(24), ("overlap", "'b'")),
    "the same bytes twice": (_two(entry(0, 16), entry(0, 16)), bytes(16), ("overlap",)),
    "bytes behind the last": (header_of({"a": entry(0, 16)}), bytes(17), ("16", "17")),
    "too few bytes": (header_of({"a": entry(0, 16)}), bytes(15), ("16", "15")),
    "a name twice": (b'{"a":%b,"a":%b}' % (header_of(entry()), header_of(entry())), bytes(16), ("'a'", "twice")),
    "metadata twice": (b'{"__metadata__":{},"__metadata__":{}}', b"", ("twice",)),
    "a field twice": (b'{"a":{"dtype":"F32","dtype":"F16","shape":[],"data_offsets":[0,4]}}', bytes(4), ("twice",)),
    "reversed offsets": (header_of({"a": entry(16, 0)}), bytes(16), ("'a'",)),
    "negative offsets": (header_of({"a": entry(-16, 0)}), bytes(16), ("'a'", "-16")),
    "float offsets": (header_of({"a": entry(0.0, 16.0)}), bytes(16), ("'a'", "16.0")),
    "string offsets": (header_of({"a": entry("0", "16")}), bytes(16), ("'a'", "'16'")),
    "boolean offsets": (header_of({"a": entry(False, 16)}), bytes(16), ("'a'", "False")),
    "huge offsets": (header_of({"a": entry(0, 10**30)}), bytes(16), ("'a'", str(10**30))),
    "one offset": (header_of({"a": {**entry(), "data_offsets": [16]}}), bytes(16), ("'a'", "[16]")),
    "three offsets": (header_of({"a": {**entry(), "data_offsets": [0, 8, 16]}}), bytes(16), ("'a'",)),
    "null offsets": (header_of({"a": {**entry(), "data_offsets": None}}), bytes(16), ("'a'", "None")),
    "shape and bytes differ": (header_of({"a": entry(shape=[3, 3])}), bytes(16), ("'a'", "36", "16")),
    "product overflows": (header_of({"a": entry(shape=[BIG, 4, 4])}), bytes(16), ("'a'", str(BIG))),
    "product overflows to 16": (header_of({"a": entry(shape=[BIG, 4, 1 << 60])}), bytes(16), ("'a'",)),
    "overflow beside a zero": (header_of({"a": entry(0, 16, shape=[0, BIG])}), bytes(16), ("'a'",)),
    "negative dimension": (header_of({"a": entry(shape=[-2, -2])}), bytes(16), ("'a'", "-2")),
    "float dimension": (header_of({"a": entry(shape=[2.0, 2])}), bytes(16), ("'a'", "2.0")),
    "boolean dimension": (header_of({"a": entry(shape=[True, 4])}), bytes(16), ("'a'", "True")),
    "shape of text": (header_of({"a": entry(shape="22")}), bytes(16), ("'a'",)),
    "null shape": (header_of({"a": entry(shape=None)}), bytes(16), ("'a'", "None")),
    "70,000 dimensions": (header_of({"a": entry(0, 4, shape=[1] * 70_000)}), bytes(4), ("'a'",)),
    "17 dimensions": (header_of({"a": entry(0, 4, shape=[1] * 17)}), bytes(4), ("'a'", "16")),
    "a shape of shapes": (
        b'{"a":{"dtype":"F32","shape":%b,"data_offsets":[0,4]}}' % (b"[" * 500 + b"]" * 500),
        bytes(4),
        ("'a'",),
    ),
    "unknown dtype": (header_of({"a": entry(dtype="F7")}), bytes(16), ("'a'", "'F7'")),
    "torch's dtype": (header_of({"a": entry(dtype="float32")}), bytes(16), ("'a'", "'float32'")),
    "small dtype": (header_of({"a": entry(dtype="f32")}), bytes(16), ("'a'", "'f32'")),
    "dtype is a list": (header_of({"a": entry(dtype=["F32"])}), bytes(16), ("'a'", "['F32']")),
    "dtype is a number": (header_of({"a": entry(dtype=5)}), bytes(16), ("'a'", "5")),
    "dtype without end": (header_of({"a": entry(dtype="F" * 1_000_000)}), bytes(16), ("'a'",)),
    "dtype in colour": (header_of({"a": entry(dtype="\x1b[31mF32")}), bytes(16), ("'a'",)),
    "no dtype": (header_of({"a": {"shape": [4], "data_offsets": [0, 16]}}), bytes(16), ("'a'", "dtype")),
    "no shape": (header_of({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), bytes(16), ("'a'", "shape")),
    "no offsets": (header_of({"a": {"dtype": "F32", "shape": [4]}}), bytes(16), ("'a'", "data_offsets")),
    "entry is a list": (header_of({"a": []}), b"", ("'a'",)),
    "entry is null": (header_of({"a": None}), b"", ("'a'",)),
    "metadata holds a number": (header_of({"__metadata__": {"format": 5}, "a": entry()}), bytes(16), ("__metadata__",)),
    "metadata is a list": (header_of({"__metadata__": ["pt"], "a": entry()}), bytes(16), ("__metadata__",)),
    "metadata is a tensor": (header_of({"__metadata__": entry()}), bytes(16), ("__metadata__",)),
    "metadata is an empty list": (header_of({"__metadata__": [], "a": entry()}), bytes(16), ("__metadata__",)),
    "metadata is zero": (header_of({"__metadata__": 0, "a": entry()}), bytes(16), ("__metadata__",)),
    "not JSON": (b"{not json}", b"", ("JSON",)),
    "cut off": (header_of({"a": entry()})[:-5], bytes(16), ("JSON",)),
    "two values": (header_of({"a": entry()}) + b"{}", bytes(16), ("JSON",)),
    "a list": (b"[1, 2, 3]", b"", ("{",)),
    "not UTF-8": (b'{"\xff":1}', b"", ("UTF-8",)),
    "a byte order mark": (b"\xef\xbb\xbf" + header_of({"a": entry()}), bytes(16), ("{",)),
    "a leading space": (b" " + header_of({"a": entry()}), bytes(16), ("begin", "{")),
    "deep nesting": (b'{"a":' * 50_000, b"", ("deep",)),
    "deep nesting of lists": (b'{"a":' + b"[" * 50_000, b"", ("deep",)),
    "a number without end": (b'{"a":' + b"9" * 20_000 + b"}", b"", ("JSON",)),
    "NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4), ("'a'",)),
    "Infinity": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}', bytes(4), ("'a'",)),
    "empty name": (header_of({"": entry()}), bytes(16), ("name",)),
    "name without end": (header_of({"x" * 100_000: entry()}), bytes(16), ("name", "xxxx")),
    "NUL in a name": (header_of({"a\x00b": entry()}), bytes(16), ("name", "\\x00b")),
    "ESC in a name": (header_of({"a\x1b[31mb": entry()}), bytes(16), ("name", "\\x1b[31mb")),
    "newline in a name": (header_of({"a\nb": entry()}), bytes(16), ("name", "\\nb")),
    "half a character in a name": (b'{"a\\ud800":%b}' % header_of(entry()), bytes(16), ("name",)),
    "half a character in the metadata": (b'{"__metadata__":{"a":"\\ud800"}}', b"", ("half a character",)),
    "Infinity in an unknown field": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":Infinity}}',
        bytes(4),
        ("a number that is none",),
    ),
    "names of equal text": (
        _two_names("caf\u00e9", "cafe\u0301"),
        bytes(32),
        ("'caf\\xe9'", "'cafe\\u0301'", "Unicode"),
    ),
    "right-to-left mark in a name": (header_of({"a\u202eb": entry()}), bytes(16), ("name",)),
}


def _place(scene: Scene, which: str, content: bytes) -> Path:
    path = scene.adapter / "adapter_model.safetensors" if which == "adapter" else scene.single()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("name", HEADERS)
def test_a_crafted_header_is_refused_by_file_and_name(scene: Scene, which: str, name: str) -> None:
    header, data, words = HEADERS[name]
    path = _place(scene, which, crafted(header, data))
    scene.refuse(path, *words)


@pytest.mark.parametrize("length", [0, 1, 1 << 31, 1 << 63, (1 << 64) - 1, 100_000_001])
@pytest.mark.parametrize("which", ["base", "adapter"])
def test_an_implausible_header_length_is_refused(scene: Scene, which: str, length: int) -> None:
    path = _place(scene, which, length.to_bytes(8, "little") + header_of({"a": entry()}) + bytes(64))
    scene.refuse(path, length if length > 1 else "")


def test_a_header_longer_than_the_limit_is_refused_without_reading_it(scene: Scene) -> None:
    path = scene.single()
    with path.open("wb") as file:  # sparse: takes no room
        file.write((200_000_000).to_bytes(8, "little") + b'{"a"')
        file.truncate(300_000_000)
    scene.refuse(path, 200_000_000)


def test_a_tensor_named_as_the_metadata_is_never_written(scene: Scene) -> None:
    path = scene.single()
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = header.pop("model.norm.weight")
    path.write_bytes(crafted(header_of(header), raw[8 + length :]))
    scene.refuse(path, "__metadata__")


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "a b", "[/x]", "[bold red]x", "model.ﬁ", "%s%n", "{0}"])
def test_a_strange_but_printable_name_passes_unchanged(scene: Scene, name: str) -> None:
    import torch

    from tests.factories import load_folder

    scene.single(lambda tensors: {**tensors, name: torch.ones(3)})
    scene.merge()
    assert torch.equal(load_folder(scene.output)[name], torch.ones(3))


@pytest.mark.parametrize("which", ["base", "adapter"])
def test_more_tensors_than_any_checkpoint_has_are_refused(
    scene: Scene, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {f"x{n}": entry(0, 0, shape=[0]) for n in range(101)}
    path = _place(scene, which, crafted(header_of(names)))
    monkeypatch.setattr("distmerge.checkpoint.header.MAX_TENSORS", 100)
    scene.refuse(path, "101 tensors", "at most 100")


def test_a_header_of_a_million_tensors_or_values_is_refused_before_it_is_parsed(scene: Scene) -> None:
    path = _place(scene, "base", crafted(b'{"a":[' + b"[]," * 4_000_000 + b"[]]}"))
    tracemalloc.start()
    scene.refuse(path, "8000003 values")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000  # the header three times, and none of its values


@pytest.mark.parametrize("text", [b"\\ud83d\\ude00", "\U0001f600".encode()])
def test_text_that_grows_in_memory_is_refused_before_it_is_read(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    monkeypatch.setattr("distmerge.checkpoint.header.MAX_WIDE_NBYTES", 10_000)
    path = _place(scene, "base", crafted(b'{"__metadata__":{"a":"%b%b"}}' % (text, b"x" * 10_000)))
    scene.refuse(path, "not ASCII")


def test_a_field_that_the_format_does_not_have_is_a_warning(scene: Scene) -> None:
    path = scene.single()
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["model.norm.weight"]["evil"] = {"__reduce__": "os.system"}
    path.write_bytes(crafted(header_of(header), raw[8 + length :]))
    assert any("'evil'" in text and path.name in text for text in distmerge.plan(scene.config()).warnings)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"format": "tf", "x": "\x1b[31m"}])
def test_any_metadata_of_text_is_accepted_and_not_passed_on(scene: Scene, metadata: dict[str, str]) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = scene.single()
    save_file(load_file(path), path, metadata=metadata)
    scene.merge()
    with safe_open(scene.output / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
