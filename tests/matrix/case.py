"""One case of the matrix: an adapter on a tiny model, the names on disk, and what must hold of the merge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALL = "all-linear"
ATTENTION = ("q_proj", "v_proj")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
HEAD = ("lm_head.weight",)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to train an adapter on a tiny model and to merge it.

    `model` is one of tests.matrix.bases, its tensors named on disk by `naming`. `kind` says in words what `tuner` with
    `fields` trains; `more` are the fields of further adapters, `weights` those of all of them. `trained_as` is the
    class that training loaded where it is not that of config.json, `vocab` the size that training gave the vocabulary,
    and `tables` that PEFT was asked to save embedding and head. `tied` says whether the head of a tied model still is;
    `new` are tensors that the base lacks. Without an `oracle` only answers are compared.

    `start` is an initialisation that took its factors off the base, with the adapter as it began saved beside it.
    `old` is the release of transformers that an adapter's names come from, a LoRA on what `pattern` finds in the names
    of that time; `peft_reads` says that PEFT loads all of it, so that its answers count.
    """

    model: str
    kind: str
    naming: str = "hub"
    dtype: str = "float32"
    shard: str = "50GB"
    tuner: str = "Lora"
    fields: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[Mapping[str, Any], ...] = ()
    weights: tuple[float, ...] = (1.0,)
    noise: float = 0.2
    vocab: int | None = None
    tables: bool = False
    trained_as: str = ""
    tied: bool | None = None
    new: tuple[str, ...] = ()
    oracle: bool = True
    tolerance: float = 1e-5
    start: str = ""
    old: str = ""
    pattern: str = ""
    peft_reads: bool = False

    def __str__(self) -> str:
        words = [self.model, self.kind, self.naming, *[self.dtype] * (self.dtype != "float32")]
        words += ["shards"] * (self.shard != "50GB")
        return "-".join(words).replace(" ", "_")

    @property
    def checks(self) -> tuple[str, ...]:
        """What is compared, in words."""
        answers = self.dtype == "float32" and (not self.old or self.peft_reads)
        return (*["weights"] * self.oracle, *["answers"] * answers)


def lora(model: str, kind: str, *, r: int = 3, alpha: float = 5, targets: Any = ATTENTION, **rest: Any) -> Case:
    """A case with a LoRA; what is no field of Case goes to LoraConfig."""
    own = {key: rest.pop(key) for key in list(rest) if key in Case.__dataclass_fields__}
    fields = {"r": r, "lora_alpha": alpha, "target_modules": _listed(targets), "task_type": "CAUSAL_LM", **rest}
    return Case(model=model, kind=kind, fields=fields, **own)


def experts(model: str, kind: str = "LoRA on experts", *, parameters: tuple[str, ...] = EXPERTS, **rest: Any) -> Case:
    """A case with a LoRA on the parameters of experts, as PEFT trains them on transformers 5."""
    return lora(model, kind, target_parameters=list(parameters), **rest)


def tuned(model: str, tuner: str, kind: str = "", *, targets: Any = ("q_proj", "down_proj"), **rest: Any) -> Case:
    """A case with another tuner; what is no field of Case goes to its configuration."""
    own = {key: rest.pop(key) for key in list(rest) if key in Case.__dataclass_fields__}
    return Case(
        model=model, kind=kind or tuner, tuner=tuner, fields={"target_modules": _listed(targets), **rest}, **own
    )


def old(model: str, release: str, kind: str, pattern: str, targets: tuple[str, ...], **rest: Any) -> Case:
    """A case whose adapter has the names of an older release of transformers."""
    words = f"{kind}, named as by transformers {release}"
    return Case(model=model, kind=words, old=release, pattern=pattern, fields={"targets": list(targets)}, **rest)


def _listed(targets: Any) -> Any:
    return list(targets) if isinstance(targets, tuple) else targets
