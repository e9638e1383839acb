"""The output's tensors: those of the base, with everything that the adapters do to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from distmerge.adapter.changes import Change
from distmerge.adapter.naming.names import Names
from distmerge.adapter.peft_adapter import Adapter
from distmerge.adapter.resolve import Resolved, resolve
from distmerge.adapter.tied import Tie, check_tie, find_pair, find_tie, refuse_other_ties, untied
from distmerge.checkpoint.base import Base
from distmerge.checkpoint.layers import replicate_layers, vocab_sizes
from distmerge.checkpoint.packing import Stored
from distmerge.checkpoint.sidefiles import ConfigEdits, NewHead
from distmerge.errors import InputError, listing, printable


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """An output tensor: its source in the base (origin 0) or an adapter (its number, from 1), and what changes it.
    `also` names tensors of that adapter that are the source once more, for a parameter that is tied to this one;
    `twin` the tensor that this one is tied and equal to, if the output holds both. `as_is` says that it is a part of a
    packed tensor, which --dtype leaves alone."""

    name: str
    source: Stored
    origin: int
    changes: tuple[Change, ...]
    also: tuple[str, ...] = ()
    twin: str = ""
    as_is: bool = False


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Every output tensor by name, what the configuration must say of them, and what the user should know."""

    base: Base
    tensors: dict[str, Output]
    edits: ConfigEdits
    names: tuple[Names, ...]
    unused: tuple[dict[str, str], ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """The tensors as far as they are known: `changes` by name, and `replaced` with the number of the adapter."""

    base: Base
    changes: dict[str, tuple[Change, ...]] = field(default_factory=dict)
    replaced: dict[str, tuple[int, Stored]] = field(default_factory=dict)
    new: dict[str, int] = field(default_factory=dict)

    def touched(self, name: str) -> bool:
        return name in self.changes or name in self.replaced


def collect(base: Base, adapters: Sequence[tuple[Adapter, float]]) -> Outputs:
    """The output's tensors when `adapters`, each with its weight, are merged into `base`.

    Raises InputError, naming keys and tensors, for what does not fit or contradicts itself.
    """
    base = _replicated(base, [adapter for adapter, _ in adapters])
    tie = find_tie(base)
    own = untied(base, tie)
    draft = _Draft(base=own)
    resolved = [resolve(adapter, number, weight, own) for number, (adapter, weight) in enumerate(adapters)]
    for number, one in enumerate(resolved):
        _add(draft, one, number, adapters)
    refuse_other_ties(own, _other_tables(own, draft, adapters))
    tensors = _outputs(draft)
    stays_tied = True
    if tie is not None:
        from distmerge.adapter.equal import say_the_same

        same = say_the_same(
            [adapter for adapter, _ in adapters],
            tie,
            draft.changes,
            draft.replaced,
            shared_table=_table_is_shared(tie.embedding, draft, adapters),
        )
        tensors, stays_tied = _settle(tie, draft, tensors, adapters, same=same)
        if tie.absent and not stays_tied:
            check_tie(base, tie, embedding_trained=draft.touched(tie.embedding))
    warnings = [text for one in resolved for text in one.warnings]
    if not stays_tied and tie is not None:
        warnings.append(f"{tie.head} is no longer tied to {tie.embedding}: the adapter changes one and not the other")
    return Outputs(
        base=base,
        tensors=tensors,
        edits=ConfigEdits(
            untie=not stays_tied,
            vocab=_new_vocab(own, tensors),
            head=_new_head(draft, adapters),
            config=base.config,
        ),
        names=tuple(one.names for one in resolved),
        unused=tuple(one.unused for one in resolved),
        warnings=tuple(warnings),
    )


def _replicated(base: Base, adapters: list[Adapter]) -> Base:
    ranges = {adapter.config.layer_replication for adapter in adapters}
    if len(ranges) > 1:
        raise InputError(
            "the adapters were trained on different stacks of layers (layer_replication)", where=str(adapters[0].folder)
        )
    chosen = ranges.pop()
    return replicate_layers(base, chosen) if chosen else base


def _add(draft: _Draft, one: Resolved, number: int, adapters: Sequence[tuple[Adapter, float]]) -> None:
    for name, changes in one.changes.items():
        draft.changes[name] = (*draft.changes.get(name, ()), *changes)
    for name, stored in one.replaced.items():
        if name in draft.replaced:
            first = adapters[draft.replaced[name][0]][0]
            raise InputError(
                f"{printable(stored.data.name)!r} takes the place of {name!r}, and so does "
                f"{printable(draft.replaced[name][1].data.name)!r} of {first.folder.name}",
                where=adapters[number][0].where,
                hint="whole parameters of several adapters cannot be merged",
            )
        draft.replaced[name] = (number, stored)
    for name in sorted(one.new):  # the order of a set is another in every process
        draft.new[name] = number


def _outputs(draft: _Draft) -> dict[str, Output]:
    tensors = {}
    for name in (*draft.base.tensors, *draft.new):
        number, source = draft.replaced[name] if name in draft.replaced else (-1, draft.base.tensors[name])
        changes = draft.changes.get(name, ())
        for change in changes:
            if (numel := change.shape[0] * change.shape[1] * change.shape[2]) != source.numel:
                raise InputError(
                    f"a delta of {numel} elements meets a tensor of shape {source.shape}",
                    where=name,
                    hint="the vocabulary was resized by one adapter and not by the other",
                )
        tensors[name] = Output(name=name, source=source, origin=number + 1, changes=changes)
    return tensors


def _settle(
    tie: Tie, draft: _Draft, tensors: dict[str, Output], adapters: Sequence[tuple[Adapter, float]], *, same: bool
) -> tuple[dict[str, Output], bool]:
    """The tensors with the head as it must be, and whether it is still tied.

    Trained token rows and a vocabulary that was resized belong to the tied parameter; a LoRA or a copy trained on one
    side belongs to that side alone, and the trained function is that of two tensors.
    """
    embedding, head = tensors[tie.embedding], tensors[tie.head]
    rest = {name: output for name, output in tensors.items() if name != tie.head}
    if not draft.touched(tie.embedding) and not draft.touched(tie.head):
        return (rest if tie.absent else tensors), True
    if same:
        if not tie.absent:
            return {**tensors, tie.head: replace(head, twin=tie.embedding)}, True
        also = (head.source.data.name,) if head.origin else ()
        one = replace(embedding, changes=_with_keys(embedding.changes, head), also=also)
        return {**rest, tie.embedding: one}, True
    if not draft.touched(tie.head) and _is_shared(tie.embedding, draft, adapters):
        if tie.absent:
            return rest, True
        return {**tensors, tie.head: replace(embedding, name=tie.head, twin=tie.embedding)}, True
    if tie.absent and tie.head not in draft.replaced and _table_is_shared(tie.embedding, draft, adapters):
        # The table that the LoRA was laid over is that of both sides.
        head = replace(head, source=embedding.source, origin=embedding.origin)
    resized = embedding.source.shape != head.source.shape and tie.embedding not in draft.replaced
    if tie.absent and resized and _table_is_shared(tie.head, draft, adapters):
        embedding = replace(embedding, source=head.source, origin=head.origin)
    return {**tensors, tie.embedding: embedding, tie.head: head}, False


def _with_keys(changes: tuple[Change, ...], head: Output) -> tuple[Change, ...]:
    also = {change.adapter: change.keys for change in head.changes}
    return tuple(replace(change, also=also.get(change.adapter, ())) for change in changes)


def _is_shared(embedding: str, draft: _Draft, adapters: Sequence[tuple[Adapter, float]]) -> bool:
    """True if everything that was done to the embedding was done to the tied parameter."""
    rows_only = all(change.operator == "rows" for change in draft.changes.get(embedding, ()))
    return rows_only and (embedding not in draft.replaced or _table_is_shared(embedding, draft, adapters))


def _table_is_shared(name: str, draft: _Draft, adapters: Sequence[tuple[Adapter, float]]) -> bool:
    """True if the table comes from an adapter that did not train it as a module of its own."""
    if name not in draft.replaced:
        return False
    number, _ = draft.replaced[name]
    config = adapters[number][0].config
    module = name.removesuffix(".weight")
    trained = any(module.endswith(saved) for saved in config.modules_to_save)
    return not trained or config.raw.get("ensure_weight_tying") is True


def _other_tables(base: Base, draft: _Draft, adapters: Sequence[tuple[Adapter, float]]) -> list[str]:
    """Tables of the vocabulary that are trained as modules of their own, but for the pair that is known."""
    sizes, pair = vocab_sizes(base.config), find_pair(base) or ()
    touched = (name for name in {**draft.changes, **draft.replaced} if name in base.tensors and name not in pair)
    tables = [name for name in touched if len(base.tensors[name].shape) == 2 and base.tensors[name].shape[0] in sizes]
    return [name for name in tables if not _is_shared(name, draft, adapters)]


def _new_vocab(base: Base, tensors: dict[str, Output]) -> tuple[int, int] | None:
    """The old and the new size of the vocabulary, where a table of another size took its place."""
    sizes = {
        (base.tensors[name].shape[0], output.source.shape[0])
        for name, output in tensors.items()
        if name in base.tensors and base.tensors[name].shape != output.source.shape
    }
    if len(sizes) > 1:
        raise InputError(
            f"embedding and head have different sizes: {listing([str(new) for _, new in sorted(sizes)])}",
            where=str(base.folder),
        )
    if not sizes:
        return None
    old, new = sizes.pop()
    if stale := [name for name in find_pair(base) or () if name in tensors and tensors[name].source.shape[0] == old]:
        raise InputError(
            f"the vocabulary was resized from {old} to {new}, and the adapter has no table of that size for it",
            where=stale[0],
            hint="merge into the base as training resized it, or train with this table in modules_to_save",
        )
    return old, new


def _new_head(draft: _Draft, adapters: Sequence[tuple[Adapter, float]]) -> NewHead | None:
    """The head that the base lacks, if an adapter brings one."""
    if not draft.new:
        return None
    weights = [name for name in draft.new if name.endswith(".weight") and draft.replaced[name][1].shape]
    if not weights or len({name.split(".")[0] for name in draft.new}) > 1:
        keys = [draft.replaced[name][1].data.name for name in draft.new]
        raise InputError(
            f"{len(keys)} tensors that the base lacks are not one head with its weight: {listing(keys)}",
            where=adapters[draft.new[next(iter(draft.new))]][0].where,
        )
    number, stored = draft.replaced[weights[-1]]
    return NewHead(task_type=adapters[number][0].config.task_type, num_labels=stored.shape[0], where=weights[-1])
