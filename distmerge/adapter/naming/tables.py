"""From an adapter's paths to names in the checkpoint, by rules alone: as they are, --map rules, known renamings."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distmerge.adapter.patterns import time_limit
from distmerge.errors import InputError, UsageError, listing, printable

_MAX_LENGTH = 1000
_ARROW = "=>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Every match of `pattern` in a path becomes `replacement`, as `re.sub` has it."""

    pattern: re.Pattern[str]
    replacement: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Renaming:
    """Where every path of an adapter lies in the checkpoint: after `rules`, each in its turn. `name` says what they
    are, "" if the paths stand as they are."""

    name: str
    paths: dict[str, str]
    rules: tuple[Rule, ...]

    def apply(self, path: str) -> str:
        """The name of another path of the same adapter."""
        return _substitute(path, self.rules)


def parse_rules(texts: Sequence[str]) -> tuple[Rule, ...]:
    """The rules of the --map options `texts`. Raises UsageError, naming the option, for one that cannot be used."""
    return tuple(_parse_rule(text) for text in texts)


def _parse_rule(text: str) -> Rule:
    where = f"--map {printable(text)!r}"
    hint = "for example --map '^model\\.=>' or --map 'transformer\\.(h\\.\\d+)=>model.\\1'"
    regex, arrow, replacement = text.partition(_ARROW)
    if not arrow or not regex:
        raise UsageError(f"is not of the form REGEX{_ARROW}REPLACEMENT", where=where, hint=hint)
    if _ARROW in replacement:
        raise UsageError(f"has {_ARROW} twice", where=where, hint="give --map once for each rule")
    if len(text) > _MAX_LENGTH:
        raise UsageError(f"has {len(text)} characters, more than {_MAX_LENGTH}", where=where)
    try:
        pattern = re.compile(regex)
        pattern.sub(replacement, "")  # raises for a group that the pattern lacks
    except (re.error, IndexError, RecursionError, OverflowError) as error:
        raise UsageError(f"cannot be used: {error}", where=where, hint=hint) from None
    return Rule(pattern=pattern, replacement=replacement)


def apply_rules(paths: Sequence[str], rules: Sequence[Rule]) -> dict[str, str]:
    """Each of `paths` after `rules`, each in its turn. Raises InputError if two paths become one, or if matching takes
    too long."""
    try:
        with time_limit("--map"):
            mapped = {path: _substitute(path, rules) for path in paths}
    except InputError as error:
        raise InputError(error.what, where="--map", hint="write a simpler regular expression") from None
    first: dict[str, str] = {}
    for path, result in mapped.items():
        if first.setdefault(result, path) != path:
            raise InputError(
                f"makes {printable(result)!r} of both {printable(first[result])!r} and {printable(path)!r}",
                where="--map",
                hint="every tensor of the adapter needs a place of its own",
            )
    return mapped


def rename(paths: Sequence[str], known: Callable[[str], bool], rules: Sequence[Rule]) -> Renaming | None:
    """Names for all of `paths` that are `known` in the checkpoint: after the user's `rules` as they are, else by the
    one table that makes every path known. None if there is no such table.

    Raises InputError if tables disagree, for a place is never guessed, and for what `apply_rules` refuses.
    """
    mapped = apply_rules(paths, rules)
    done = "--map" if any(path != result for path, result in mapped.items()) else ""
    if all(map(known, mapped.values())):
        return Renaming(name=done, paths=mapped, rules=tuple(rules))
    found: dict[tuple[str, ...], str] = {}
    for name, table in TABLES.items():
        results = tuple(_substitute(path, table) for path in mapped.values())
        if all(map(known, results)) and len(set(results)) == len(results):
            found.setdefault(results, name)
    if len(found) > 1:
        raise _ambiguous(list(mapped), found)
    for results, name in found.items():
        how = f"{done}, {name}" if done else name
        return Renaming(name=how, paths=dict(zip(mapped, results, strict=True)), rules=(*rules, *TABLES[name]))
    return None


def _substitute(path: str, rules: Sequence[Rule]) -> str:
    for rule in rules:
        path = rule.pattern.sub(rule.replacement, path)
    return path


def _ambiguous(paths: Sequence[str], found: dict[tuple[str, ...], str]) -> InputError:
    columns = list(found)
    path, *results = next(row for row in zip(paths, *columns, strict=True) if len(set(row[1:])) > 1)
    return InputError(
        f"{printable(path)!r} may be any of {listing(sorted(set(results)))}: "
        f"the base fits each of the renamings {listing(list(found.values()))}",
        where="the adapter's names",
        hint="say which with --map 'REGEX=>REPLACEMENT'",
    )


def _table(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(pattern=re.compile(pattern), replacement=replacement) for pattern, replacement in pairs)


# Paths may be of modules or of parameters, so a name ends at a dot or with the path.
_TOWERS = "vision_tower|vision_model|audio_tower|multi_modal_projector|image_newline"
_HEAD_IN = (r"^lm_head(?=\.|$)", "language_model.lm_head")
_HEAD_OUT = (r"^language_model\.lm_head(?=\.|$)", "lm_head")
# Text model, towers and head of a vision language model, and whether a CLIP or Siglip tower has a module of its own.
_LLAVA = {
    "": (),
    "LLaVA v5 -> v4": _table(
        (r"^model\.language_model\.", "language_model.model."), _HEAD_IN, (rf"^model\.({_TOWERS})(?=\.|$)", r"\1")
    ),
    "LLaVA v4 -> v5": _table(
        (r"^language_model\.model\.", "model.language_model."), _HEAD_OUT, (rf"^({_TOWERS})(?=\.|$)", r"model.\1")
    ),
}
_CLIP = {
    "": (),
    "with vision_model": _table((r"^(model\.)?vision_tower\.(?!vision_model\.)", r"\1vision_tower.vision_model.")),
    "without vision_model": _table((r"^(model\.)?vision_tower\.vision_model\.", r"\1vision_tower.")),
}
_QWEN_TO_V4 = _table((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
_QWEN_TO_V5 = _table(
    (r"^model\.(?!language_model\.|visual\.)", "model.language_model."), (r"^visual\.", "model.visual.")
)
_PREFIXES = ("model", "transformer", "gpt_neox", "bert", "roberta")

# v4 are the names of transformers 4 (those of most files of the Hub), v5 those of the modules of transformers 5.
TABLES: dict[str, tuple[Rule, ...]] = {
    **{
        ", ".join(filter(None, (llava, clip))): (*_LLAVA[llava], *_CLIP[clip])
        for llava in _LLAVA
        for clip in _CLIP
        if llava or clip
    },
    "Qwen2-VL v5 -> v4 or text model": _QWEN_TO_V4,
    "text model or Qwen2-VL v4 -> v5": _QWEN_TO_V5,
    "text model -> LLaVA v4": _table((r"^model\.(?!language_model\.)", "language_model.model."), _HEAD_IN),
    "LLaVA v4 -> text model": _table((r"^language_model\.model\.", "model."), _HEAD_OUT),
    "Mixtral v5 -> v4": _table((r"\.mlp\.gate(?=\.|$)", ".block_sparse_moe.gate")),
    "Mixtral v4 -> v5": _table((r"\.block_sparse_moe\.gate(?=\.|$)", ".mlp.gate")),
    "PhiMoE v5 -> v4": _table((r"\.mlp\.router(?=\.|$)", ".block_sparse_moe.gate")),
    "PhiMoE v4 -> v5": _table((r"\.block_sparse_moe\.gate(?=\.|$)", ".mlp.router")),
    **{f"add {prefix}.": _table((rf"^(?!{prefix}\.|lm_head(?:\.|$))", f"{prefix}.")) for prefix in _PREFIXES},
    **{f"strip {prefix}.": _table((rf"^{prefix}\.", "")) for prefix in _PREFIXES},
}
