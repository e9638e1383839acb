"""`verify` in depth: planted faults, with digests that were forged to fit, are found and named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import distmerge
from distmerge import AdapterChoice
from distmerge.audit.findings import Audit, AuditError
from distmerge.errors import InputError, UsageError, VerifyError
from tests import models, oracles
from tests.factories import (
    edit_json,
    load_folder,
    merge,
    rewrite_adapter,
    save_adapter,
    save_base,
    write_adapter,
    write_base,
)
from tests.matrix import adapters, bases
from tests.matrix.case import experts

LAYER = "model.layers.{}.self_attn.{}_proj.weight"
V, K, Q, V1 = LAYER.format(0, "v"), LAYER.format(0, "k"), LAYER.format(0, "q"), LAYER.format(1, "v")
GATE, HEAD = "model.layers.0.mlp.gate_proj.weight", "lm_head.weight"
DEPTHS = pytest.mark.parametrize("depth", ["sample", "probe", "full"])


def rewrite(out: Path, **tensors: Tensor) -> None:
    """Puts tensors in the place of those of these names, and tells the receipt the new digests."""
    for path in sorted(out.glob("*.safetensors")):
        held = load_file(path)
        if tensors.keys() & held.keys():
            save_file({**held, **{name: tensors[name] for name in tensors if name in held}}, path, {"format": "pt"})
    forge(out)


def forge(out: Path) -> None:
    """Writes the digests of the files as they are into the receipt."""
    files = json.loads((out / "merge_receipt.json").read_text())["files"]
    for name in files:
        data = (out / name).read_bytes()
        files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit_json(out / "merge_receipt.json", files=files)


@pytest.fixture
def out(merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged, tmp_path / "out"))


def verify(out: Path, base: Path, *folders: Path, **options: Any) -> Audit:
    return distmerge.verify(out, base=base, adapters=tuple(AdapterChoice(folder=a) for a in folders), **options)


def faults(out: Path, base: Path, *folders: Path, **options: Any) -> dict[str, str]:
    """What verify says is wrong, by where; the message must hold all of it, and the exit code be 4."""
    with pytest.raises(AuditError) as caught:
        verify(out, base, *folders, **options)
    assert caught.value.exit_code == 4
    for finding in caught.value.findings[:5]:
        assert finding.what in str(caught.value)
    return {finding.where: finding.what for finding in caught.value.findings}


def applied(base: Path, adapter: Path, name: str, times: float) -> Tensor:
    """The tensor with `times` the adapter's delta, rounded once by way of float32."""
    return (load_folder(base)[name].double() + times * oracles.deltas(adapter)[name][0]).float().bfloat16()


# -- each fault by its name


@DEPTHS
@pytest.mark.parametrize(
    ("times", "words"),
    [
        (-1.0, r"the delta was subtracted, not added \(projection of out - base on it: -1\.0"),
        (2.0, r"the delta was added twice \(projection of out - base on it: [12]\.[09]"),
        (0.0, r"^holds the base's values: not merged$"),
        (0.25, r"the delta was applied with 0\.2\d* times its scaling"),
        (4.0, r"the delta was applied with 4\S* times its scaling"),
        (1.5, r"the delta was applied with 1\.5\S* times its scaling"),
    ],
    ids=["negated", "doubled", "missing", "a quarter", "four times", "one and a half"],
)
def test_a_delta_that_was_not_applied_once_is_found_and_named(
    times: float, words: str, depth: str, out: Path, request: pytest.FixtureRequest
) -> None:
    base, adapter = request.getfixturevalue("base"), request.getfixturevalue("adapter")
    rewrite(out, **{V: applied(base, adapter, V, times)})
    found = faults(out, base, adapter, depth=depth)
    assert found.keys() == {V}
    assert re.search(words, found[V]), found[V]


@pytest.mark.parametrize("depth", ["sample", "full"])
@pytest.mark.parametrize("name", [V, HEAD], ids=["merged", "untouched"])
def test_a_flipped_element_is_found_with_its_place_and_both_values(
    name: str, depth: str, out: Path, base: Path, adapter: Path
) -> None:
    right = load_folder(out)[name]
    wrong = right.clone()
    wrong.view(torch.int16)[3, 5] ^= 1 << 9  # of the exponent
    rewrite(out, **{name: wrong})
    found = faults(out, base, adapter, depth=depth)
    assert found.keys() == {name}
    said = re.search(r"1 element is not .*: \[3, 5\] is (\S+), should be (\S+)$", found[name])
    assert said is not None, found[name]
    assert float(said[1]) == pytest.approx(float(wrong[3, 5]), rel=1e-3)
    assert float(said[2]) == pytest.approx(float(right[3, 5]), rel=1e-2)


def test_one_step_of_the_last_bit_is_found_by_full(out: Path, base: Path, adapter: Path) -> None:
    wrong = load_folder(out)[V]
    wrong.view(torch.int16)[-1, 0] += 1
    rewrite(out, **{V: wrong})
    assert re.fullmatch(r"1 element is not base \+ delta: \[31, 0\] is .*", faults(out, base, adapter)[V])


def test_a_flipped_element_that_outweighs_rounding_is_found_by_a_probe(out: Path, base: Path, adapter: Path) -> None:
    wrong = load_folder(out)[V]
    wrong[7, 9] += 1
    rewrite(out, **{V: wrong})
    assert "[7, 9] is" in faults(out, base, adapter, depth="probe")[V]


@DEPTHS
def test_a_value_that_is_not_finite_is_found_and_named(depth: str, out: Path, base: Path, adapter: Path) -> None:
    wrong = load_folder(out)[V]
    wrong[2, 1] = float("nan")
    rewrite(out, **{V: wrong})
    assert re.search(r"1 values are not finite, \[2, 1\] is nan", faults(out, base, adapter, depth=depth)[V])


@DEPTHS
def test_tensors_of_equal_shape_that_changed_places_are_found_and_named(
    depth: str, out: Path, base: Path, adapter: Path
) -> None:
    held = load_folder(out)
    rewrite(out, **{V: held[K], K: held[V]})
    found = faults(out, base, adapter, depth=depth)
    assert found == {V: f"holds what {K!r} should hold", K: f"holds what {V!r} should hold"}


@DEPTHS
def test_the_delta_of_another_layer_is_found_and_named(depth: str, out: Path, base: Path, adapter: Path) -> None:
    wrong = (load_folder(base)[V].double() + oracles.deltas(adapter)[V1][0]).float().bfloat16()
    rewrite(out, **{V: wrong})
    assert faults(out, base, adapter, depth=depth) == {V: f"the delta of {V1!r} was added, not its own"}


@DEPTHS
def test_the_delta_of_another_adapter_is_found_and_named(
    depth: str, out: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = save_adapter(tmp_path / "lora", seed=99)
    rewrite(out, **{V: applied(base, other, V, 1.0), GATE: applied(base, other, GATE, 1.0)})
    found = faults(out, base, adapter, depth=depth)
    assert found.keys() == {V, GATE}
    for what in found.values():
        assert re.search(r"something else than the delta was added: .* cosine -?0\.[01]", what), what


@DEPTHS
def test_rows_that_were_not_merged_are_found_and_named(depth: str, out: Path, base: Path, adapter: Path) -> None:
    wrong = load_folder(out)[GATE]
    wrong[80:] = load_folder(base)[GATE][80:]
    rewrite(out, **{GATE: wrong})
    found = faults(out, base, adapter, depth=depth)
    assert found == {GATE: "rows 80 to 159 of 160: holds the base's values: not merged"}


@DEPTHS
def test_a_tensor_that_was_rounded_twice_is_found_and_named(depth: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(64, 96, generator=generator)
    pair = (torch.randn(4, 96, generator=generator), torch.randn(64, 4, generator=generator) * 0.05)
    base = write_base(tmp_path / "base", {"m.weight": weight})
    lora = write_adapter(tmp_path / "lora", {"m": pair})
    out = merge(base, lora, tmp_path / "out")
    rewrite(out, **{"m.weight": load_folder(out)["m.weight"].bfloat16().float()})
    assert "but not rounded once to the nearest value" in faults(out, base, lora, depth=depth)["m.weight"]


# -- files


def test_swapped_files_are_named_by_their_digests(out: Path) -> None:
    first, second = sorted(out.glob("*.safetensors"))[:2]
    swap(first, second)
    with pytest.raises(VerifyError) as caught:
        distmerge.verify(out)
    assert f"{first.name}: holds what {second.name} should hold, by its sha256" in str(caught.value)
    assert f"{second.name}: holds what {first.name} should hold, by its sha256" in str(caught.value)


def swap(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def test_swapped_files_with_forged_digests_are_named_by_the_index(out: Path) -> None:
    first, second = sorted(out.glob("*.safetensors"))[:2]
    swap(first, second)
    forge(out)
    with pytest.raises(VerifyError, match=f"{first.name} holds what {second.name} should hold"):
        distmerge.verify(out)


def test_swapped_files_with_forged_digests_and_index_are_named_by_the_inputs(
    out: Path, base: Path, adapter: Path
) -> None:
    first, second = sorted(out.glob("*.safetensors"))[:2]
    swap(first, second)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    other = {first.name: second.name, second.name: first.name}
    weight_map = {name: other.get(file, file) for name, file in index["weight_map"].items()}
    edit_json(out / "model.safetensors.index.json", weight_map=weight_map)
    forge(out)
    distmerge.verify(out)
    found = faults(out, base, adapter, depth="sample")
    assert found[str(out / first.name)] == f"holds what {second.name} should hold"
    assert found[str(out / second.name)] == f"holds what {first.name} should hold"


@DEPTHS
def test_files_whose_contents_changed_places_under_their_headers_are_named(depth: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", shard="20KB", num_hidden_layers=2, tie_word_embeddings=True)
    lora = save_adapter(tmp_path / "lora")
    out = merge(base, lora, tmp_path / "out")
    held = load_folder(out)
    by_file = {path.name: set(load_file(path)) for path in sorted(out.glob("*.safetensors"))}
    layers = [{file for file, names in by_file.items() if any(f"layers.{n}.mlp" in x for x in names)} for n in (0, 1)]
    assert all(layers)
    moved = {n: held[n.replace("layers.0.", "layers.1.")] for n in held if "layers.0.mlp" in n}
    moved |= {n: held[n.replace("layers.1.", "layers.0.")] for n in held if "layers.1.mlp" in n}
    rewrite(out, **moved)
    found = faults(out, base, lora, depth=depth)
    first, second = (
        next(f for f, names in by_file.items() if f"model.layers.{n}.mlp.up_proj.weight" in names) for n in (0, 1)
    )
    assert found[first] == f"holds what {second} should hold"
    assert found[second] == f"holds what {first} should hold"


# -- tied


@DEPTHS
def test_a_stale_copy_of_a_tied_head_is_found_and_named(depth: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(48, 32, generator=generator).bfloat16()
    tensors = {"model.embed_tokens.weight": table, HEAD: table.clone(), "model.norm.weight": torch.ones(32)}
    base = write_base(tmp_path / "base", tensors, vocab_size=48, tie_word_embeddings=True)
    a, b = torch.randn(2, 48, generator=generator), torch.randn(32, 2, generator=generator)
    lora = write_adapter(tmp_path / "lora", {"lm_head": (b.T.contiguous(), a.T.contiguous())})
    embedding = {"lora_embedding_A": a, "lora_embedding_B": b}
    more = {f"base_model.model.model.embed_tokens.{name}": tensor for name, tensor in embedding.items()}
    rewrite_adapter(lora, lambda held: {**held, **more})
    edit_json(lora / "adapter_config.json", target_modules=["embed_tokens", "lm_head"])
    out = merge(base, lora, tmp_path / "out")
    assert torch.equal(load_folder(out)[HEAD], load_folder(out)["model.embed_tokens.weight"])
    rewrite(out, **{HEAD: table})
    twin = "model.embed_tokens.weight, which it is tied to, is as it should be: a stale copy"
    assert faults(out, base, lora, depth=depth) == {HEAD: f"holds the base's values: not merged; {twin}"}


# -- many at once, norms, samples


def test_everything_that_is_wrong_is_told_at_once(out: Path, base: Path, adapter: Path) -> None:
    before = load_folder(base)
    names = [LAYER.format(layer, kind) for layer in (0, 1) for kind in "qkvo"]
    rewrite(out, **{name: before[name] for name in names})
    with pytest.raises(AuditError) as caught:
        verify(out, base, adapter)
    assert {finding.where for finding in caught.value.findings} == set(names)
    assert str(caught.value).count("not merged") == 5
    assert "8 things are wrong" in str(caught.value)
    assert "and 3 more" in str(caught.value)


@pytest.mark.parametrize("field", ["delta_norm", "applied_norm"])
@pytest.mark.parametrize(
    "change", [lambda norm: norm * 1.01, lambda norm: None, lambda norm: 0.0], ids=["1 %", "null", "0"]
)
def test_norms_of_the_ledger_that_are_not_true_are_found(
    change: Callable[[float], Any], field: str, out: Path, base: Path, adapter: Path
) -> None:
    ledger = json.loads((out / "merge_receipt.json").read_text())["ledger"]
    key = sorted(ledger)[3]
    true = ledger[key][field]
    ledger[key][field] = change(true)
    edit_json(out / "merge_receipt.json", ledger=ledger)
    verify(out, base, adapter, depth="sample")
    (what,) = faults(out, base, adapter).values()
    said = re.fullmatch(rf"the ledger gives '{re.escape(key)}' a {field} of \S+, it is (\S+)", what)
    assert said is not None, what
    assert float(said[1]) == pytest.approx(true, rel=1e-4)


def large(folder: Path) -> tuple[Path, Path, Path]:
    """A model whose one linear is cut into 12 blocks, its merge and the adapter."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6144, 1024, generator=generator).bfloat16()
    pair = (torch.randn(2, 1024, generator=generator), torch.randn(6144, 2, generator=generator) * 0.1)
    base = write_base(folder / "base", {"m.weight": weight})
    lora = write_adapter(folder / "lora", {"m": pair})
    return base, lora, merge(base, lora, folder / "out")


def test_a_sample_holds_the_first_and_the_last_block_and_says_its_share(tmp_path: Path) -> None:
    base, lora, out = large(tmp_path)
    right = load_folder(out)["m.weight"]
    shares = {
        share: verify(out, base, lora, depth="sample", sample_share=share).recomputed for share in (0.0, 0.3, 1.0)
    }
    assert [found.share for found in shares.values() if found] == [
        pytest.approx(2 / 12),
        *([pytest.approx(0.5, abs=0.3), 1.0]),
    ]
    for row in (0, 6143):
        wrong = right.clone()
        wrong[row, 100] += 3
        rewrite(out, **{"m.weight": wrong})
        assert f"[{row}, 100] is" in faults(out, base, lora, depth="sample", sample_share=0.0)["m.weight"]
    wrong = right.clone()
    wrong[3000, 100] += 3
    rewrite(out, **{"m.weight": wrong})
    verify(out, base, lora, depth="sample", sample_share=0.0)
    assert "[3000, 100] is" in faults(out, base, lora, depth="sample", sample_share=1.0)["m.weight"]
    seeds = [0, 1, 2, 3, 4, 5, 6, 7]
    hits = [
        faulty(lambda seed=seed: verify(out, base, lora, depth="sample", sample_share=0.5, seed=seed)) for seed in seeds
    ]
    assert True in hits
    assert False in hits
    assert hits == [
        faulty(lambda seed=seed: verify(out, base, lora, depth="sample", sample_share=0.5, seed=seed)) for seed in seeds
    ]


def faulty(call: Callable[[], Any]) -> bool:
    try:
        call()
    except VerifyError:
        return True
    return False


# -- the probe


@pytest.mark.parametrize("which", [("base", "merged"), ("packed_base", "merged_nf4")], ids=["plain", "packed"])
def test_a_probe_says_how_far_a_merged_linear_is_from_the_unmerged_one(
    which: tuple[str, str], adapter: Path, request: pytest.FixtureRequest
) -> None:
    base, merged = (request.getfixturevalue(name) for name in which)
    probed = verify(merged, base, adapter, depth="probe").probed
    assert probed is not None
    assert (probed.num_tensors, probed.by_blocks, probed.doubted) == (14, (), ())
    assert 1e-4 < probed.relative_error < 4e-3  # a bfloat16 has 8 bits
    assert 0.05 < probed.bound_used < 1
    assert probed.max_deviation < 0.01


def test_a_probe_takes_given_activations_by_module_or_tensor(
    merged: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 64, generator=generator) * 30
    path = tmp_path / "activations.safetensors"
    save_file({V.removesuffix(".weight"): x, Q: x.bfloat16()}, path)
    probed = verify(merged, base, adapter, depth="probe", activations=path).probed
    assert probed is not None
    assert probed.given == tuple(sorted([V, Q]))
    errors = {}
    for name, given in ((V, x), (Q, x.bfloat16())):
        unmerged = load_folder(base)[name].double() + oracles.deltas(adapter)[name][0]
        reference = given.double() @ unmerged.T
        error = given.double() @ load_folder(merged)[name].double().T - reference
        errors[name] = float(error.norm() / reference.norm())
    assert probed.relative_error >= max(errors.values()) * (1 - 1e-9)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.layers.0.self_attn.v_prj": torch.ones(2, 64)}, "is no tensor of the output"),
        ({V: torch.ones(2, 63)}, r"expected floats of shape \(n, 64\)"),
        ({V: torch.ones(2, 64, dtype=torch.int32)}, "expected floats"),
        ({V: torch.ones(0, 64)}, "0 vectors"),
        ({V: torch.full((1, 64), torch.inf)}, "not finite"),
        ({HEAD: torch.ones(2, 64)}, "is no merged linear"),
        ({V: torch.ones(1, 64), V.removesuffix(".weight"): torch.ones(1, 64)}, "twice"),
    ],
    ids=["name", "shape", "integers", "none", "infinite", "untouched", "twice"],
)
def test_activations_that_fit_nothing_are_refused_by_name(
    tensors: dict[str, Tensor], words: str, merged: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, adapter = request.getfixturevalue("base"), request.getfixturevalue("adapter")
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=words) as caught:
        verify(merged, base, adapter, depth="probe", activations=tmp_path / "x.safetensors")
    assert "x.safetensors" in caught.value.where


def test_tensors_that_are_no_products_are_compared_by_blocks_and_named(base: Path, tmp_path: Path) -> None:
    dora = save_adapter(tmp_path / "dora", use_dora=True, target_modules=["v_proj"])
    out = merge(base, dora, tmp_path / "out")
    probed = verify(out, base, dora, depth="probe").probed
    assert probed is not None
    assert set(probed.by_blocks) == {V, V1}
    rewrite(out, **{V: load_folder(base)[V]})
    assert faults(out, base, dora, depth="probe") == {V: "holds the base's values: not merged"}


def test_a_delta_that_rounding_swallows_is_doubted_and_found_right(base: Path, tmp_path: Path) -> None:
    faint = save_adapter(tmp_path / "faint", scale=0.002)
    out = merge(base, faint, tmp_path / "out")
    probed = verify(out, base, faint, depth="probe").probed
    assert probed is not None
    assert len(probed.doubted) == 14


# -- stacks of experts, transposed weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_stacks_of_experts_are_probed_and_a_wrong_expert_is_named(name: str, tmp_path: Path) -> None:
    base = bases.folder(tmp_path / "bases", name, "modules" if name == "mixtral" else "hub")
    tuned = adapters.train(bases.load(base), "Lora", experts(name, targets=()).fields)
    (lora,) = adapters.save(tuned, tmp_path / "lora")
    out = merge(base, lora, tmp_path / "out")
    probed = verify(out, base, lora, depth="probe").probed
    assert probed is not None
    held, before = load_folder(out), load_folder(base)
    stacks = [key for key in held if held[key].dim() == 3 and not torch.equal(held[key], before[key])]
    assert stacks
    assert not set(stacks) & set(probed.by_blocks)
    for key in stacks[:2]:
        wrong = held[key].clone()
        wrong[1] = 2 * before[key][1] - wrong[1]
        rewrite(out, **{key: wrong})
        rows = wrong.shape[1]
        found = faults(out, base, lora, depth="probe")[key]
        assert found.startswith(f"rows {rows} to {2 * rows - 1} of {3 * rows}: the delta was subtracted"), found
        rewrite(out, **{key: held[key]})


@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_is_stored_transposed_is_probed_as_the_layer_computes(tmp_path: Path) -> None:
    base = models.save("gpt2", tmp_path / "base")
    lora = save_adapter(
        tmp_path / "lora", model=models.build("gpt2"), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    out = merge(base, lora, tmp_path / "out")
    key = next(name for name in load_folder(base) if name.endswith("h.0.mlp.c_fc.weight"))
    before, after = load_folder(base)[key].double(), load_folder(out)[key].double()
    x = torch.randn(6, before.shape[0], generator=torch.Generator().manual_seed(1)) * 10
    save_file({key: x}, tmp_path / "x.safetensors")
    probed = verify(out, base, lora, depth="probe", activations=tmp_path / "x.safetensors").probed
    assert probed is not None
    assert (probed.given, probed.by_blocks, probed.doubted) == ((key,), (), ())
    pair = load_file(lora / "adapter_model.safetensors")
    a, b = (next(v for k, v in pair.items() if "h.0.mlp.c_fc" in k and part in k) for part in ("lora_A", "lora_B"))
    reference = x.double() @ (before + 1.5 * (b.double() @ a.double()).T)
    error = float((x.double() @ after - reference).norm() / reference.norm())
    assert error < 1e-4
    rewrite(out, **{key: (2 * before - after).float().to(load_folder(out)[key].dtype)})
    assert "subtracted" in faults(out, base, lora, depth="probe", activations=tmp_path / "x.safetensors")[key]


# -- what it takes


def test_depths_and_their_options_belong_together(merged: Path, base: Path, adapter: Path, tmp_path: Path) -> None:
    for options in ({"depth": "full"}, {"depth": "sample"}, {"depth": "deep"}):
        with pytest.raises(UsageError):
            distmerge.verify(merged, **options)  # type: ignore[arg-type]
    for options in ({"depth": "digests"}, {"depth": "sample", "sample_share": 1.5}, {"depth": "probe", "seed": -1}):
        with pytest.raises(UsageError):
            verify(merged, base, adapter, **options)
    with pytest.raises(UsageError, match="probed"):
        verify(merged, base, adapter, depth="full", activations=tmp_path)


def test_a_budget_that_is_too_small_is_refused_with_one_that_will_do(merged: Path, base: Path, adapter: Path) -> None:
    for depth in ("full", "probe"):
        with pytest.raises(InputError, match="too few") as caught:
            verify(merged, base, adapter, depth=depth, memory_budget=1000)
        enough = int(caught.value.hint.split()[-1].removesuffix("MiB")) << 20
        verify(merged, base, adapter, depth=depth, memory_budget=enough)
