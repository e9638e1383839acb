"""Packed outputs: the merged weights in bitsandbytes' 4 bits, to the byte, and loaded by transformers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import distmerge
from distmerge.checkpoint.header import read_header
from distmerge.numerics import nf4, packing4
from distmerge.numerics.dtypes import torch_dtype
from tests import oracles
from tests.conftest import digests
from tests.factories import edit_json, load_folder, merge, repack_base, save_adapter, save_base, write_adapter

MODES = ("plain", "fitted")
INNER = 168  # no multiple of 64: scales cross from one row to the next
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.factories import build_llama

    model = build_llama(torch.float32, intermediate_size=INNER)
    return save_adapter(tmp_path_factory.mktemp("adapter") / "tuned", r=5, alpha=3, model=model)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    plain = save_base(folder / "plain", intermediate_size=INNER)
    return {"plain": plain, "nf4": repack_base(plain, folder / "nf4", quant_type="nf4", compress_statistics=True)}


def parts_of(tensors: dict[str, Tensor], weight: str) -> dict[str, Tensor]:
    return {name.removeprefix(weight): value for name, value in tensors.items() if name.startswith(weight)}


def assert_packed_as_bitsandbytes(
    found: dict[str, Tensor], dense: Tensor, *, kind: str, blocksize: int, double: bool
) -> None:
    codes, state = bitsandbytes.functional.quantize_4bit(
        dense, blocksize=blocksize, compress_statistics=double, quant_type=kind
    )
    told = state.as_dict(packed=True)
    assert torch.equal(found.pop(""), codes)
    key = f".quant_state.bitsandbytes__{kind}"
    mine, theirs = found.pop(key), told.pop(key.removeprefix("."))
    assert json.loads(bytes(mine)) == json.loads(bytes(theirs))
    assert found.keys() == {f".{name}" for name in told}
    assert all(torch.equal(found[f".{name}"], value) for name, value in told.items())


@pytest.mark.parametrize("source", ["plain", "nf4"])
@pytest.mark.parametrize(
    ("kind", "blocksize", "double", "dtype"),
    [("nf4", 64, True, "bfloat16"), ("nf4", 64, False, "float32"), ("fp4", 128, True, "float16")],
)
def test_plain_packing_is_bitsandbytes_packing_of_the_merged_weights(
    bases: dict[str, Path],
    tuned: Path,
    tmp_path: Path,
    *,
    source: str,
    kind: str,
    blocksize: int,
    double: bool,
    dtype: str,
) -> None:
    sizes = {"quant_blocksize": blocksize, "quant_double": double}
    dense = load_folder(merge(bases[source], tuned, tmp_path / "dense", dtype=dtype))
    packed = load_folder(merge(bases[source], tuned, tmp_path / "packed", dtype=dtype, quantize=kind, **sizes))
    linears = [name for name, value in dense.items() if "proj" in name and value.dim() == 2]
    assert linears
    for name, value in dense.items():
        if name in linears:
            assert value.dtype == DTYPES[dtype]
            assert_packed_as_bitsandbytes(parts_of(packed, name), value, kind=kind, blocksize=blocksize, double=double)
        else:
            assert torch.equal(packed[name], value)


@pytest.mark.parametrize("source", ["plain", "nf4"])
def test_the_card_says_how_the_output_is_packed_and_nothing_of_the_base_is_said_to_be_kept(
    bases: dict[str, Path], tuned: Path, tmp_path: Path, source: str
) -> None:
    for mode, double, words in [("plain", True, "bitsandbytes' own scales"), ("fitted", False, "scales fitted")]:
        config = {"quantize": "fp4", "quantize_mode": mode, "quant_blocksize": 128, "quant_double": double}
        card = (merge(bases[source], tuned, tmp_path / mode, **config) / "README.md").read_text()
        assert f"Then 14 linear weights were packed in FP4 with {words}" in card
        assert f"(blocks of 128{', double quantization' * double})" in card
        assert "still packed" not in card
        assert ("The base was packed in nf4" in card) is (source == "nf4")
    card = (merge(bases[source], tuned, tmp_path / "dense") / "README.md").read_text()
    assert "each element was rounded once. " in card
    assert "were packed" not in card


def test_transformers_and_bitsandbytes_load_a_packed_output(
    bases: dict[str, Path], tuned: Path, tmp_path: Path
) -> None:
    import transformers

    dense = merge(bases["nf4"], tuned, tmp_path / "dense")
    packed = merge(bases["nf4"], tuned, tmp_path / "packed", quantize="nf4")
    tokens = torch.arange(1, 9)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(packed, device_map={"": "cpu"}, dtype=torch.bfloat16)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    before = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)(tokens).logits.float()
    after = model(tokens).logits.float()
    assert torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_fitted_scales_lose_less_on_every_tensor(
    bases: dict[str, Path], tuned: Path, tmp_path: Path, *, kind: str, double: bool
) -> None:
    dense = load_folder(merge(bases["plain"], tuned, tmp_path / "dense"))
    errors = {}
    for mode in ("plain", "fitted"):
        options = {"quantize": kind, "quantize_mode": mode, "quant_double": double}
        packed = oracles.dense(load_folder(merge(bases["plain"], tuned, tmp_path / mode, **options)))
        errors[mode] = {name: (packed[name].double() - value.double()).norm() for name, value in dense.items()}
    linears = [name for name, error in errors["plain"].items() if error > 0]
    assert len(linears) == 14
    # The codes of FP4 are symmetric: often nothing is better there than plain scales.
    most = 1.0 if kind == "nf4" else 1.001
    assert all(errors["fitted"][name] < most * errors["plain"][name] for name in linears)


@pytest.fixture(scope="module")
def packed_outputs(bases: dict[str, Path], tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    return {mode: merge(bases["plain"], tuned, folder / mode, quantize="nf4", quantize_mode=mode) for mode in MODES}


@pytest.mark.parametrize("depth", ["full", "sample", "probe"])
@pytest.mark.parametrize("mode", MODES)
def test_verify_accepts_a_packed_output_at_every_depth(
    packed_outputs: dict[str, Path], bases: dict[str, Path], tuned: Path, *, mode: str, depth: str
) -> None:
    adapters = (distmerge.AdapterChoice(folder=tuned),)
    found = distmerge.verify(packed_outputs[mode], base=bases["plain"], adapters=adapters, depth=depth)
    assert found.recomputed is not None
    assert found.recomputed.num_packed == found.recomputed.num_tensors == 14


LINEAR = "model.layers.1.mlp.up_proj.weight"


def flip_code(tensors: dict[str, Tensor]) -> None:
    tensors[LINEAR][100] ^= 0x80


def halve_a_scale(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LINEAR}.absmax"][3] = tensors[f"{LINEAR}.absmax"].int().min().byte()


def turn_the_table(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LINEAR}.quant_map"] = tensors[f"{LINEAR}.quant_map"].flip(0)


def swap_tensors(tensors: dict[str, Tensor]) -> None:
    other = LINEAR.replace("up_proj", "gate_proj")
    for tail in ("", ".absmax", ".nested_absmax"):
        tensors[LINEAR + tail], tensors[other + tail] = tensors[other + tail], tensors[LINEAR + tail]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (flip_code, f"{LINEAR}: 1 element is not base . delta: .* should be"),
        (halve_a_scale, f"{LINEAR}: .*(scales are not|elements? (is|are) not|delta)"),
        (turn_the_table, f"{LINEAR}: quant_map is not that of its codes"),
        (swap_tensors, f"{LINEAR}: something else than the delta was added"),
    ],
)
def test_a_damaged_packed_output_is_named(
    packed_outputs: dict[str, Path], bases: dict[str, Path], tuned: Path, tmp_path: Path, *, fault: Any, said: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(packed_outputs["plain"], folder)
    rewrite(folder, fault)
    with pytest.raises(distmerge.errors.VerifyError, match=said):
        distmerge.verify(folder, base=bases["plain"], adapters=(distmerge.AdapterChoice(folder=tuned),))


@pytest.mark.parametrize("factor", [0.5, 1.3, 3.0])
def test_scales_that_are_not_fitted_are_named(
    packed_outputs: dict[str, Path], bases: dict[str, Path], tuned: Path, tmp_path: Path, *, factor: float
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(packed_outputs["fitted"], folder)
    dense = load_folder(merge(bases["plain"], tuned, tmp_path / "dense"))[LINEAR]

    def rescale(tensors: dict[str, Tensor]) -> None:
        nested = packing4.nest(packing4.block_absmax(dense.flatten(), 64) * factor)
        table = nf4.NF4
        codes = packing4.codes_for(dense.flatten(), packing4.unnest(nested), table, first=0, blocksize=64)
        tensors[LINEAR], tensors[f"{LINEAR}.absmax"] = packing4.pair(codes, table)[:, None], nested.codes
        tensors[f"{LINEAR}.nested_absmax"] = nested.absmax
        key = f"{LINEAR}.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[key])) | {"nested_offset": nested.offset}
        tensors[key] = torch.frombuffer(
            bytearray(json.dumps(state).encode().ljust(len(tensors[key]))), dtype=torch.uint8
        )

    rewrite(folder, rescale)
    with pytest.raises(distmerge.errors.VerifyError, match=f"{LINEAR}: its scales are not fitted"):
        distmerge.verify(folder, base=bases["plain"], adapters=(distmerge.AdapterChoice(folder=tuned),))


@pytest.mark.parametrize(("weight", "said"), [(-1.0, "the delta was subtracted"), (2.0, "the delta was added twice")])
@pytest.mark.parametrize("mode", MODES)
def test_a_packed_output_of_another_delta_is_named(
    bases: dict[str, Path], tuned: Path, tmp_path: Path, *, mode: str, weight: float, said: str
) -> None:
    wrong = merge(bases["plain"], [(tuned, weight)], tmp_path / "wrong", quantize="nf4", quantize_mode=mode)
    right = merge(bases["plain"], tuned, tmp_path / "right", quantize="nf4", quantize_mode=mode)
    shutil.copy(wrong / "model.safetensors", right / "model.safetensors")
    rewrite(right, lambda tensors: None)
    with pytest.raises(distmerge.errors.VerifyError, match=said):
        distmerge.verify(right, base=bases["plain"], adapters=(distmerge.AdapterChoice(folder=tuned),))


def rewrite(folder: Path, change: Any) -> None:
    """Changes tensors of a finished output in place, and its receipt's digests with them."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    specs = {spec.name: spec for spec in read_header(path).tensors}
    views = {name: data[spec.begin : spec.begin + spec.nbytes] for name, spec in specs.items()}
    tensors = {
        name: torch.frombuffer(view, dtype=torch_dtype(specs[name].dtype)).reshape(specs[name].shape)
        for name, view in views.items()
    }
    change(tensors)
    for name, spec in specs.items():
        data[spec.begin : spec.begin + spec.nbytes] = bytes(
            tensors[name].contiguous().view(-1).view(torch.uint8).numpy()
        )
    path.write_bytes(data)
    receipt = json.loads((folder / "merge_receipt.json").read_text())
    receipt["files"]["model.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "merge_receipt.json").write_text(json.dumps(receipt))


def test_the_receipt_tells_what_packing_cost(
    packed_outputs: dict[str, Path], bases: dict[str, Path], tuned: Path, tmp_path: Path
) -> None:
    dense = load_folder(merge(bases["plain"], tuned, tmp_path / "dense"))
    for mode in MODES:
        loaded = oracles.dense(load_folder(packed_outputs[mode]))
        tensors = json.loads((packed_outputs[mode] / "merge_receipt.json").read_text())["tensors"]
        for name, entry in tensors.items():
            error = float((loaded[name].double() - dense[name].double()).norm())
            assert entry["survival"]["pack_error"] == pytest.approx(error, rel=1e-4)
            assert (entry["survival"]["plain_pack_error"] > error * 1.001) == (mode == "fitted")


@pytest.mark.parametrize("mode", MODES)
def test_a_packed_output_has_the_same_bytes_for_every_budget(
    bases: dict[str, Path], tuned: Path, tmp_path: Path, *, mode: str
) -> None:
    found = [
        digests(
            merge(
                bases["plain"],
                tuned,
                tmp_path / str(budget),
                quantize="nf4",
                quantize_mode=mode,
                simulate_quant="fp4",
                memory_budget=budget,
            )
        )
        for budget in (96 << 20, 1 << 30)
    ]
    assert found[0] == found[1]


def test_a_packed_output_of_two_adapters_that_are_combined_is_packed_from_the_same_values(
    bases: dict[str, Path], tuned: Path, tmp_path: Path
) -> None:
    from tests.factories import build_llama

    model = build_llama(torch.float32, intermediate_size=INNER)
    other = save_adapter(tmp_path / "other", r=3, seed=8, target_modules=["q_proj", "down_proj"], model=model)
    options = {"combine": "dare_ties", "density": 0.5, "seed": 3}
    pairs = [(tuned, 1.0), (other, 0.5)]
    dense = load_folder(merge(bases["plain"], pairs, tmp_path / "dense", **options))
    packed = load_folder(merge(bases["plain"], pairs, tmp_path / "packed", quantize="nf4", **options))
    name = "model.layers.0.mlp.down_proj.weight"
    assert_packed_as_bitsandbytes(parts_of(packed, name), dense[name], kind="nf4", blocksize=64, double=True)


def refused(base: Path, tuned: Path, tmp_path: Path, **options: Any) -> str:
    with pytest.raises(distmerge.errors.DistmergeError) as caught:
        merge(base, tuned, tmp_path / "out", **options)
    assert not list(tmp_path.glob("out*"))
    return str(caught.value)


def test_what_cannot_be_packed_is_refused_by_name(bases: dict[str, Path], tuned: Path, tmp_path: Path) -> None:
    base = bases["plain"]
    assert "keep-quantized and quantize exclude each other" in refused(
        base, tuned, tmp_path, quantize="nf4", keep_quantized=True
    )
    assert "nothing is packed" in refused(base, tuned, tmp_path, quantize_mode="fitted")
    assert "no linear layer" in refused(base, tuned, tmp_path, quantize="nf4", quant_skip=("model", "lm_head"))
    unknown = shutil.copytree(base, tmp_path / "unknown")
    edit_json(unknown / "config.json", architectures=["NoSuchModel"], model_type="none")
    assert "only its class tells" in refused(unknown, tuned, tmp_path, quantize="nf4")


def test_conv1d_weights_are_not_packed(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    pair = (torch.randn(2, 64), torch.randn(192, 2))
    lora = write_adapter(tmp_path / "lora", {"transformer.h.0.attn.c_attn": pair}, fan_in_fan_out=True)
    assert "Conv1D" in refused(tmp_path / "gpt2", lora, tmp_path, quantize="nf4")


def assert_loaders_pack_what_is_packed(folder: Path) -> None:
    import transformers

    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(folder, device_map={"": "cpu"}, dtype=torch.bfloat16)
    packed = {name.partition(".weight.quant_state.")[0] for name in load_folder(folder) if ".quant_state." in name}
    loaded = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert packed
    assert {name.removeprefix("model.") for name in loaded} == {name.removeprefix("model.") for name in packed}
    assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()


@pytest.mark.parametrize("skip", [(), ("v_proj",), ("lm_head",)], ids=str)
@pytest.mark.parametrize("source", ["plain", "nf4", "tied"])
@pytest.mark.parametrize("change", ["layers", "head", "nothing"])
def test_loaders_pack_exactly_what_is_packed(
    bases: dict[str, Path], tmp_path: Path, *, source: str, change: str, skip: tuple[str, ...]
) -> None:
    from tests.factories import build_llama

    if source == "tied":
        bases = {**bases, "tied": save_base(tmp_path / "tied", intermediate_size=INNER, tie_word_embeddings=True)}
    model = build_llama(torch.float32, intermediate_size=INNER, tie_word_embeddings=source == "tied")
    fields: dict[str, Any] = {
        "layers": {"layer_replication": [[0, 2], [1, 2]]},
        "head": {"modules_to_save": ["lm_head"]},
        "nothing": {},
    }[change]
    lora = save_adapter(tmp_path / "lora", r=3, model=model, **fields)
    out = merge(bases[source], lora, tmp_path / "out", quantize="nf4", quant_skip=skip)
    assert_loaders_pack_what_is_packed(out)


def test_a_new_head_is_not_taken_for_a_packed_one(bases: dict[str, Path], tmp_path: Path) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(bases["plain"], num_labels=3)
    lora = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    lora.save_pretrained(tmp_path / "lora")
    for source in ("plain", "nf4"):
        for skip in ((), ("v_proj",)):
            out = tmp_path / f"{source}{len(skip)}"
            merge(bases[source], tmp_path / "lora", out, quantize="nf4", quant_skip=skip)
            assert_loaders_pack_what_is_packed(out)


@pytest.mark.parametrize(
    "chosen",
    [{"quantize": "nf4"}, {"quantize": "nf4", "quantize_mode": "fitted"}, {"simulate_quant": "nf4"}],
    ids=lambda chosen: "-".join(chosen.values()),
)
def test_errors_that_float32_cannot_square_are_those_of_float64(
    bases: dict[str, Path], tuned: Path, tmp_path: Path, chosen: dict[str, Any]
) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    base = Path(shutil.copytree(bases["plain"], tmp_path / "base"))
    held = {key: value.float() for key, value in load_folder(base).items()}
    held[name][3:9] *= 1e24
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    out = merge(base, tuned, tmp_path / "out", quant_double=False, **chosen)
    found = json.loads((out / "merge_receipt.json").read_text())["tensors"][name]["survival"]
    if "quantize" in chosen:
        dense = load_folder(merge(base, tuned, tmp_path / "dense"))[name]
        packed = oracles.dense(load_folder(out))[name]
        wanted, error = float((packed.double() - dense.double()).norm()), found["pack_error"]
    else:
        codes, state = bitsandbytes.functional.quantize_4bit(held[name], quant_type="nf4", compress_statistics=False)
        read = bitsandbytes.functional.dequantize_4bit(codes, state)
        wanted, error = float((read.double() - held[name].double()).norm()), found["quant_error"]
    assert error == pytest.approx(wanted, rel=1e-4)
    assert error > 2e19  # whose square is more than float32 holds
