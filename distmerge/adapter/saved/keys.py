"""Names of saved adapter tensors, taken apart: the module, what the tensor is to it, the adapter's own name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

PREFIX = "base_model.model."
# Components that wrappers add and that no module of the model is called.
_JUNK = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_OUTER = ("module", "_forward_module")
# What may follow an attribute that holds a tensor for each adapter; `*` stands for one component.
_LORA: dict[str, tuple[str, ...]] = {
    "lora_A": ("weight", ""),  # without .weight: AdaLoRA
    "lora_B": ("weight", "bias", ""),
    "lora_E": ("",),
    "ranknum": ("",),
    "lora_embedding_A": ("",),
    "lora_embedding_B": ("",),
    "lora_magnitude_vector": ("", "weight"),
    "lora_diag": ("",),
    "lora_velora_embed": ("",),
    "lora_monteclora_sampler": ("*",),
    "trainable_tokens_delta": ("",),
}
_MODULES_TO_SAVE, _ORIGINAL, _BASE, _TOKENS = "modules_to_save", "original_module", "base_layer", "token_adapter"
FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A saved tensor's name in parts.

    `role` is the tail that PEFT's save_pretrained gives the tensor, or "full" for a parameter of the model
    itself, whose name is `param`. Copies of the base have `param` too. `module` keeps the ".base_layer" of nested
    wrappers, which tells whose factors they are. A `shared` tensor belongs to the whole model: `base_model.<role>`.
    """

    module: str
    role: str
    param: str = ""
    adapter: str = ""
    shared: bool = False

    @property
    def canonical(self) -> str:
        """The key that save_pretrained would have written."""
        if self.shared:
            return f"base_model.{self.role}"
        tail = self.param if self.is_full else self.role
        return f"{PREFIX}{_join(self.module, tail)}"

    @property
    def is_full(self) -> bool:
        """True for a parameter of the model, saved as it is or trained as one of modules_to_save."""
        return self.role == FULL or self.role.startswith(f"{_MODULES_TO_SAVE}.")

    @property
    def is_copy(self) -> bool:
        """True for a parameter of the base under a wrapper: what the adapter was laid over."""
        return self.role.startswith((f"{_BASE}.", f"{_ORIGINAL}.", f"{_TOKENS}.{_BASE}."))

    @property
    def tensor(self) -> str:
        """The model's own name of the parameter, for full tensors and copies; else empty."""
        return _join(self.module, self.param) if self.param else ""


def parse(name: str, tails: Collection[str] = ()) -> Key:
    """The parts of `name`, for every name there can be; `tails` are the tails of other tuners ("hada_w1_a",
    "oft_R.weight"; `*` stands for one component).

    What wrappers add is dropped, and everything up to the first `base_model.model.`. The first component that is an
    attribute of a tuner decides, if what follows it is

    - exactly a tail: then there is no adapter's name. A tail wins over an adapter that is called like one, so
      `lora_A.weight` is LoRA's factor and not the AdaLoRA factor of an adapter called "weight";
    - or one component more, at the front: that is the adapter's name (PEFT's names hold no dots).

    Behind `modules_to_save` the adapter's name always stands: PEFT drops both at once. Everything else is a parameter
    of the model: below `base_layer` or `original_module` a copy of it, otherwise itself.
    """
    parts = [part for part in name.split(".") if part not in _JUNK]
    start = next((i + 2 for i in range(len(parts) - 1) if parts[i : i + 2] == ["base_model", "model"]), 0)
    while not start and len(parts) > 1 and parts[0] in _OUTER:
        parts = parts[1:]
    rests = _rests(tails if isinstance(tails, tuple | frozenset) else frozenset(tails))
    if not start and len(parts) > 1 and parts[0] == "base_model":
        role, adapter = _tuned(parts[1:], 0, rests) or (".".join(parts[1:]), "")
        return Key(module="", role=role, adapter=adapter, shared=True)
    parts = parts[start:]
    for head in range(len(parts)):
        if parts[head] in rests and (found := _tuned(parts, head, rests)):
            return _tuner_key(parts[:head], *found)
    return _parameter_key(parts)


@lru_cache(maxsize=16)
def _rests(tails: tuple[str, ...] | frozenset[str]) -> dict[str, frozenset[tuple[str, ...]]]:
    """For every attribute of a tuner what may follow it."""
    known: dict[str, set[tuple[str, ...]]] = {head: {_split(rest) for rest in rests} for head, rests in _LORA.items()}
    for tail in tails:
        head, *rest = tail.split(".")
        known.setdefault(head, set()).add(tuple(rest))
    return {head: frozenset(rests) for head, rests in known.items()}


def _tuned(parts: list[str], head: int, rests: Mapping[str, frozenset[tuple[str, ...]]]) -> tuple[str, str] | None:
    """Role and adapter's name, if parts[head] is an attribute of a tuner and a known tail follows it."""
    rest = tuple(parts[head + 1 :])
    known = rests.get(parts[head], frozenset())
    for skip in (0, 1) if rest else (0,):
        if _fits(rest[skip:], known):
            return ".".join((parts[head], *rest[skip:])), rest[0] if skip else ""
    return None


def _fits(rest: tuple[str, ...], known: frozenset[tuple[str, ...]]) -> bool:
    """True if `rest` is one of `known`, in which `*` stands for one component."""
    if rest in known:
        return True
    open_ended = (pattern for pattern in known if "*" in pattern and len(pattern) == len(rest))
    return any(all(want in ("*", part) for part, want in zip(rest, pattern, strict=True)) for pattern in open_ended)


def _tuner_key(module: list[str], role: str, adapter: str) -> Key:
    if module[-1:] == [_TOKENS]:
        module, role = module[:-1], f"{_TOKENS}.{role}"
    if role.startswith("lora_magnitude_vector"):
        role = "lora_magnitude_vector"  # PEFT 0.9 to 0.11 saved it as ".weight"
    return Key(module=".".join(module), role=role, adapter=adapter)


def _parameter_key(parts: list[str]) -> Key:
    for wrapper in (_MODULES_TO_SAVE, _ORIGINAL):
        at = parts.index(wrapper) if wrapper in parts else len(parts)
        named = wrapper == _MODULES_TO_SAVE
        if len(parts) > at + 1 + named:
            adapter, param = parts[at + 1] if named else "", _without_base(parts[at + 1 + named :])
            return Key(module=_without_base(parts[:at]), role=f"{wrapper}.{param}", param=param, adapter=adapter)
    if _BASE in parts[:-1]:
        at = len(parts) - 1 - parts[::-1].index(_BASE)
        tokens = parts[at - 1] == _TOKENS and at > 0
        module, param = parts[: at - tokens], ".".join(parts[at + 1 :])
        role = f"{_TOKENS}.{_BASE}.{param}" if tokens else f"{_BASE}.{param}"
        return Key(module=_without_base(module), role=role, param=param)
    return Key(module=".".join(parts[:-1]), role=FULL, param=parts[-1] if parts else "")


def _without_base(parts: list[str]) -> str:
    return ".".join(part for part in parts if part != _BASE)


def _split(dotted: str) -> tuple[str, ...]:
    return tuple(dotted.split(".")) if dotted else ()


def _join(module: str, tail: str) -> str:
    return f"{module}.{tail}" if module else tail
