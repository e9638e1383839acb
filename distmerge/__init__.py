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
    from distmerge.audit.findings import Audit, Depth
    from distmerge.evaluation.run import Evaluation
    from distmerge.plan import Plan
    from distmerge.progress import Display
    from distmerge.run import MergeResult

__version__ = "0.1.0"
__all__ = ["AdapterChoice", "DistmergeError", "MergeConfig", "evaluate", "merge", "plan", "verify"]


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


def verify(
    output: Path,
    *,
    base: Path | None = None,
    adapters: tuple[AdapterChoice, ...] = (),
    depth: Depth | None = None,
    sample_share: float = 0.05,
    seed: int = 0,
    activations: Path | None = None,
    device: str = "cpu",
    memory_budget: int = 2 << 30,
    display: Display | None = None,
) -> Audit:
    """Checks a merged checkpoint against its receipt, and with `base` and `adapters` against float64 arithmetic.

    `depth` is `digests`, `sample` (`sample_share` of every tensor, chosen by `seed`), `probe` (with vectors of the file
    `activations` too) or `full`; by default digests without a base and full with one. `display` shows how far it is.
    Raises InputError for other inputs than the merge's, and VerifyError with everything that is wrong.
    """
    from distmerge.audit.findings import Request
    from distmerge.audit.run import Inputs, audit
    from distmerge.progress import Display

    request = Request(depth=depth or ("digests" if base is None else "full"), share=sample_share, seed=seed)
    inputs = None
    if base is not None:
        inputs = Inputs(
            base=base, adapters=adapters, device=device, memory_budget=memory_budget, activations=activations
        )
    return audit(output, inputs=inputs, request=request, display=display or Display(quiet=True))


def evaluate(
    output: Path,
    *,
    base: Path,
    adapters: tuple[AdapterChoice, ...],
    text: Path,
    max_tokens: int | None = 4096,
    context: int = 512,
    dtype: str = "float32",
    device: str = "cpu",
    memory_budget: int = 8 << 30,
    scratch: Path | None = None,
    max_kl: float | None = None,
    display: Display | None = None,
) -> Evaluation:
    """Compares a merged model with the unmerged one, base and adapters side by side, on the tokens of a file.

    Needs transformers, PEFT and accelerate. Raises VerifyError where the mean KL, in nats, exceeds `max_kl`.
    """
    from distmerge.evaluation.run import Choice
    from distmerge.evaluation.run import evaluate as run
    from distmerge.progress import Display

    choice = Choice(
        max_tokens=max_tokens,
        context=context,
        dtype=dtype,
        device=device,
        memory_budget=memory_budget,
        scratch=scratch,
        max_kl=max_kl,
    )
    return run(output, base=base, adapters=adapters, text=text, choice=choice, display=display or Display(quiet=True))
