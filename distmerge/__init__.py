"""Merge LoRA and QLoRA adapters into sharded Hugging Face checkpoints, file to file.

import distmerge
config = distmerge.MergeConfig(base=..., adapters=(distmerge.AdapterChoice(folder=...),), output=...)
distmerge.plan(config); distmerge.merge(config); distmerge.verify(output)
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distmerge.config import AdapterChoice, MergeConfig
from distmerge.errors import DistmergeError

if TYPE_CHECKING:
    from distmerge.audit import Audit
    from distmerge.plan import Plan
    from distmerge.run import MergeResult

__version__ = "0.1.0"
__all__ = ["AdapterChoice", "DistmergeError", "MergeConfig", "merge", "plan", "verify"]


class _Package(ModuleType):
    """Keeps the functions below where importing the modules of the same names would put those."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def plan(config: MergeConfig) -> Plan:
    """The plan of `config`: every output tensor, where it comes from and where it goes. Writes nothing."""
    from distmerge.plan import make_plan  # importing the package must not import torch
    from distmerge.publish import check_output, is_published
    from distmerge.work import WorkFolder
    from distmerge.world import device_type

    check_output(config)
    made = make_plan(config, device_type(config.device))
    is_published(config, made)  # refuses what a merge would refuse
    WorkFolder(config.output).check(made)
    return made


def merge(config: MergeConfig) -> MergeResult:
    """Merges as `config` says, on as many ranks as it says; on return the output is published."""
    from distmerge.run import run

    return run(config)


def verify(output: Path, *, base: Path | None = None, adapters: tuple[AdapterChoice, ...] = ()) -> Audit:
    """Checks a merged checkpoint against its receipt, and with `base` and `adapters` against float64 arithmetic."""
    from distmerge.audit import audit

    return audit(output, base=base, adapters=adapters)
