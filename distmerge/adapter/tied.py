"""Tied embeddings: a head without a tensor of its own, given one when an adapter changes one side and not the other."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from distmerge.adapter.naming.conversion import ModelNames, read_names
from distmerge.checkpoint.base import Base
from distmerge.checkpoint.quantization import nested_configs
from distmerge.errors import InputError, listing

# Names of input embeddings and of the head that a checkpoint leaves out when it is tied to them.
_HEADS = (
    (r"model\.language_model\.embed_tokens\.weight", "lm_head.weight"),
    (r"language_model\.model\.embed_tokens\.weight", "language_model.lm_head.weight"),
    (r"model\.embed_tokens\.weight|embed_tokens\.weight", "lm_head.weight"),
    (r"model\.decoder\.embed_tokens\.weight", "lm_head.weight"),
    (r"(transformer\.)?wte\.weight", "lm_head.weight"),
    (r"(transformer\.)?word_embeddings\.weight", "lm_head.weight"),
    (r"gpt_neox\.embed_in\.weight", "embed_out.weight"),
    (r"(backbone\.|model\.)?embeddings\.weight", "lm_head.weight"),
    (r"shared\.weight", "lm_head.weight"),
)
_MOST_DOTS = 3  # in a name that one of these patterns matches


@dataclass(frozen=True, slots=True, kw_only=True)
class Tie:
    """An input embedding and the head that is tied to it; `absent` says that the checkpoint has no tensor for the
    head."""

    embedding: str
    head: str
    absent: bool


def find_tie(base: Base) -> Tie | None:
    """The tie of the base's head to its input embedding, by its configuration and its tensors; None if it has none.

    A configuration that does not say is that of a class that ties by default, if the head has no tensor.
    """
    told = [part["tie_word_embeddings"] for part in nested_configs(base.config) if "tie_word_embeddings" in part]
    if (pair := find_pair(base)) is None:
        return None
    absent = pair[1] not in base.tensors
    tied = any(value is True for value in told) or (not told and absent)
    return Tie(embedding=pair[0], head=pair[1], absent=absent) if tied and _has_head(base) else None


def find_pair(base: Base) -> tuple[str, str] | None:
    """The base's input embedding, and the name of its head, whether it has one or not; None if neither is known."""
    candidates = [name for name in base.tensors if name.count(".") <= _MOST_DOTS]
    for pattern, head in _HEADS:
        for name in candidates:
            if re.fullmatch(pattern, name):
                return name, head
    return None


def _has_head(base: Base) -> bool:
    names = base.config.get("architectures")
    architectures = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    return not architectures or any(mark in name for name in architectures for mark in _GENERATIVE)


def refuse_other_ties(base: Base, tables: list[str]) -> None:
    """Raises InputError for a trained table of the vocabulary that the base's class uses in other places too, so that
    it is not known which of them the training was for. `tables` are those that no known tie is about."""
    told = {part["tie_word_embeddings"] for part in nested_configs(base.config) if "tie_word_embeddings" in part}
    if not tables or told == {False}:
        return
    model = _read(base)
    for name in tables:
        others = _tied_to(model, name)
        if others or (True in told and (isinstance(model, str) or model.find(name) is None)):
            raise _unclear(name, others)


def check_tie(base: Base, tie: Tie, *, embedding_trained: bool) -> None:
    """Raises InputError if the base's class does not tie the embedding to the head, which gets a tensor of its own, or
    ties other parameters to an embedding that was trained."""
    model = _read(base)
    others = _tied_to(model, tie.embedding)
    head = tie.head if isinstance(model, str) or (slot := model.find(tie.head)) is None else slot.name
    if others and (head not in others or (embedding_trained and others != [head])):
        raise _unclear(tie.embedding, others)


def _read(base: Base) -> ModelNames | str:
    return read_names(base.folder, {name: stored.shape for name, stored in base.tensors.items()})


def _tied_to(model: ModelNames | str, name: str) -> list[str]:
    """The other parameters that are the tensor `name` too, as far as the class tells."""
    if isinstance(model, str) or (slot := model.find(name)) is None:
        return []
    return sorted(other for group in model.tied if slot.name in group for other in group if other != slot.name)


def _unclear(name: str, others: list[str]) -> InputError:
    return InputError(
        f"is tied to {listing(others) if others else 'a head that is not known'}, and the adapter trained it alone",
        where=name,
        hint="untie them in the base, so that each has a tensor of its own, and merge into that",
    )


_GENERATIVE = ("ForCausalLM", "LMHead", "ForConditionalGeneration", "ForMaskedLM", "DoubleHeads")


def untied(base: Base, tie: Tie | None) -> Base:
    """`base` with the head as a tensor of its own: the embedding's, under the head's name."""
    if tie is None or not tie.absent:
        return base
    return replace(base, tensors={**base.tensors, tie.head: base.tensors[tie.embedding]})
