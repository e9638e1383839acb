"""Adapters combined by ties, DARE and pruning: merged files against float64, and what verify says of them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import distmerge
from distmerge import AdapterChoice, MergeConfig
from distmerge.checkpoint.header import read_header
from distmerge.errors import InputError, VerifyError
from distmerge.grid import BLOCK_NUMEL
from distmerge.numerics.combine import draw
from distmerge.numerics.methods import Combine
from distmerge.plan import make_plan
from distmerge.work import WorkFolder
from tests import oracles
from tests.conftest import Command, environment, tree
from tests.factories import (
    edit_json,
    load_folder,
    merge,
    save_adapter,
    save_base,
    write_adapter,
    write_base,
)

METHODS = ("ties", "magnitude_prune", "dare_ties", "dare_linear")
WEIGHTS = (0.7, -0.4)
DENSITY = 0.3
Q = "model.layers.0.self_attn.q_proj.weight"
Deltas = list[tuple[int, float, Tensor, Tensor]]  # the adapter's number, its weight, its delta, what float32 adds up


def plain(folders: list[Path]) -> dict[str, Deltas]:
    """The deltas of plain LoRAs by tensor."""
    found: dict[str, Deltas] = {}
    for number, (folder, weight) in enumerate(zip(folders, WEIGHTS, strict=True), start=1):
        for name, (delta, size) in oracles.deltas(folder).items():
            found.setdefault(name, []).append((number, weight, delta, size))
    return found


def dora_deltas(folder: Path, base: dict[str, Tensor]) -> dict[str, Deltas]:
    """`magnitude / |W + s B A| (W + s B A) - W`, rows of W one by one, as the first adapter's."""
    tensors, found = load_file(folder / "adapter_model.safetensors"), {}
    for name, (delta, size) in oracles.deltas(folder).items():
        weight = base[name].double()
        module = f"base_model.model.{name.removesuffix('.weight')}."
        (magnitude,) = (t.double() for key, t in tensors.items() if key.startswith(f"{module}lora_magnitude_vector"))
        factor = (magnitude / torch.linalg.vector_norm(weight + delta, dim=1))[:, None]
        exact = factor * (weight + delta)
        # The difference from the base is taken in float32.
        found[name] = [
            (1, WEIGHTS[0], exact - weight, factor.abs() * (weight.abs() + size) + exact.abs() + weight.abs())
        ]
    return found


def combined(name: str, deltas: Deltas, method: str, density: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is added to tensor `name`, by the definition in words, the magnitude of its sums, and where float64 and
    float32 may disagree on what is kept. `name` has one block."""
    kept, near = [], torch.zeros(deltas[0][2].shape, dtype=torch.bool)
    for number, _, delta, _ in deltas:
        if method.startswith("dare"):
            combine = Combine(method=method, density=density, seed=seed)
            mask = draw(combine, adapter=number, name=name, block=0, numel=delta.numel()).view(delta.shape)
        else:
            threshold = delta.abs().flatten().topk(max(1, int(density * delta.numel()))).values[-1]
            mask = delta.abs() >= threshold
            near |= (delta.abs() / threshold - 1).abs() < 1e-5
        kept.append(delta * mask / (density if method.startswith("dare") else 1))
    if method.endswith("ties"):
        total = torch.stack(kept).sum(0)
        near |= (total != 0) & (total.abs() < 1e-6 * torch.stack(kept).abs().sum(0).clamp(min=1e-3))
        sign = torch.where(total >= 0, 1, -1)
        votes = torch.stack([each.sign() == sign for each in kept])
        count = votes.sum(0).clamp(min=1)
    else:
        votes, count = torch.ones(len(kept), *near.shape), torch.ones(near.shape)
    parts = [weight * each * vote / count for (_, weight, _, _), each, vote in zip(deltas, kept, votes, strict=True)]
    largest = 1 / density if method.startswith("dare") else 1.0
    size = sum((abs(weight) * largest * size for _, weight, _, size in deltas), torch.zeros(near.shape))
    return torch.stack(parts).sum(0), size, near


def assert_combined(out: Path, base: dict[str, Tensor], deltas: dict[str, Deltas], options: dict[str, Any]) -> None:
    found, doubtful = load_folder(out), 0
    for name, tensor in base.items():
        if name not in deltas:
            assert torch.equal(found[name], tensor), name
            continue
        change, size, near = combined(name, deltas[name], options["combine"], options["density"], options["seed"])
        doubtful += int((near & (change.abs() > 0)).sum())
        expected, magnitude = tensor.double() + change, tensor.double().abs() + size
        oracles.assert_rounded_once(found[name][~near], expected[~near], magnitude[~near], terms=40, name=name)
        assert not torch.equal(found[name], tensor)
    assert doubtful <= 40  # the thresholds themselves, and hardly another element


@pytest.fixture(scope="session")
def pair(adapter: Path, other_adapter: Path) -> list[Path]:
    """Two LoRAs of different r, alpha and targets."""
    return [adapter, other_adapter]


def weighted(folders: list[Path]) -> list[tuple[Path, float]]:
    return list(zip(folders, WEIGHTS, strict=True))


def choices(*folders: Path) -> tuple[AdapterChoice, ...]:
    return tuple(AdapterChoice(folder=f, weight=w) for f, w in zip(folders, WEIGHTS, strict=False))


def options_of(method: str, density: float = DENSITY) -> dict[str, Any]:
    return {"combine": method, "density": density, "seed": 11 if method.startswith("dare") else 0}


def rewrite(out: Path, name: str, change: Callable[[Tensor], None]) -> None:
    """Changes a tensor of the output in place, and its digest in the receipt, as someone who deceives would."""
    path = next(path for path in out.glob("*.safetensors") if any(s.name == name for s in read_header(path).tensors))
    tensors = load_file(path)
    spec = next(spec for spec in read_header(path).tensors if spec.name == name)
    change(tensors[name])
    data = bytes(tensors[name].contiguous().view(-1).view(torch.uint8).tolist())
    content = path.read_bytes()
    path.write_bytes(content[: spec.begin] + data + content[spec.begin + spec.nbytes :])
    files = json.loads((out / "merge_receipt.json").read_text())["files"]
    files[path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(out / "merge_receipt.json", files=files)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["base", "fp32_base", "packed_base"])
def test_two_adapters_are_combined_as_float64_does_and_verify_accepts_it(
    which: str, method: str, pair: list[Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, options = request.getfixturevalue(which), options_of(method)
    out = merge(base, weighted(pair), tmp_path / "out", **options)
    assert_combined(out, oracles.dense(load_folder(base)), plain(pair), options)
    again = distmerge.verify(out, base=base, adapters=choices(*pair)).recomputed
    assert again is not None
    assert again.num_tensors == 14
    assert again.max_ulp_beyond_noise <= 0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["pruned", "kept"])
def test_verify_refuses_an_element_that_was_decided_otherwise(
    which: str, method: str, fp32_base: Path, pair: list[Path], tmp_path: Path
) -> None:
    options = options_of(method)
    out = merge(fp32_base, weighted(pair), tmp_path / "out", **options)
    before = load_folder(fp32_base)[Q]
    change, _, near = combined(Q, plain(pair)[Q], method, DENSITY, options["seed"])
    first = plain(pair)[Q][0][2]
    if which == "kept":  # what counts is taken away
        at = int(torch.where(near, 0.0, change.abs()).argmax())
        value = before.view(-1)[at]
    else:  # what does not count is put in
        at = int(torch.where(near | (change != 0), 0.0, first.abs()).argmax())
        value = (before.double() + 0.7 * first).view(-1)[at].float()
    rewrite(out, Q, lambda tensor: tensor.view(-1).__setitem__(at, value))
    with pytest.raises(VerifyError, match="1 element is not base") as error:
        distmerge.verify(out, base=fp32_base, adapters=choices(*pair))
    assert error.value.where == Q


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_the_delta_of_dora_is_what_it_makes_of_the_base(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, options = save_base(tmp_path / "base", dtype), options_of(method, 0.4)
    dora = save_adapter(tmp_path / "dora", r=3, alpha=5, use_dora=True, target_modules=["q_proj", "down_proj"])
    lora = save_adapter(tmp_path / "lora", r=6, alpha=4, seed=8, target_modules=["q_proj", "v_proj"])
    out = merge(base, weighted([dora, lora]), tmp_path / "out", **options)
    before, deltas = load_folder(base), dora_deltas(dora, load_folder(base))
    for name, pair in oracles.deltas(lora).items():
        deltas.setdefault(name, []).append((2, WEIGHTS[1], *pair))
    assert len(deltas) == 6
    assert_combined(out, before, deltas, options)
    found = distmerge.verify(out, base=base, adapters=choices(dora, lora)).recomputed
    assert found is not None
    assert found.num_tensors == 6
    change = combined(Q, deltas[Q], method, 0.4, options["seed"])[0]
    at = int(change.abs().argmax())
    rewrite(out, Q, lambda tensor: tensor.view(-1).__setitem__(at, before[Q].view(-1)[at]))
    with pytest.raises(VerifyError, match="1 element is not base"):
        distmerge.verify(out, base=base, adapters=choices(dora, lora))


@pytest.mark.parametrize("method", METHODS)
def test_one_adapter_alone_is_pruned(method: str, fp32_base: Path, adapter: Path, tmp_path: Path) -> None:
    options = options_of(method)
    out = merge(fp32_base, [(adapter, 0.7)], tmp_path / "out", **options)
    deltas = {name: [(1, 0.7, *pair)] for name, pair in oracles.deltas(adapter).items()}
    assert_combined(out, load_folder(fp32_base), deltas, options)
    changed = (load_folder(out)[Q] != load_folder(fp32_base)[Q]).float().mean()
    assert float(changed) == pytest.approx(DENSITY, abs=0.03)
    distmerge.verify(out, base=fp32_base, adapters=choices(adapter))


def test_an_adapter_and_what_it_began_as_are_pruned_as_one_delta(
    fp32_base: Path, adapter: Path, tmp_path: Path
) -> None:
    grown = save_adapter(tmp_path / "grown", seed=3, target_modules=["q_proj"])
    before = save_adapter(tmp_path / "before", seed=4, target_modules=["q_proj"])
    edit_json(grown / "adapter_config.json", init_lora_weights="lora_ga")
    adapters = (AdapterChoice(folder=grown, weight=0.7, initial=before), AdapterChoice(folder=adapter, weight=-0.4))
    config = {"base": fp32_base, "adapters": adapters, "nproc": 1, "device": "cpu", **options_of("ties")}
    distmerge.merge(MergeConfig(output=tmp_path / "out", **config))
    deltas = {name: [(3, -0.4, *pair)] for name, pair in oracles.deltas(adapter).items()}
    first, second = oracles.deltas(grown), oracles.deltas(before)
    for name in first:
        (a, size), (b, also) = first[name], second[name]
        deltas[name] = [(1, 0.7, a - b, size + also), *deltas[name]]
    assert_combined(tmp_path / "out", load_folder(fp32_base), deltas, options_of("ties"))
    distmerge.verify(tmp_path / "out", base=fp32_base, adapters=adapters)


@pytest.mark.parametrize("method", METHODS)
def test_two_memory_budgets_give_equal_bytes_over_many_blocks(method: str, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    shapes = {"model.a": (3, BLOCK_NUMEL + 77), "model.b": (2300, 2048), "model.c": (BLOCK_NUMEL + 9, 1)}
    tensors = {f"{name}.weight": torch.randn(shape, generator=noise) * 0.02 for name, shape in shapes.items()}
    base = write_base(tmp_path / "base", tensors)
    loras = []
    for r in (3, 5):
        pairs = {
            name: (torch.randn(r, shape[1], generator=noise) * 0.1, torch.randn(shape[0], r, generator=noise) * 0.1)
            for name, shape in shapes.items()
        }
        loras.append(write_adapter(tmp_path / f"lora{r}", pairs, rank_pattern={}))
    options = options_of(method)
    first = merge(base, weighted(loras), tmp_path / "first", **options)
    with pytest.raises(InputError, match="too few") as refused:
        merge(base, weighted(loras), tmp_path / "none", memory_budget=1 << 20, **options)
    smallest = int(refused.value.hint.split()[1].removesuffix("MiB")) << 20
    second = merge(base, weighted(loras), tmp_path / "second", memory_budget=smallest, **options)
    assert tree(first) == tree(second)
    found = distmerge.verify(first, base=base, adapters=choices(*loras)).recomputed
    assert found is not None
    assert found.num_tensors == 3
    if method == "magnitude_prune":  # the threshold is that of the whole tensor
        deltas = plain(loras)["model.b.weight"]
        change, _, near = combined("model.b.weight", deltas, method, DENSITY, 0)
        merged = load_folder(first)["model.b.weight"] != tensors["model.b.weight"]
        assert int((merged != (change != 0))[~near].sum()) <= 4  # a change that is lost in rounding


def test_another_seed_gives_another_mask_and_the_same_one_the_same(
    base: Path, pair: list[Path], tmp_path: Path
) -> None:
    found = [
        load_folder(merge(base, weighted(pair), tmp_path / f"out{n}", combine="dare_linear", density=0.5, seed=seed))[Q]
        for n, seed in enumerate((3, 4, 3))
    ]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_a_tied_head_that_the_base_stores_stays_equal_to_the_embedding(tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    table = torch.randn(50, 16, generator=noise)
    tensors = {"model.embed_tokens.weight": table, "lm_head.weight": table.clone(), "model.norm.weight": torch.ones(16)}
    base = write_base(tmp_path / "base", tensors, tie_word_embeddings=True)
    a, b = torch.randn(4, 50, generator=noise), torch.randn(16, 4, generator=noise)
    folder = write_adapter(tmp_path / "lora", {"lm_head": (b.T.contiguous(), a.T.contiguous())})
    own = load_file(folder / "adapter_model.safetensors")
    own |= {f"base_model.model.model.embed_tokens.lora_embedding_{x}": y for x, y in (("A", a), ("B", b))}
    save_file(own, folder / "adapter_model.safetensors")
    edit_json(folder / "adapter_config.json", target_modules=["embed_tokens", "lm_head"])
    out = load_folder(merge(base, folder, tmp_path / "out", combine="dare_linear", density=0.5))
    changed = out["lm_head.weight"] != table
    assert 300 < int(changed.sum()) < 500
    assert torch.equal(changed, out["model.embed_tokens.weight"] != table)


def test_an_unfinished_merge_is_not_gone_on_with_at_another_density(
    base: Path, pair: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    config = MergeConfig(base=base, adapters=choices(*pair), output=output, device="cpu", **options_of("dare_ties"))
    with WorkFolder(output) as work:
        work.open(make_plan(config, "cpu"))
    for change, words in (
        ({"density": 0.4}, "--density \\(0.3 -> 0.4\\)"),
        ({"seed": 12}, "--seed \\(11 -> 12\\)"),
        ({"combine": "dare_linear"}, "--combine \\(dare_ties -> dare_linear\\)"),
    ):
        with pytest.raises(InputError, match=words):
            merge(base, weighted(pair), output, **{**options_of("dare_ties"), **change})
    merge(base, weighted(pair), output, **options_of("dare_ties"))
    with pytest.raises(InputError, match="another merge"):
        merge(base, weighted(pair), output, **options_of("dare_ties", 0.4))


def test_the_ledger_gives_the_norms_of_whole_deltas_and_of_what_was_done(
    fp32_base: Path, pair: list[Path], tmp_path: Path
) -> None:
    out = merge(fp32_base, weighted(pair), tmp_path / "out", **options_of("ties"))
    ledger = json.loads((out / "merge_receipt.json").read_text())["ledger"]
    before, after = load_folder(fp32_base), load_folder(out)
    for number, (folder, weight) in enumerate(weighted(pair), start=1):
        deltas = oracles.deltas(folder, weight)
        for key in load_file(folder / "adapter_model.safetensors"):
            entry = ledger[f"{number}:{key}"]
            name = entry["tensor"]
            assert entry["delta_norm"] == pytest.approx(float(torch.linalg.norm(deltas[name][0])), rel=1e-5)
            applied = float(torch.linalg.norm(after[name].double() - before[name].double()))
            assert entry["applied_norm"] == pytest.approx(applied, rel=1e-5)


def test_a_recipe_names_the_method_and_plan_card_and_receipt_tell_it(
    distmerge: Command, base: Path, adapter: Path, tmp_path: Path
) -> None:
    recipe = {"base": str(base), "adapter": [str(adapter)], "output": str(tmp_path / "out"), "nproc": 1}
    recipe |= {"combine": "dare_ties", "density": 0.25, "seed": 9}
    (tmp_path / "m.yaml").write_text(json.dumps(recipe))
    assert "combine  dare_ties, density 0.25, seed 9" in distmerge("plan", "--config", tmp_path / "m.yaml").stdout
    told = json.loads(distmerge("plan", "--config", tmp_path / "m.yaml", "--json", DISTMERGE_DENSITY="0.5").stdout)
    assert told["combine"] == "dare_ties, density 0.5, seed 9"
    distmerge("merge", "--config", tmp_path / "m.yaml")
    assert "dare\\_ties, density 0.25, seed 9" in (tmp_path / "out" / "README.md").read_text()
    options = json.loads((tmp_path / "out" / "merge_receipt.json").read_text())["options"]
    assert (options["combine"], options["density"], options["seed"]) == ("dare_ties", 0.25, 9)


MEASURED = """
import re, sys
import torch
from distmerge.numerics.apply import Loaded
from distmerge.numerics.combine import Combination, Part, combine_changes, deltas_of, find_thresholds, histograms
from distmerge.numerics.lora import Factors
from distmerge.numerics.methods import Combine

def peak():
    return int(re.search("VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(1)
combine, peaks = Combine(method=sys.argv[1], density=0.3), []
for side in (64, 2048):
    work = torch.zeros(side, side)
    whole = {"height": side, "matrices": (0, 1), "rows": (0, side), "cols": (0, side), "transposed": False}
    parts = tuple(
        Part(adapter=n, weight=0.5, sign=1.0, changes=(Loaded(factors=f, tensors={}, options={}, weight=1.0, **whole),))
        for n in (1, 2, 3)
        for f in [Factors(a=torch.randn(1, 4, side), b=torch.randn(1, side, 4), scaling=1.0)]
    )
    combination = Combination(combine=combine, name="t", parts=parts)
    counted = lambda uppers: histograms(deltas_of(work, parts, top=0, left=0)[0], uppers)
    peaks.append(peak())
    thresholds = find_thresholds(work.numel(), combination, counted) if combine.prunes else ()
    combination = Combination(combine=combine, name="t", parts=parts, thresholds=thresholds)
    combine_changes(work, combination, block=0, top=0, left=0)
peaks.append(peak())
print(peaks[2] - peaks[1], combine.scratch_nbytes(3, work.numel()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("method", METHODS)
def test_combining_takes_no_more_memory_than_the_plan_counts(method: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, method], capture_output=True, text=True, env=environment(), check=True
    )
    taken, counted = map(int, done.stdout.split())
    assert 0.4 * counted < taken < counted


def test_the_plan_counts_the_memory_of_combining(base: Path, pair: list[Path], tmp_path: Path) -> None:
    lanes = []
    for options in ({}, options_of("ties")):
        config = MergeConfig(base=base, adapters=choices(*pair), output=tmp_path / "out", device="cpu", **options)
        lanes.append(make_plan(config, "cpu").lane_nbytes)
    assert lanes[1] - lanes[0] == Combine(method="ties").scratch_nbytes(2, BLOCK_NUMEL)
