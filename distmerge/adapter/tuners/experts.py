"""LoRA on expert parameters: which parameter a nested wrapper tunes, and how its factors are laid out.

PEFT wraps a module once for each parameter that `target_parameters` names, in the order in which the module registers
them: the factors of the first one are saved under the most `.base_layer`. For E experts lora_A is (E * r, in), expert
by expert, and lora_B is (out, r * E) with the experts running fastest (peft.tuners.lora.layer.ParamWrapper).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations

from distmerge.adapter.peft_config import PeftConfig
from distmerge.adapter.views import View
from distmerge.errors import InputError, printable

Shape = tuple[int, ...]
_WRAPPED = ".base_layer"


def unwrap(module: str) -> tuple[str, int]:
    """The module without the wrappers around it, and how many there are."""
    depth = 0
    while module.endswith(_WRAPPED):
        module, depth = module.removesuffix(_WRAPPED), depth + 1
    return module, depth


def wrapped_parameters(module: str, config: PeftConfig, *, nested: bool) -> list[str]:
    """The parameters of `module` that target_parameters may mean, by their names within it; `nested` says that several
    of them are wrapped.

    A target without a module's name means none of a module that target_modules names, since that is a layer, nor one
    beside the target that names the module.
    """
    named, bare = set(), set()
    for target in config.target_parameters:
        parent, _, name = target.rpartition(".")
        if not parent:
            bare.add(name)
        elif module == parent or module.endswith(f".{parent}"):
            named.add(name)
    if bare and (nested or not named) and not _is_layer(module, config):
        named |= bare
    return sorted(named)


def _is_layer(module: str, config: PeftConfig) -> bool:
    return config.target_modules != "all-linear" and config.targets(module)


def assign(
    module: str,
    factors: Mapping[int, tuple[Shape, Shape]],
    candidates: Mapping[str, Shape | None],
    *,
    order: Callable[[], Sequence[str] | None],
    where: str,
) -> dict[int, str]:
    """Which parameter of `module` the factors at each depth tune: `factors` are the shapes of lora_A and lora_B by
    depth, `candidates` the shapes of the parameters that may be meant, None for those that the base lacks. Where the
    shapes allow several answers, `order` gives the parameters in their order of registration, if it is known.

    Raises InputError where that is not known.
    """
    shapes = {name: shape for name, shape in candidates.items() if shape is not None}
    depths = sorted(factors, reverse=True)
    if depths != [*reversed(range(len(shapes)))]:
        raise InputError(
            f"{printable(module)!r} has factors in wrappers {sorted(factors)}, expected one for each of its parameters "
            f"{', '.join(sorted(shapes))}",
            where=where,
            hint="the file is incomplete, or target_parameters is that of another adapter",
        )
    fitting = [
        dict(zip(depths, chosen, strict=True))
        for chosen in permutations(shapes, len(depths))
        if all(fits(*factors[depth], shapes[name]) for depth, name in zip(depths, chosen, strict=True))
    ]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        known = [name for name in order() or () if name in shapes]
        if len(known) == len(depths) and (chosen := dict(zip(depths, known, strict=True))) in fitting:
            return chosen
        raise InputError(
            f"the factors of {printable(module)!r} fit {len(fitting)} assignments to {', '.join(sorted(shapes))}",
            where=where,
            hint="install distmerge[transformers], which knows the order in which the model registers them",
        )
    raise InputError(
        f"the factors of {printable(module)!r} fit none of its parameters {', '.join(sorted(candidates))}",
        where=where,
        hint="the adapter was trained on another base",
    )


def fits(a: Shape, b: Shape, shape: Shape) -> bool:
    """True if lora_A (E * r, .) and lora_B (., r * E) make a delta for a parameter of `shape`, either way round."""
    if len(a) != 2 or len(b) != 2 or len(shape) not in (2, 3):
        return False
    experts = shape[0] if len(shape) == 3 else 1
    rows, cols = shape[-2:]
    ranks = a[0] == b[1] and a[0] % experts == 0
    straight = (b[0], a[1]) == (rows, cols)
    return ranks and (straight or (len(shape) == 3 and (b[0], a[1]) == (cols, rows)))


def is_transposed(
    factors: tuple[Shape, Shape], shape: Shape, *, flagged: Callable[[], bool | None], config: PeftConfig, where: str
) -> bool:
    """True if the parameter holds its experts as (in, out): lora_A acts on dimension 1.

    The shapes tell, but for square experts. Those depend on PEFT's version, and on the model's own mark `is_transposed`
    (`flagged`; None: not known): up to 0.18 lora_A always acted on dimension 1, from 0.19.1 on only where the mark is
    set, in 0.19.0 only where it is not.
    """
    if len(shape) == 2:
        return False
    if shape[1] != shape[2]:
        a, b = factors
        return (b[0], a[1]) == (shape[2], shape[1])
    version = config.peft_version
    if version and version < (0, 19, 0):
        return True
    marked = flagged() if version else None
    if marked is None:
        raise InputError(
            f"experts of shape {shape} are square, and adapter_config.json "
            + ("does not tell peft_version" if not version else "does not tell how the model lays them out"),
            where=where,
            hint="install distmerge[transformers]" if version else "add peft_version as it was in training",
        )
    return not marked if version == (0, 19, 0) else marked


def stack_a(view: View, experts: int) -> View:
    """lora_A (E * r, in) as (E, r, in)."""
    return view.unflatten(0, experts, view.size[0] // experts)


def stack_b(view: View, experts: int, *, expert_major: bool) -> View:
    """lora_B (out, r * E) as (E, out, r); `expert_major` reads its columns expert by expert, as Unsloth writes them."""
    rank = view.size[1] // experts
    if expert_major:
        return view.unflatten(1, experts, rank).permute(1, 0, 2)
    return view.unflatten(1, rank, experts).permute(2, 0, 1)
