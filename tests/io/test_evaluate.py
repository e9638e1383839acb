"""`evaluate`: a merged model against the unmerged one, loaded by transformers and PEFT, on a text."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import distmerge
from distmerge import AdapterChoice
from distmerge.errors import InputError, UsageError, VerifyError
from distmerge.evaluation.run import Evaluation
from tests import formats
from tests.factories import (
    LINEARS,
    WORDS,
    add_tokenizer,
    build_llama,
    edit_json,
    load_folder,
    merge,
    repack_base,
    save_adapter,
    save_base,
)

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = " ".join(WORDS[(7 * n * n + n) % 90] for n in range(400))


def sharpen(folder: Path) -> Path:
    """Makes predictions of a random model decided: its head ten times as large."""
    for path in folder.glob("*.safetensors"):
        held = load_file(path)
        if "lm_head.weight" in held:
            save_file({**held, "lm_head.weight": held["lm_head.weight"] * 10}, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama with a tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("spoken") / "llama"
    return add_tokenizer(sharpen(save_base(folder, torch.float32)))


@pytest.fixture(scope="module")
def merged_spoken(spoken: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(spoken, adapter, tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def evaluate(out: Path, base: Path, *folders: Path | tuple[Path, float], text: Path, **options: Any) -> Evaluation:
    pairs = [(folder, 1.0) if isinstance(folder, Path) else folder for folder in folders]
    choices = tuple(AdapterChoice(folder=folder, weight=weight) for folder, weight in pairs)
    return distmerge.evaluate(out, base=base, adapters=choices, text=text, **{"context": 32, **options})


def spoil(out: Path, folder: Path, base: Path) -> Path:
    """A copy of `out` in which every delta is negated, with a tokenizer."""
    spoiled, before = Path(shutil.copytree(out, folder)), load_folder(base)
    for path in spoiled.glob("*.safetensors"):
        held = load_file(path)
        save_file({name: 2 * before[name] - tensor for name, tensor in held.items()}, path, {"format": "pt"})
    return spoiled


def test_a_merged_model_equals_the_unmerged_one(merged_spoken: Path, spoken: Path, adapter: Path, text: Path) -> None:
    found = evaluate(merged_spoken, spoken, adapter, text=text, max_kl=1e-6)
    assert found.is_equal
    assert found.num_tokens == 400 - found.num_windows == 400 - 13
    assert 0 <= found.mean_kl < 1e-9
    assert found.mean_kl <= found.max_kl < 1e-7
    assert found.top1_agreement == 1
    assert found.merged_perplexity == pytest.approx(found.unmerged_perplexity, rel=1e-5)
    assert not found.was_offloaded


def test_the_figures_are_those_of_the_models(merged_spoken: Path, spoken: Path, adapter: Path, text: Path) -> None:
    import peft
    import transformers

    wrong = text.parent / "wrong"
    spoil(merged_spoken, wrong, spoken)
    found = evaluate(wrong, spoken, adapter, text=text)
    tokens = transformers.AutoTokenizer.from_pretrained(spoken)(TEXT)["input_ids"]
    model = transformers.AutoModelForCausalLM.from_pretrained(spoken, dtype=torch.float64)
    unmerged = peft.PeftModel.from_pretrained(model, adapter).double().eval()
    other = transformers.AutoModelForCausalLM.from_pretrained(wrong, dtype=torch.float64).eval()
    kl, nll, agreeing, count = 0.0, [0.0, 0.0], 0, 0
    with torch.no_grad():
        for begin in range(0, len(tokens), 32):
            window = torch.tensor([tokens[begin : begin + 32]])
            p, q = (m(window).logits[0, :-1].double().log_softmax(-1) for m in (unmerged, other))
            kl += float((p.exp() * (p - q)).sum())
            at = window[0, 1:, None]
            nll = [total - float(one.gather(1, at).sum()) for total, one in zip(nll, (p, q), strict=True)]
            agreeing += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(at)
    assert found.num_tokens == count
    assert found.mean_kl == pytest.approx(kl / count, rel=1e-3)
    assert found.unmerged_perplexity == pytest.approx(math.exp(nll[0] / count), rel=1e-4)
    assert found.merged_perplexity == pytest.approx(math.exp(nll[1] / count), rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreeing / count, abs=0.005)


def test_a_negated_delta_fails_the_threshold(merged_spoken: Path, spoken: Path, adapter: Path, text: Path) -> None:
    wrong = spoil(merged_spoken, text.parent / "wrong", spoken)
    found = evaluate(wrong, spoken, adapter, text=text)
    assert found.mean_kl > 0.01
    assert not found.is_equal
    with pytest.raises(VerifyError, match=r"merged differs from unmerged: mean KL") as caught:
        evaluate(wrong, spoken, adapter, text=text, max_kl=found.mean_kl / 2)
    assert caught.value.exit_code == 4
    evaluate(wrong, spoken, adapter, text=text, max_kl=found.mean_kl * 2)


@pytest.mark.parametrize("budget", [300_000, 90_000], ids=["a part", "everything"])
def test_within_a_small_budget_the_weights_stay_on_the_disk_and_the_figures_are_the_same(
    budget: int, merged_spoken: Path, spoken: Path, adapter: Path, text: Path
) -> None:
    wrong = spoil(merged_spoken, text.parent / "wrong", spoken)
    whole = evaluate(wrong, spoken, adapter, text=text)
    found = evaluate(wrong, spoken, adapter, text=text, memory_budget=budget)
    assert found.was_offloaded
    assert found.mean_kl == pytest.approx(whole.mean_kl, rel=1e-4)
    assert found.unmerged_perplexity == pytest.approx(whole.unmerged_perplexity, rel=1e-5)


def test_trained_modules_are_those_of_the_adapter_on_the_disk_too(spoken: Path, text: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(spoken, dtype=torch.float32)
    lora = save_adapter(tmp_path / "lora", model=model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    path = lora / "adapter_model.safetensors"
    held = load_file(path)
    save_file({key: -2 * tensor if "lm_head" in key else tensor for key, tensor in held.items()}, path)
    out = merge(spoken, lora, tmp_path / "out")
    for budget in (8 << 30, 90_000):
        found = evaluate(out, spoken, lora, text=text, memory_budget=budget)
        assert found.mean_kl < 1e-9
        assert found.was_offloaded == (budget == 90_000)


@pytest.mark.parametrize("rows", [64, 80], ids=["whole blocks", "where bitsandbytes' kernel is wrong"])
def test_the_reference_of_a_packed_base_is_what_training_saw(rows: int, text: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": rows, "intermediate_size": 3 * rows, "head_dim": 16}
    dense = sharpen(save_base(tmp_path / "dense", torch.bfloat16, **sizes))
    base = add_tokenizer(repack_base(dense, tmp_path / "packed", blocksize=64, quant_type="nf4"))
    lora = save_adapter(tmp_path / "lora", model=build_llama(torch.float32, **sizes))
    out = merge(base, lora, tmp_path / "out", dtype="float32")
    found = evaluate(out, base, lora, text=text)
    assert found.mean_kl < 1e-9


def test_the_reference_of_a_simulated_base_is_simulated(
    spoken: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    out = merge(spoken, adapter, tmp_path / "out", simulate_quant="nf4")
    found = evaluate(out, spoken, adapter, text=text)
    assert found.mean_kl < 1e-4
    plain = evaluate(merge(spoken, adapter, tmp_path / "plain"), spoken, adapter, text=text)
    assert abs(found.unmerged_perplexity / plain.unmerged_perplexity - 1) > 1e-3


def test_a_packed_output_is_evaluated_as_it_is_read_back(
    spoken: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    found = evaluate(merge(spoken, adapter, tmp_path / "out", quantize="nf4"), spoken, adapter, text=text)
    assert found.mean_kl > 1e-4
    assert found.merged_perplexity < 1.5 * found.unmerged_perplexity


def test_adapters_are_weighed_as_in_the_merge(spoken: Path, adapter: Path, text: Path, tmp_path: Path) -> None:
    other = save_adapter(tmp_path / "other", r=3, seed=9, target_modules=["q_proj", "up_proj"])
    pairs = [(adapter, 0.6), (other, -0.5)]
    out = merge(spoken, pairs, tmp_path / "out")
    for budget in (8 << 30, 90_000):
        assert evaluate(out, spoken, *pairs, text=text, memory_budget=budget).mean_kl < 1e-9
    with pytest.raises(InputError, match="weights are not those of the receipt"):
        evaluate(out, spoken, adapter, other, text=text)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_variants_of_lora_are_those_of_peft(fields: dict[str, Any], spoken: Path, text: Path, tmp_path: Path) -> None:
    lora = save_adapter(tmp_path / "lora", target_modules=list(LINEARS), **fields)
    out = merge(spoken, lora, tmp_path / "out")
    assert evaluate(out, spoken, lora, text=text).mean_kl < 1e-8
    if "use_dora" in fields:
        with pytest.raises(InputError, match="weights that it changes in memory"):
            evaluate(out, spoken, lora, text=text, memory_budget=90_000)


def test_an_initialisation_that_changed_the_base_is_taken_off_and_not_done_again(
    spoken: Path, text: Path, tmp_path: Path
) -> None:
    lora, initial = (save_adapter(tmp_path / name, seed=seed) for name, seed in (("lora", 4), ("initial", 5)))
    for folder in (lora, initial):
        edit_json(folder / "adapter_config.json", init_lora_weights="pissa")
    choice = AdapterChoice(folder=lora, initial=initial)
    out = tmp_path / "out"
    distmerge.merge(distmerge.MergeConfig(base=spoken, adapters=(choice,), output=out, nproc=1, device="cpu"))
    found = distmerge.evaluate(out, base=spoken, adapters=(choice,), text=text, context=32)
    assert found.mean_kl < 1e-8


def test_layers_used_twice_are_those_of_the_merge(spoken: Path, text: Path, tmp_path: Path) -> None:
    pairs = []
    for seed, weight in ((4, 1.0), (5, -0.5)):
        lora = save_adapter(tmp_path / f"lora-{seed}", seed=seed, layer_replication=[[0, 2], [1, 2]])
        pairs.append((lora, weight))
    for number, chosen in enumerate((pairs[:1], pairs)):
        out = merge(spoken, chosen, tmp_path / f"out-{number}")
        for budget in (8 << 30, 250_000, 90_000):
            found = evaluate(out, spoken, *chosen, text=text, memory_budget=budget)
            assert found.mean_kl < 1e-9
            assert found.was_offloaded == (budget < 1 << 30)


def test_an_adapter_that_peft_makes_no_place_for_is_refused(
    merged_spoken: Path, spoken: Path, adapter: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    def fail(*args: Any, **options: Any) -> None:
        raise TypeError("an unexpected keyword")

    monkeypatch.setattr(peft, "get_peft_model", fail)
    with pytest.raises(InputError, match=r"holds no adapter that can be loaded \(TypeError: an unexpected keyword"):
        evaluate(merged_spoken, spoken, adapter, text=text)


def test_linears_without_elements_are_no_hindrance_where_the_base_is_simulated(text: Path, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 0}
    base = add_tokenizer(save_base(tmp_path / "base", torch.float32, **sizes))
    model = build_llama(torch.float32, **sizes)
    lora = save_adapter(tmp_path / "lora", model=model, target_modules=["q_proj"])
    out = merge(base, lora, tmp_path / "out", simulate_quant="nf4")
    assert evaluate(out, base, lora, text=text).mean_kl < 1e-4


def test_a_section_of_the_former_name_is_true_of_no_dense_copy(
    spoken: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        return formats.fp8(name, weight, (1, weight.shape[1]), tail="_scale")

    base = formats.llama_in(tmp_path / "base", spoken, pack, formats.compressed(strategy="channel"))
    config = formats.read_config(base)
    config["compression_config"] = config.pop("quantization_config")
    (base / "config.json").write_text(json.dumps(config))
    out = merge(add_tokenizer(base), adapter, tmp_path / "out", dtype="float32")
    assert evaluate(out, base, adapter, text=text).mean_kl < 1e-9


# -- texts


def test_a_text_shorter_than_the_window_is_one_window(
    merged_spoken: Path, spoken: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    found = evaluate(merged_spoken, spoken, adapter, text=tmp_path / "short.txt", context=512)
    assert (found.num_tokens, found.num_windows) == (2, 1)


def test_documents_of_jsonl_are_windows_of_their_own_and_tokens_are_bounded(
    merged_spoken: Path, spoken: Path, adapter: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": " ".join(WORDS[:count]), "more": 1}) for count in (5, 1, 40)]
    path.write_text("\n".join([*lines[:2], "", lines[2]]) + "\n")
    found = evaluate(merged_spoken, spoken, adapter, text=path)
    assert (found.num_tokens, found.num_windows) == (4 + 31 + 7, 3)
    found = evaluate(merged_spoken, spoken, adapter, text=path, max_tokens=6)
    assert (found.num_tokens, found.num_windows) == (6, 2)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t ", "holds no text"),
        ("one.txt", b"w1", "fewer than 2 tokens"),
        ("binary.txt", b"\xff\xfe\x00", "is no UTF-8"),
        ("empty.jsonl", b"\n\n", "holds no text"),
        ("bad.jsonl", b'{"text": "w1 w2"}\n{"text": ', "line 2: is no JSON"),
        ("other.jsonl", b'{"content": "w1 w2"}', "line 1: has no field `text`"),
        ("number.jsonl", b'{"text": 5}', "line 1: has no field `text`"),
    ],
)
def test_a_text_that_gives_nothing_is_refused_by_name(
    name: str, content: bytes, words: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folders = [request.getfixturevalue(which) for which in ("merged_spoken", "spoken", "adapter")]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        evaluate(*folders, text=tmp_path / name)
    assert name in caught.value.where


# -- what it takes


def test_what_has_no_unmerged_model_or_no_tokenizer_is_refused(
    base: Path, spoken: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    out = merge(spoken, adapter, tmp_path / "alpha", lora_alpha=3.0)
    with pytest.raises(InputError, match="was merged with --lora-alpha") as caught:
        evaluate(out, spoken, adapter, text=text)
    assert "--depth probe" in caught.value.hint
    out = merge(spoken, adapter, tmp_path / "combined", combine="ties", density=0.5)
    with pytest.raises(InputError, match="was merged with --combine") as caught:
        evaluate(out, spoken, adapter, text=text)
    assert "--depth full" in caught.value.hint  # a probe leaves out all that was combined
    out = merge(base, adapter, tmp_path / "mute")
    with pytest.raises(InputError, match="holds no tokenizer"):
        evaluate(out, base, adapter, text=text)
    with pytest.raises(InputError, match=r"holds no merge_receipt\.json"):
        evaluate(spoken, spoken, adapter, text=text)
    for options in ({"context": 1}, {"max_tokens": 0}, {"dtype": "float16"}, {"max_kl": -1.0}, {"memory_budget": 0}):
        with pytest.raises(UsageError):
            evaluate(out, spoken, adapter, text=text, **options)


def test_a_base_that_cannot_be_dequantized_is_refused_by_name(spoken: Path, text: Path, tmp_path: Path) -> None:
    def pack(name: str, weight: Tensor) -> dict[str, Tensor]:
        if ".mlp." not in name:
            return {name: weight}
        (rows, cols), module = weight.shape, name.removesuffix(".weight")
        packed = {"qweight": torch.zeros(cols // 8, rows), "qzeros": torch.zeros(1, rows // 8)}
        parts = {tail: value.int() for tail, value in packed.items()} | {"scales": torch.ones(1, rows).half()}
        return {f"{module}.{tail}": value for tail, value in parts.items()}

    base = add_tokenizer(formats.llama_in(tmp_path / "gptq", spoken, pack, {"quant_method": "gptq", "bits": 4}))
    lora = save_adapter(tmp_path / "lora", target_modules=["q_proj"])
    out = merge(base, lora, tmp_path / "out", keep_quantized=True)
    with pytest.raises(InputError, match="is packed by 'gptq', which cannot be dequantized") as caught:
        evaluate(out, base, lora, text=text)
    assert "mlp.down_proj.weight" in caught.value.where
    assert "verify" in caught.value.hint


def test_temporary_files_go_when_it_fails(
    merged_spoken: Path, spoken: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    evaluate(merged_spoken, spoken, adapter, text=text, scratch=scratch)
    assert list(scratch.iterdir()) == []
    broken = Path(shutil.copytree(spoken, tmp_path / "broken"))
    edit_json(broken / "config.json", num_attention_heads=5)
    with pytest.raises(InputError, match="holds no model"):
        evaluate(merged_spoken, broken, adapter, text=text, scratch=scratch)
    assert list(scratch.iterdir()) == []


def test_code_that_comes_with_a_model_is_not_run(
    merged_spoken: Path, spoken: Path, adapter: Path, text: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(merged_spoken, tmp_path / "out"))
    (out / "modeling_custom.py").write_text("raise SystemExit('never run')\n")
    auto_map = {"AutoModelForCausalLM": "modeling_custom.Custom", "AutoConfig": "modeling_custom.CustomConfig"}
    edit_json(out / "config.json", auto_map=auto_map, model_type="custom")
    with pytest.raises(InputError, match=r"holds no (model|tokenizer)") as caught:
        evaluate(out, spoken, adapter, text=text)
    assert "never run" not in caught.value.what
