"""Links in a base: its own files may lie elsewhere, what else they lead to is not copied and not walked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import distmerge
from tests.attacks.scene import Scene
from tests.conftest import tree
from tests.factories import hub_snapshot


def _secret(scene: Scene) -> Path:
    path = scene.folder / "private" / "notes.txt"
    path.parent.mkdir()
    path.write_text("not of this model")
    return path


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_a_side_file_that_leads_out_of_the_base_is_refused_by_name(scene: Scene, name: str, kind: str) -> None:
    secret, link = _secret(scene), scene.base / name
    link.unlink(missing_ok=True)
    link.symlink_to(secret if kind == "absolute" else "../private/notes.txt")
    scene.refuse(link, "leads out of the folder", secret, hint="remove the link")


def test_a_side_file_that_leads_out_of_the_adapter_is_refused_by_name(scene: Scene) -> None:
    link = scene.adapter / "tokenizer.json"
    link.symlink_to(_secret(scene))
    scene.refuse(link, "leads out of the folder", hint="remove the link")


def test_a_side_file_that_leads_out_of_a_hub_cache_is_refused_by_name(scene: Scene) -> None:
    snapshot = hub_snapshot(scene.base, scene.folder / "cache")
    (snapshot / "notes.txt").symlink_to(_secret(scene))
    scene.refuse(snapshot / "notes.txt", "leads out of the folder", base=snapshot)


def test_a_side_file_that_leads_to_another_of_the_base_is_copied(scene: Scene) -> None:
    (scene.base / "assets").mkdir()
    (scene.base / "assets" / "same.json").symlink_to("../config.json")
    scene.merge()
    assert (scene.output / "assets" / "same.json").read_bytes() == (scene.base / "config.json").read_bytes()


@pytest.mark.parametrize("target", ["../private", ".", "..", "assets"])
def test_a_folder_that_is_a_link_is_not_walked(scene: Scene, target: str) -> None:
    _secret(scene)
    (scene.base / "assets").mkdir()
    (scene.base / "assets" / "logo.png").write_bytes(b"x")
    scene.merge()
    expected = tree(scene.output)
    (scene.base / "linked").symlink_to(target)
    scene.merge(output=scene.folder / "again")
    assert tree(scene.folder / "again") == expected


def test_a_base_whose_every_file_is_a_link_into_one_folder_is_merged_whole(scene: Scene) -> None:
    (scene.base / "tokenizer.json").write_text("{}")
    farm = scene.folder / "farm" / "base"  # the same name: it stands in card and receipt
    farm.mkdir(parents=True)
    for path in scene.base.iterdir():
        (farm / path.name).symlink_to(path)
    scene.merge(base=farm)
    scene.merge(output=scene.folder / "plain")
    assert tree(scene.output) == tree(scene.folder / "plain")
    assert not any(path.is_symlink() for path in scene.output.rglob("*"))


def test_a_hub_cache_of_links_gives_what_the_folder_itself_gives(scene: Scene) -> None:
    base = Path(shutil.copytree(scene.base, scene.folder / "name"))  # what the repository is called
    (base / "tokenizer.json").write_text("{}")
    scene.merge(base=base)
    scene.merge(base=hub_snapshot(base, scene.folder / "cache"), output=scene.folder / "again")
    again, expected = tree(scene.folder / "again"), tree(scene.output)
    for found in (again, expected):
        del found["merge_receipt.json"]  # the plan in it knows the times of the base's files
    assert again == expected
    assert distmerge.verify(scene.folder / "again").num_adapter_tensors == 28


@pytest.mark.parametrize("target", ["../private/notes.txt", "../private"])
def test_a_link_that_is_no_weight_file_of_the_model_opens_no_folder(scene: Scene, target: str) -> None:
    secret = _secret(scene)
    (scene.base / "decoy.safetensors").symlink_to(target)
    (scene.base / "notes.txt").symlink_to(secret)
    scene.refuse(scene.base / "notes.txt", "leads out of the folder")
