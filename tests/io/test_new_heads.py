"""A head that the base lacks: published with a class that loads whole, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from distmerge.errors import InputError
from tests import factories


def _adapter(folder: Path, model: Any) -> Path:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    tuned = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, target_modules=["query"], task_type="SEQ_CLS"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("has_pooler", [True, False])
def test_a_class_with_parameters_that_nobody_saved_is_refused(tmp_path: Path, has_pooler: bool) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    base = transformers.BertForPreTraining(config) if has_pooler else transformers.BertForMaskedLM(config)
    base.save_pretrained(tmp_path / "base")
    trained = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    adapter = _adapter(tmp_path / "lora", trained)
    if not has_pooler:
        with pytest.raises(InputError, match=r"BertForSequenceClassification has 2 .*pooler\.dense"):
            factories.merge(tmp_path / "base", adapter, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    merged = factories.merge(tmp_path / "base", adapter, tmp_path / "out")
    model, info = transformers.BertForSequenceClassification.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    tokens = torch.arange(8)[None]
    assert torch.allclose(model.eval()(tokens).logits, trained.eval()(tokens).logits, atol=1e-5)
