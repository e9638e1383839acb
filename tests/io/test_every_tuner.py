"""Every tuner of PEFT from file to file: the merged model computes what the model with the adapter computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import distmerge
from tests import factories
from tests.tuners import CASES, TOKENS, Case, llama, train


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_merged_folder_has_the_logits_of_the_unmerged_model(case: Case, tmp_path: Path) -> None:
    trained = train(case)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    llama(case.biases).to(torch.float32).save_pretrained(base)
    adapter.mkdir()
    # Trained in float64 so that the oracle is exact; saved as training in float32 would have.
    floats = {k: v.float() if v.is_floating_point() else v for k, v in trained.tensors.items()}
    save_file({k: v.contiguous() for k, v in floats.items()}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(trained.config, default=sorted))
    merged = factories.merge(base, adapter, tmp_path / "merged")
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float64)(TOKENS).logits
    effect = float((trained.logits - trained.base_logits).abs().max())
    error = float((logits - trained.logits).abs().max())
    assert effect > 100 * max(error, 1e-4), (effect, error)
    ledger = json.loads((merged / "merge_receipt.json").read_text())
    assert len(ledger["ledger"]) + len(ledger["adapters"][0]["unused"]) == len(floats)
    distmerge.verify(merged, base=base, adapters=(distmerge.AdapterChoice(folder=adapter),))
