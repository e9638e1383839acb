"""Inputs and merges that several tests of this folder look at; all of them are read only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import factories


@pytest.fixture(scope="session")
def fp32_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama in one file, with biases on its attention, as transformers saves it."""
    folder = tmp_path_factory.mktemp("fp32") / "llama"
    return factories.save_base(folder, torch.float32, attention_bias=True)


@pytest.fixture(scope="session")
def merged(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adapter` merged into `base`."""
    return factories.merge(base, adapter, tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture(scope="session")
def merged_nf4(packed_base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`adapter` merged into `packed_base`."""
    return factories.merge(packed_base, adapter, tmp_path_factory.mktemp("merged") / "out")


@pytest.fixture(scope="session")
def other_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of another r with rsLoRA, on some of the linears."""
    folder = tmp_path_factory.mktemp("adapter") / "other"
    fields = {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}
    return factories.save_adapter(folder, r=7, alpha=3, seed=2, **fields)
