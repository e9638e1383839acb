"""What transformers knows about a base: its parameters, and where each lies in the checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distmerge.adapter.naming.boxes import box_of, is_partition
from distmerge.adapter.naming.slots import Slot
from distmerge.checkpoint.quantization import nested_configs
from distmerge.errors import InputError, printable
from distmerge.storage.strict_json import read_object

# Nothing that decides about names or shapes; some of it makes transformers fetch kernels or code from the Hub.
_DROPPED = {
    "auto_map",
    "quantization_config",
    "compression_config",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "use_pretrained_backbone",
    "dtype",
    "torch_dtype",
    "name_or_path",
    "_name_or_path",
}
# Whole numbers in these fields count Python objects that a configuration makes before there is a module.
_COUNTS = re.compile(r"layer|depth|block|stage|label|codebook|tower")
_MAX_COUNT = 1_000_000
_SPARE_MODULES = 10_000
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


@dataclass(frozen=True, kw_only=True)
class ModelNames:
    """The parameters of a base's class, under the names that its modules have in transformers 5.

    `shapes` is in the order of registration and holds persistent buffers too. Each group of `tied` is one parameter
    under several names, the input embedding first; there are none unless the configuration ties.
    """

    shapes: dict[str, tuple[int, ...]]
    tied: tuple[tuple[str, ...], ...]
    _tables: _Tables = field(repr=False, compare=False)

    def slots(self, parameter: str) -> tuple[Slot, ...]:
        """The tensors of the checkpoint whose boxes make up `parameter`; () if it lacks one of them, or if a tensor
        is not a box of the parameter."""
        return self._tables.slots(parameter)

    def tensors(self, parameter: str) -> tuple[str, ...]:
        """The tensors of the checkpoint that are loaded into `parameter`, whatever they hold of it."""
        return self._tables.tensors(parameter)

    @property
    def model(self) -> Any:
        """The class's instance without data, a transformers.PreTrainedModel."""
        return self._tables.model

    def find(self, path: str) -> Slot | None:
        """The box of a parameter that `path` names, in any generation: of modules, of checkpoints old and new, with
        or without the prefix of the base model. The `name` of the result is a key of `shapes`."""
        return self._tables.find(path)

    def is_transposed(self, module: str) -> bool:
        """True if the class says that the weights of `module` are stored (experts, in, out)."""
        return self._tables.is_transposed(module)


def read_names(
    folder: Path, disk: Mapping[str, tuple[int, ...]], *, config: dict[str, Any] | None = None
) -> ModelNames | str:
    """The names of the base in `folder`, whose checkpoint has the tensors `disk`: dense shapes by name. `config` takes
    the place of its config.json.

    Where they cannot be known, says why: transformers is not installed, or has no such architecture. Reads
    config.json and nothing else, builds the class without data, and never runs code that is not transformers' own.
    """
    try:
        import transformers
    except ImportError as error:
        missing = error.name == "transformers"
        return "transformers is not installed" if missing else f"transformers cannot be imported: {error}"
    try:
        import transformers.core_model_loading
    except ImportError:
        return f"transformers {transformers.__version__} has no conversion tables; version 5 has"
    try:
        config = read_object(folder / "config.json") if config is None else config
    except (InputError, OSError):
        return "config.json is missing or malformed"
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures or not isinstance(architectures[0], str):
        return "config.json names no architecture"
    try:
        with _quiet():
            model = _build(architectures[0], config, limit=10 * len(disk) + _SPARE_MODULES)
            return _names(model, disk)
    except Exception as error:  # a strange config makes transformers raise anything
        reason = printable(str(error).split("\n", 1)[0]) or type(error).__name__
        return f"transformers {transformers.__version__} has no names for {printable(architectures[0])!r}: {reason}"


def _build(architecture: str, config: dict[str, Any], limit: int) -> Any:
    """The model of class `architecture`, without data. Raises whatever transformers raises, or ValueError."""
    import torch
    import transformers

    kind: Any = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError("there is no such class")
    config = _harmless(config)
    for part in nested_configs(config):
        _check_fields(part)
    # A class may be shared by configurations of other names (Kimi-K2 is a DeepSeek-V3); its own decides.
    config.pop("model_type", None)
    with _at_most(limit), torch.device("meta"):
        own: Any = kind.config_class
        return kind(own.from_dict(config))


def _check_fields(config: dict[str, Any]) -> None:
    for key, value in config.items():
        counts = [number for number in (value if isinstance(value, list) else [value]) if isinstance(number, int)]
        if _COUNTS.search(key) and max(counts, default=0) > _MAX_COUNT:
            raise ValueError(f"config.json has {key} {max(counts)}")
    if ":" in str(config.get("architecture", "")):  # timm would ask the Hub for it
        raise ValueError("config.json names an architecture that is not local")


def _harmless(value: Any) -> Any:
    """`value` from a config.json without the fields that could make transformers load more than its own code, and
    with the numbers that JSON lacks."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in _FLOATS:
            return _FLOATS[value["__float__"]]
        return {key: _harmless(inner) for key, inner in value.items() if key not in _DROPPED}
    return [_harmless(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _at_most(limit: int) -> Iterator[None]:
    """Raises ValueError in the body when more than `limit` modules and parameters are made."""
    from torch.nn.modules import module as registry

    count = 0

    def made(owner: Any, name: str, value: Any) -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise ValueError("config.json describes far more modules than there are tensors")

    hooks = [
        registry.register_module_module_registration_hook(made),
        registry.register_module_parameter_registration_hook(made),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from talking about a model that nobody will run."""
    from transformers.utils import logging as voice

    before = voice.get_verbosity()
    voice.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        voice.set_verbosity(before)


def _names(model: Any, disk: Mapping[str, tuple[int, ...]]) -> ModelNames:
    tied: dict[str, list[str]] = {}
    for name, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, [source]).append(name)
    tables = _Tables(model, disk)
    return ModelNames(shapes=tables.shapes, tied=tuple(map(tuple, tied.values())), _tables=tables)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where loading puts a tensor: into `parameter` as it is, or through `converter`, to which it is `piece`."""

    parameter: str
    converter: Any = None
    piece: str = ""


class _Tables:
    """The conversions of a model's class, and which parameter each tensor of a checkpoint is loaded into."""

    def __init__(self, model: Any, disk: Mapping[str, tuple[int, ...]]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key

        self.shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        self.model, self._disk = model, disk
        self._prefix = f"{model.base_model_prefix}."
        transforms = get_model_conversion_mapping(model)
        self._converters = [one for one in transforms if isinstance(one, WeightConverter)]
        self._renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
        self._boxes: dict[tuple[str, int], dict[str, Slot]] = {}
        # In the order of loading: some renamings only begin with a tensor that just old checkpoints have.
        places = {name: self._place(name) for name in sorted(disk, key=dot_natural_key)}
        self._places = {name: place for name, place in places.items() if place is not None}
        self._tensors: dict[str, list[str]] = {}
        for name, place in self._places.items():
            self._tensors.setdefault(place.parameter, []).append(name)
        for parameter, (name, *others) in self._tensors.items():
            whole = not others and self._places[name].converter is None
            if whole and len(disk[name]) == len(self.shapes[parameter]):
                self.shapes[parameter] = disk[name]  # config.json may not know of a resized vocabulary

    def slots(self, parameter: str) -> tuple[Slot, ...]:
        found = self._tensors.get(parameter, [])
        slots = [slot for name in found if (slot := self._slot(name, self._places[name]))]
        if not slots or len(slots) < len(found) or not is_partition(self.shapes[parameter], slots):
            return ()
        return tuple(slots)

    def tensors(self, parameter: str) -> tuple[str, ...]:
        return tuple(self._tensors.get(parameter, []))

    def find(self, path: str) -> Slot | None:
        place = _Place(parameter=path) if path in self.shapes else self._places.get(path)
        # What a name means to renamings that begin with another tensor, one path alone does not tell.
        if place is None and not any(_waits(one) and one.compiled_sources.search(path) for one in self._renamings):
            place = self._place(path)
        return self._box(place) if place else None

    def is_transposed(self, module: str) -> bool:
        try:
            return getattr(self.model.get_submodule(module), "is_transposed", False) is True
        except AttributeError:
            return False

    def _place(self, name: str) -> _Place | None:
        moved = name
        for renaming in self._renamings:
            moved, _ = renaming.rename_source_key(moved)
        target, used = moved, None
        for converter in self._converters:
            target, pattern = converter.rename_source_key(moved)
            if pattern is not None:
                used = converter
                break
        parameter = self._prefixed(target)
        if parameter not in self.shapes:
            return _Place(parameter=name) if name in self.shapes else None
        if used is None:
            return _Place(parameter=parameter)
        added = parameter.removesuffix(target)
        piece = f"{added}{moved}" if parameter.endswith(target) else moved.removeprefix(self._prefix)
        return _Place(parameter=parameter, converter=used, piece=piece)

    def _prefixed(self, target: str) -> str:
        """`target` with the prefix of the base model added or taken away, where that makes it a parameter."""
        stripped, added = target.removeprefix(self._prefix), f"{self._prefix}{target}"
        if stripped in self.shapes:
            return stripped
        return added if added in self.shapes else target

    def _box(self, place: _Place) -> Slot | None:
        """The part of its parameter that `place` is, as a slot named by the parameter."""
        if place.converter is None:
            return Slot.whole(place.parameter, self.shapes[place.parameter])
        key = (place.parameter, id(place.converter))
        if key not in self._boxes:
            self._boxes[key] = _boxes(self.model, place.converter, place.parameter, self.shapes[place.parameter])
        return self._boxes[key].get(place.piece)

    def _slot(self, name: str, place: _Place) -> Slot | None:
        """The part of its parameter that the tensor `name` of the checkpoint holds; None if it does not fit."""
        box = self._box(place)
        if box is None or box.shape == self._disk[name]:
            return replace(box, name=name) if box else None
        for operation in place.converter.operations if place.converter else ():
            # Loading transposes a tensor that does not fit as it is; the class cannot know, the checkpoint does.
            if getattr(operation, "check_dims", False) and max(operation.dim0, operation.dim1) < len(box.order):
                order = list(box.order)
                order[operation.dim0], order[operation.dim1] = order[operation.dim1], order[operation.dim0]
                box = replace(box, name=name, order=tuple(order))
                return box if box.shape == self._disk[name] else None
        return None


def _waits(renaming: Any) -> bool:
    return hasattr(renaming, "_active")


def _boxes(model: Any, converter: Any, parameter: str, shape: tuple[int, ...]) -> dict[str, Slot]:
    """The part of `parameter` that each tensor is which `converter` makes it from, by the tensor's name; nothing if
    one of them is not a box of the parameter.

    The converter is run backwards on a tensor without data: what it returns are views, whose strides tell.
    """
    import torch
    from torch.overrides import TorchFunctionMode
    from transformers.core_model_loading import revert_weight_conversion

    class NoCopies(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            copies = func in (torch.Tensor.contiguous, torch.Tensor.clone, torch.clone)
            return args[0] if copies else func(*args, **(kwargs or {}))

    whole = torch.empty(shape, device="meta")
    model._weight_conversions = [converter]
    try:
        with NoCopies():
            parts = revert_weight_conversion(model, {parameter: whole})
    except Exception:  # an operation that needs other parameters too
        return {}
    boxes = {}
    for name, part in parts.items():
        if part.untyped_storage()._cdata != whole.untyped_storage()._cdata:
            return {}  # a copy: joined with others, or rearranged beyond strides
        box = box_of(parameter, shape, part.storage_offset(), tuple(part.shape), part.stride())
        if box is None:
            return {}
        boxes[name] = box
    return boxes
