"""What a QLoRA fine-tune is worth after each way of merging it, on a real model: the table of docs/numerics.md.

SmolLM2-135M-Instruct, a LoRA that was trained on its NF4 form, and held-out text. The unmerged adapter is the judge:
the same tokens are predicted by it and by each merge, and besides perplexity the table has the mean KL divergence of
the merge's predictions from the unmerged model's. The adapter is scaled down as well: a small tune is lost first.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests import oracles
from tests.factories import load_folder, merge
from tests.real import smollm2

SCALES = (1.0, 0.3, 0.1)
_BATCH = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model: how well it predicts, how far from the unmerged one, how much of its deltas is in the weights."""

    name: str
    perplexity: float
    kl: float
    agreement: float
    cosine: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, default=smollm2.ADAPTER, help="a LoRA trained on the NF4 form")
    parser.add_argument("--texts", type=int, default=24, help="held-out texts of 256 tokens each, 24 at most")
    args = parser.parse_args()
    tokens = load_file(smollm2.DATA / "heldout_tokens.safetensors")["input_ids"][: args.texts].long()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense = smollm2.save_dense(folder / "SmolLM2-135M-Instruct")
        smollm2.packed_model(dense).save_pretrained(folder / "SmolLM2-135M-Instruct-nf4")
        for weight in SCALES:
            print(f"\nadapter x {weight:g}\n")
            print("| weights | perplexity | KL | top-1 | cosine |\n| --- | --- | --- | --- | --- |")
            for row in _rows(folder, args.adapter, weight, tokens):
                cosine = "" if row.cosine is None else f"{row.cosine:.3f}"
                print(
                    f"| {row.name} | {row.perplexity:.4f} | {row.kl:.2e} | {row.agreement:.2%} | {cosine} |", flush=True
                )


def _rows(folder: Path, adapter: Path, weight: float, tokens: Tensor) -> Iterator[Row]:
    dense, packed = folder / "SmolLM2-135M-Instruct", folder / "SmolLM2-135M-Instruct-nf4"
    trained = oracles.dense(load_folder(packed))
    unmerged = _unmerged(dense, trained, adapter, weight)
    expected = list(_predictions(unmerged, tokens))
    yield _row("unmerged: adapter on the NF4 base", unmerged, expected, tokens)
    yield _row("NF4 base without the adapter", smollm2.model_of(dense, trained), expected, tokens)
    ways: list[tuple[str, Path, dict[str, Any]]] = [
        ("merged into the dequantized NF4 base, bfloat16", packed, {}),
        ("merged into the original bfloat16 base", dense, {}),
        ("the same with --simulate-quant nf4", dense, {"simulate_quant": "nf4"}),
        ("merged, packed again in NF4, plain", packed, {"quantize": "nf4"}),
        ("merged, packed again in NF4, fitted", packed, {"quantize": "nf4", "quantize_mode": "fitted"}),
        ("merged into the original, packed in NF4, plain", dense, {"quantize": "nf4"}),
        ("merged into the original, packed in NF4, fitted", dense, {"quantize": "nf4", "quantize_mode": "fitted"}),
    ]
    for number, (name, base, options) in enumerate(ways):
        output = merge(base, [(adapter, weight)], folder / f"{weight:g}-{number}", **options)
        weights = oracles.dense(load_folder(output))
        yield _row(name, smollm2.model_of(dense, weights), expected, tokens, cosine=_cosine(output))
        for path in output.glob("*.safetensors"):
            path.unlink()


def _unmerged(dense: Path, weights: dict[str, Tensor], adapter: Path, weight: float) -> Any:
    import peft

    model = peft.PeftModel.from_pretrained(smollm2.model_of(dense, weights), adapter)
    for module in model.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict):
            scaling.update({name: value * weight for name, value in scaling.items()})
    return model.eval()


@torch.inference_mode()
def _predictions(model: Any, tokens: Tensor) -> Iterator[Tensor]:
    """The logarithms of the probabilities of every token, a batch of texts at a time."""
    for batch in tokens.split(_BATCH):
        yield torch.log_softmax(model(input_ids=batch, use_cache=False).logits[:, :-1].flatten(0, 1), -1)


def _row(name: str, model: Any, expected: list[Tensor], tokens: Tensor, *, cosine: float | None = None) -> Row:
    loss, divergence, same, count = 0.0, 0.0, 0, 0
    for batch, due, found in zip(tokens.split(_BATCH), expected, _predictions(model, tokens), strict=True):
        loss += float(torch.nn.functional.nll_loss(found, batch[:, 1:].flatten(), reduction="sum"))
        divergence += float(torch.nn.functional.kl_div(found, due, reduction="sum", log_target=True))
        same += int((found.argmax(-1) == due.argmax(-1)).sum())
        count += len(found)
    return Row(
        name=name, perplexity=math.exp(loss / count), kl=divergence / count, agreement=same / count, cosine=cosine
    )


def _cosine(output: Path) -> float:
    """The median over all tensors of the cosine between the deltas and what changed in the weights."""
    receipt = json.loads((output / "merge_receipt.json").read_text())
    return float(torch.tensor([entry["survival"]["cosine"] or 0.0 for entry in receipt["tensors"].values()]).median())


if __name__ == "__main__":
    main()
