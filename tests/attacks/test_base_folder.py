"""Folders, indexes and configurations of a base that do not say what the checkpoint is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import distmerge
from distmerge.storage.files import open_input, read_exact
from tests.attacks.scene import Scene, failure
from tests.conftest import tree
from tests.factories import edit_json, hub_snapshot, load_folder

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "shard",
    [
        "../base/model-00001-of-00005.safetensors",
        "sub/model.safetensors",
        "/etc/passwd",
        "/tmp/x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "\\\\host\\share\\x.safetensors",
        "..",
        ".hidden.safetensors",
        "",
        "pytorch_model.bin",
        "config.json",
        "x.safetensors\x00",
        "x\x1b[31m.safetensors",
        "a\nb.safetensors",
        "*.safetensors",
    ],
)
def test_an_index_may_name_only_weight_files_of_its_own_folder(scene: Scene, shard: str) -> None:
    def point_elsewhere(weight_map: dict[str, str]) -> dict[str, str]:
        return {**weight_map, "lm_head.weight": shard}

    scene.spoil_weight_map(point_elsewhere)
    shown = shard if shard.isprintable() else "safetensors"
    scene.refuse(INDEX, "plain", shown.replace("\\", "\\\\"))


@pytest.mark.parametrize("length", [200, 300, 5000])
def test_a_shard_name_of_any_length_is_refused_where_it_is_not_there(scene: Scene, length: int) -> None:
    scene.spoil_weight_map(lambda weight_map: {**weight_map, "lm_head.weight": "x" * length + ".safetensors"})
    scene.refuse("xxxxx", scene.base)


@pytest.mark.parametrize("weight_map", [[], ["a"], {}, None, "x", 5, {"a": 5}, {"a": None}, {"a": ["b"]}, {"a": {}}])
def test_a_weight_map_must_map_names_to_names(scene: Scene, weight_map: Any) -> None:
    scene.spoil_weight_map(lambda _: weight_map)
    scene.refuse(INDEX, "weight_map")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b'{"weight_map": {"a": "b.safetensors"', "JSON"),
        (b'\xef\xbb\xbf{"weight_map": {}}', "JSON"),
        ('{"weight_map": {}}'.encode("utf-16"), "UTF-8"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        (b'{"weight_map": {}, "weight_map": {}}', "twice"),
        (b'{"weight_map": ' * 100_000, "deep"),
        (b"<!DOCTYPE html>", "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "JSON"),
        (b'{"a": ' + b"1" * 20_000 + b"}", "JSON"),
    ],
)
def test_an_index_that_is_no_plain_json_object_is_refused(scene: Scene, text: bytes, words: str) -> None:
    scene.index.write_bytes(text)
    scene.refuse(INDEX, words)


def test_a_missing_shard_is_named_with_the_count(scene: Scene) -> None:
    shards = sorted(path.name for path in scene.base.glob("*.safetensors"))
    (scene.base / shards[1]).unlink()
    scene.refuse(shards[1], f"1 of {len(shards)}", scene.base, hint="download")


def test_a_tensor_that_the_index_alone_names_is_refused(scene: Scene) -> None:
    scene.spoil_weight_map(lambda weight_map: {**weight_map, "ghost.weight": scene.shard.name})
    scene.refuse("ghost.weight", INDEX)


def test_a_tensor_in_another_shard_than_the_index_says_is_refused(scene: Scene) -> None:
    def swap(weight_map: dict[str, str]) -> dict[str, str]:
        other = next(file for file in weight_map.values() if file != weight_map["lm_head.weight"])
        return {**weight_map, "lm_head.weight": other}

    scene.spoil_weight_map(swap)
    scene.refuse("lm_head.weight", INDEX)


def test_a_tensor_in_two_shards_is_refused(scene: Scene) -> None:
    first, second = sorted(scene.base.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, metadata={"format": "pt"})
    scene.refuse(name, first.name, second.name)


def test_a_tensor_in_a_shard_but_not_in_the_index_is_kept_with_a_warning(scene: Scene) -> None:
    scene.spoil_weight_map(lambda weight_map: {n: f for n, f in weight_map.items() if n != "model.norm.weight"})
    assert any("model.norm.weight" in text for text in distmerge.plan(scene.config()).warnings)
    scene.merge()
    assert load_folder(scene.output).keys() == load_folder(scene.base).keys() | {"model.norm.weight"}


def test_both_a_single_file_and_an_index_are_refused(scene: Scene) -> None:
    save_file({"x": torch.zeros(1)}, scene.base / "model.safetensors")
    scene.refuse("model.safetensors", INDEX, scene.base, hint="move")


def test_shards_outside_the_index_are_not_read_and_not_copied(scene: Scene) -> None:
    (scene.base / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    scene.merge()
    assert not (scene.output / "model-00001-of-00002.safetensors").exists()


def test_stale_shards_beside_those_of_the_index_are_a_warning_with_their_names(scene: Scene) -> None:
    (scene.base / "model-00001-of-00099.safetensors").write_bytes(b"stale")
    assert any(
        "model-00001-of-00099" in text and "left out" in text for text in distmerge.plan(scene.config()).warnings
    )


@pytest.mark.parametrize("told", [0, 5, -1, 1e400, "5", [], True])
def test_a_total_size_that_is_not_the_shards_is_a_warning(scene: Scene, told: Any) -> None:
    assert distmerge.plan(scene.config()).warnings == ()
    edit_json(scene.index, metadata={"total_size": told})
    assert any("the index says" in text for text in distmerge.plan(scene.config()).warnings)


@pytest.mark.parametrize("metadata", [..., None, [], {}, "x"])
def test_nothing_of_the_indexs_metadata_is_needed(scene: Scene, metadata: Any) -> None:
    index = {**json.loads(scene.index.read_text()), "metadata": metadata}
    scene.index.write_text(json.dumps({key: value for key, value in index.items() if value is not ...}))
    assert distmerge.plan(scene.config()).warnings == ()


def test_a_base_without_a_configuration_is_a_warning(scene: Scene) -> None:
    (scene.base / "config.json").unlink()
    assert any("config.json is missing" in text for text in distmerge.plan(scene.config()).warnings)


def test_names_of_equal_text_in_two_shards_are_refused(scene: Scene) -> None:
    first, second = sorted(scene.base.glob("*.safetensors"))[:2]
    for path, name in ((first, "caf\u00e9"), (second, "cafe\u0301")):
        save_file({**load_file(path), name: torch.ones(1)}, path, metadata={"format": "pt"})
    scene.refuse(scene.base, "'caf\\xe9'", "'cafe\\u0301'")


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.1-8B", "org/model"])
def test_a_repository_in_place_of_a_folder_is_refused_with_the_command_that_fetches_it(scene: Scene, name: str) -> None:
    scene.refuse(name, base=Path(name), hint=f"hf download {name} --local-dir")


@pytest.mark.parametrize(
    "name", ["a\nb", "a\x1b[31mb", "x" * 5000, "a\udcffb", "a\u202eb"], ids=lambda name: repr(name)[:12]
)
@pytest.mark.parametrize("option", ["base", "adapters", "output"])
def test_a_path_that_cannot_be_is_refused_and_shown_escaped(scene: Scene, name: str, option: str) -> None:
    path = scene.folder / name / "nowhere"
    error = failure(lambda: scene.merge(**{option: (path,) if option == "adapters" else path}))
    assert (error is None and option == "output") or (error is not None and error.exit_code == 3), error
    assert error is None or all(character.isprintable() or character == "\n" for character in str(error))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pt", "diffusion.safetensors"])
def test_a_folder_with_weights_of_another_kind_is_refused_with_their_name(scene: Scene, name: str) -> None:
    for path in (*scene.base.glob("*.safetensors"), scene.index):
        path.unlink()
    (scene.base / name).write_bytes(b"x" * 100)
    scene.refuse(name, scene.base, hint="safetensors")


def test_a_folder_without_weights_is_refused(scene: Scene) -> None:
    scene.refuse("nowhere", base=scene.folder / "nowhere", hint="--base")
    scene.refuse(scene.adapter, base=scene.adapter)
    scene.refuse(scene.index, base=scene.index)
    (scene.folder / "empty").mkdir()
    scene.refuse("empty", base=scene.folder / "empty")


def test_files_without_any_tensor_are_refused(scene: Scene) -> None:
    for path in (*scene.base.glob("*.safetensors"), scene.index):
        path.unlink()
    save_file({}, scene.base / "model.safetensors")
    scene.refuse("no tensors", scene.base)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "hqq", None, 5, ["x"]])
def test_a_quantization_that_no_tensor_has_is_refused_by_name(scene: Scene, method: Any) -> None:
    edit_json(scene.base / "config.json", quantization_config={"quant_method": method, "bits": 4})
    scene.refuse(repr(method), "config.json", hint="16-bit")


def test_a_quantization_inside_a_nested_configuration_is_refused(scene: Scene) -> None:
    edit_json(scene.base / "config.json", text_config={"quantization_config": {"quant_method": "awq"}})
    scene.refuse("'awq'", "config.json")


def test_int8_of_bitsandbytes_without_a_packed_weight_is_refused(scene: Scene) -> None:
    edit_json(scene.base / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    scene.refuse("int8", "none", "config.json", hint="16-bit")


@pytest.mark.parametrize("text", [b"", b"[]", b'{"a": 1, "a": 2}', b"\xff", b"{" * 100, b'\xef\xbb\xbf{"a": 1}'])
def test_a_configuration_that_is_no_plain_json_object_is_refused(scene: Scene, text: bytes) -> None:
    (scene.base / "config.json").write_bytes(text)
    scene.refuse("config.json")


@pytest.mark.parametrize("depth", [100, 300, 450, 900])
def test_a_deeply_nested_configuration_is_refused_or_harmless(scene: Scene, depth: int) -> None:
    (scene.base / "config.json").write_text('{"a": ' * depth + "1" + "}" * depth)
    error = failure(scene.merge)
    assert error is None or (error.exit_code == 3 and "config.json" in str(error))


@pytest.mark.parametrize("fields", [{"model_type": ["gpt2"]}, {"vocab_size": "96"}, {"tie_word_embeddings": "yes"}])
def test_a_configuration_with_values_of_other_types_is_no_bug(scene: Scene, fields: dict[str, Any]) -> None:
    edit_json(scene.base / "config.json", **fields)
    scene.merge()


def test_text_that_utf_8_cannot_hold_is_kept_or_refused(scene: Scene) -> None:
    edit_json(scene.base / "config.json", note="\ud800")
    scene.merge(dtype="float32")
    assert json.loads((scene.output / "config.json").read_text())["note"] == "\ud800"


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-shard"])
@pytest.mark.timeout(10)
def test_a_fifo_in_place_of_a_file_of_the_base_does_not_hang(scene: Scene, name: str) -> None:
    path = scene.shard if name == "model-shard" else scene.base / name
    path.unlink()
    os.mkfifo(path)
    scene.refuse(path.name, "regular file")


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-shard"])
def test_a_folder_in_place_of_a_file_of_the_base_is_refused(scene: Scene, name: str) -> None:
    path = scene.shard if name == "model-shard" else scene.base / name
    path.unlink()
    path.mkdir()
    scene.refuse(path.name)


@pytest.mark.parametrize("target", ["/dev/null", "/dev/zero", "nowhere"])
def test_a_link_to_a_device_or_to_nothing_is_refused(scene: Scene, target: str) -> None:
    shard = scene.shard
    shard.unlink()
    shard.symlink_to(target)
    scene.refuse(shard.name)


@pytest.mark.timeout(10)
def test_a_fifo_among_the_side_files_does_not_hang(scene: Scene) -> None:
    os.mkfifo(scene.base / "notes.txt")
    scene.merge()
    assert not (scene.output / "notes.txt").exists()


@pytest.mark.parametrize("name", [b"a\x1bb", b"a\nb", b"\xff\xfe"])
def test_a_side_file_with_an_unprintable_name_is_refused(scene: Scene, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(scene.base) + b"/" + name)).write_bytes(b"x")
    scene.refuse("file name")


@pytest.mark.parametrize(
    "name", ["README.md", "merge_receipt.json", "config.json.d", "model-00001-of-00003.safetensors"]
)
def test_a_side_folder_named_like_a_file_of_the_output_is_kept_or_refused_at_the_start(scene: Scene, name: str) -> None:
    (scene.base / name).mkdir()
    (scene.base / name / "notes.txt").write_text("x")
    error = failure(lambda: scene.merge(max_shard_size=90_000))
    assert error is None or error.exit_code == 3, error
    assert not scene.output.with_name("out.distmerge").exists()


def test_a_folder_that_links_to_itself_ends(scene: Scene) -> None:
    (scene.base / "loop").symlink_to(".")
    scene.merge()
    assert len(list(scene.output.rglob("*"))) < 200


def test_a_hub_cache_of_links_is_an_ordinary_base(scene: Scene) -> None:
    snapshot = hub_snapshot(scene.base, scene.folder / "cache")
    scene.merge(base=snapshot)
    assert not any(path.is_symlink() for path in scene.output.rglob("*"))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: data[:9],
        lambda data: data[:300],
        lambda data: data + b"\x00",
        lambda data: bytes(len(data)),
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
        lambda data: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
        lambda data: b"\n\n<html></html>                     ",
        lambda data: b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        lambda data: b'{"error": "Repository not found"}' + b" " * 100,
        lambda data: data[8:],
        lambda data: b"PK\x03\x04" + data,
    ],
)
@pytest.mark.parametrize("which", ["shard", "adapter"])
def test_a_damaged_weight_file_is_refused_by_name(scene: Scene, spoil: Callable[[bytes], bytes], which: str) -> None:
    path = scene.shard if which == "shard" else scene.adapter / "adapter_model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    message = scene.refuse(path)
    assert "hint: " in message or "zeros" in message, message


def test_nan_in_the_base_where_nothing_is_merged_is_copied(scene: Scene) -> None:
    scene.single(lambda tensors: {**tensors, "model.norm.weight": tensors["model.norm.weight"] * float("nan")})
    scene.merge()
    assert load_folder(scene.output)["model.norm.weight"].isnan().all()


def test_nan_in_the_base_where_a_delta_goes_is_a_failed_verification(scene: Scene) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    scene.single(lambda tensors: {**tensors, name: tensors[name] * float("nan")})
    with pytest.raises(distmerge.DistmergeError) as caught:
        scene.merge()
    assert (caught.value.exit_code, caught.value.where) == (4, name)
    assert not scene.output.exists()


def test_a_single_file_beside_an_index_that_names_only_it_is_accepted(scene: Scene) -> None:
    path = scene.single()
    scene.merge()
    weight_map = dict.fromkeys(load_file(path), path.name)
    scene.index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    scene.merge(output=scene.folder / "again")
    assert tree(scene.folder / "again") == tree(scene.output)
    scene.spoil_weight_map(lambda weight_map: {**weight_map, "lm_head.weight": "model-00001-of-00001.safetensors"})
    scene.refuse("model.safetensors", INDEX, output=scene.folder / "third", hint="move")


def test_a_file_that_shrinks_under_the_reader_is_an_error_in_words(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(8192))
    fd = open_input(path)
    try:
        os.truncate(path, 4096)  # a mapping would now end the process with SIGBUS
        with pytest.raises(distmerge.DistmergeError, match="ended at byte 4096, 4096 bytes early") as caught:
            read_exact(fd, memoryview(bytearray(8192)), 0, path)
    finally:
        os.close(fd)
    assert (caught.value.exit_code, caught.value.where) == (5, str(path))
