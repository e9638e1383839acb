"""Architectures x adapters x names on disk: merged weights against float64, answers against the unmerged model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

import distmerge
from tests.factories import load_folder
from tests.matrix import CASES, adapters, bases, exact
from tests.matrix.case import Case
from tests.matrix.exact import Original, Value
from tests.oracles import assert_rounded_once

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the bases are, each made once."""
    return tmp_path_factory.mktemp("bases")


@cache
def known(base: Path, name: str, kind: str, dtype: str) -> tuple[Original, Tensor]:
    """The model in `base` before training, and its answers."""
    model = bases.load(base, kind=kind, dtype=dtype)
    before = bases.answers(model, name) if dtype == "float32" else torch.empty(0)
    return exact.original(model), before


@pytest.mark.parametrize("case", [case for case in CASES if not case.old], ids=str)
def test_the_merge_is_that_of_float64_and_answers_like_the_unmerged_model(
    case: Case, root: Path, tmp_path: Path
) -> None:
    base = bases.folder(root, case.model, case.naming, case.dtype, case.shard)
    facts, before = known(base, case.model, case.trained_as, case.dtype)
    tuned = trained(case, base, tmp_path)
    wanted = bases.answers(tuned, case.model) if case.dtype == "float32" else before
    folders = adapters.save(tuned, tmp_path / "adapter", start=case.start, tables=case.tables)
    initial = tmp_path / "initial" if case.start else None
    out = merge_and_verify(base, folders, tmp_path / "out", case.weights, initial)
    found = bases.load(out, kind=loaded_as(case), dtype=case.dtype)
    assert_tensors(base, out, case)
    if case.oracle:
        weighted = list(zip(folders, case.weights, strict=True))
        assert_weights(found.state_dict(), exact.merged(weighted, facts, initial=initial), facts)
    if case.dtype == "float32":
        assert_answers(bases.answers(found, case.model), wanted, before, case.tolerance)


@pytest.mark.parametrize("case", [case for case in CASES if case.old], ids=str)
def test_an_adapter_with_old_names_is_merged_as_its_names_say(case: Case, root: Path, tmp_path: Path) -> None:
    base = bases.folder(root, case.model, case.naming, case.dtype, case.shard)
    facts, before = known(base, case.model, "", case.dtype)
    then = bases.folder(root, case.model, bases.old_naming(case.model, case.old), case.dtype)
    adapter = adapters.write_old(tmp_path / "adapter", then, case.model, case.pattern, case.old, **case.fields)
    out = merge_and_verify(base, [adapter], tmp_path / "out")
    found = bases.load(out, dtype=case.dtype)
    assert_tensors(base, out, case)
    assert_weights(found.state_dict(), adapters.merge_old(adapter, then, case.model, case.old, tmp_path), facts)
    if case.peft_reads:
        from peft import PeftModel

        theirs = PeftModel.from_pretrained(bases.load(base), adapter)
        answers = [bases.answers(model, case.model) for model in (found, theirs)]
        assert_answers(*answers, before, case.tolerance)


def trained(case: Case, base: Path, scratch: Path) -> object:
    """The unmerged model with all adapters of the case."""
    model = bases.load(base, kind=case.trained_as, dtype=case.dtype)
    if case.vocab:
        model.resize_token_embeddings(case.vocab)
    if case.start:
        tuned = adapters.begin(model, case.fields, case.start, scratch / "initial")
        adapters.disturb(tuned, case.noise, seed=1)
        return tuned
    tuned = adapters.train(model, case.tuner, case.fields, noise=case.noise)
    adapters.weigh(tuned, "default", case.weights[0])
    for number, (fields, weight) in enumerate(zip(case.more, case.weights[1:], strict=True)):
        adapters.add(tuned, fields, weight, f"more{number}", noise=case.noise)
    return tuned


def merge_and_verify(
    base: Path,
    folders: list[Path],
    out: Path,
    weights: tuple[float, ...] = (1.0,),
    initial: Path | None = None,
) -> Path:
    """Merges on the CPU in this process, and has `verify` recompute what came out."""
    choices = tuple(
        distmerge.AdapterChoice(folder=folder, weight=weight, initial=initial)
        for folder, weight in zip(folders, weights, strict=True)
    )
    distmerge.merge(distmerge.MergeConfig(base=base, adapters=choices, output=out, nproc=1, device="cpu"))
    assert distmerge.verify(out, base=base, adapters=choices).recomputed is not None
    return out


def loaded_as(case: Case) -> str:
    """The class that loads the output, where config.json does not name it."""
    return "" if "Classification" in case.trained_as else case.trained_as


def assert_tensors(base: Path, out: Path, case: Case) -> None:
    """The output has the base's tensors under their names, in their dtypes; what no class of the case loads is the
    very same. Its configuration is true to them."""
    before, after = load_folder(base), load_folder(out)
    if "layer_replication" not in case.fields:
        assert sorted(after) == sorted([*before, *case.new])
        assert all(after[name].dtype == tensor.dtype for name, tensor in before.items())
        assert all(case.vocab or after[name].shape == tensor.shape for name, tensor in before.items())
    for name in bases.not_loaded(base, case.trained_as):
        assert torch.equal(before[name], after[name]), name
    config = json.loads((out / "config.json").read_text())
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if case.tied is not None:
        assert config["tie_word_embeddings"] is case.tied
    if case.vocab:
        assert case.vocab in [part.get("vocab_size") for part in parts]


def assert_weights(found: dict[str, Tensor], expected: dict[str, Value], facts: Original) -> None:
    """`found` is `expected`, and something of it is not what it was."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_value(found[name], value, name)
    same = [name for name, tensor in found.items() if torch.equal(tensor, facts.weights.get(name, tensor))]
    assert len(same) < len(found)


def assert_value(found: Tensor, expected: Value, name: str) -> None:
    """Elements that something is added to are rounded once, all others are the very same."""
    assert found.shape == expected.exact.shape, name
    computed = expected.magnitude > 0
    assert torch.equal(found[~computed], expected.exact[~computed].to(found.dtype)), f"{name}: untouched elements"
    if bool(computed.any()):
        assert_rounded_once(
            found[computed], expected.exact[computed], expected.magnitude[computed], terms=48, name=name
        )


def assert_answers(found: Tensor, wanted: Tensor, before: Tensor, tolerance: float) -> None:
    """`found` are the answers of the unmerged model, which are far from those of the base."""
    common = tuple(slice(min(a, b)) for a, b in zip(wanted.shape, before.shape, strict=True))
    effect = float((wanted[common] - before[common]).abs().max())
    limit = tolerance * float(wanted.abs().max())
    assert effect > 100 * limit, f"the adapter changes answers by {effect} only"
    assert found.shape == wanted.shape
    error = float((found - wanted).abs().max())
    assert error < limit, f"off by {error}, may be {limit}"
