"""torch's own settings while products are computed, and afterwards."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.conftest import environment

BACKENDS: Any = torch.backends


def state() -> dict[str, Any]:
    """Everything that decides how a float32 product is computed, as a program sees it."""
    try:
        matmul: Any = torch.get_float32_matmul_precision()
    except RuntimeError:
        matmul = "mixed"
    return {
        "matmul": matmul,
        "cuda": BACKENDS.cuda.matmul.fp32_precision,
        "mkldnn": BACKENDS.mkldnn.matmul.fp32_precision,
        "conv": BACKENDS.cudnn.conv.fp32_precision,
        "fp16": BACKENDS.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "bf16": BACKENDS.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "accumulation": BACKENDS.cuda.matmul.allow_fp16_accumulation,
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


FULL = {"cuda": "ieee", "mkldnn": "ieee", "conv": "ieee", "fp16": False, "bf16": False, "accumulation": False}
FULL |= {"matmul": "highest", "dtype": torch.float32, "threads": 1}


def settings(name: str) -> None:
    """What a program may have chosen before it calls distmerge."""
    if name == "high":
        torch.set_float32_matmul_precision("high")
    elif name == "medium":
        torch.set_float32_matmul_precision("medium")
    elif name == "by backend":
        BACKENDS.cuda.matmul.fp32_precision = "tf32"
    elif name == "old flags":
        BACKENDS.cuda.matmul.allow_tf32 = True
        BACKENDS.cudnn.allow_tf32 = True
        BACKENDS.cuda.matmul.allow_fp16_accumulation = True
    elif name == "float64":
        torch.set_default_dtype(torch.float64)


CHOICES = ("untouched", "high", "medium", "by backend", "old flags", "float64")


@pytest.mark.parametrize("name", CHOICES)
def test_products_are_computed_in_full_precision_and_the_programs_settings_come_back(name: str) -> None:
    # In a process of its own: torch keeps these settings for good.
    code = (
        "from distmerge.numerics.precision import full_precision\nfrom tests.unit.test_precision import *\n"
        f"torch.set_num_threads(2); settings({name!r}); before = state()\n"
        "with full_precision(num_threads=1): assert state() == FULL, state()\n"
        "assert state() == before, (before, state())\n"
        "try:\n    with full_precision(): raise KeyError\n"
        "except KeyError: pass\n"
        "assert state() == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
