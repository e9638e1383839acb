"""Models for evaluation, loaded whole or with a part of them on the disk. The only door to PEFT and accelerate.

Nothing is fetched, and no code but transformers' own is run.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmerge.errors import InputError, MachineError, UsageError, listing, printable

_WEIGHTS = "adapter_model.safetensors"
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """How models are loaded: floats as `dtype`, on `device`, within `memory_budget` bytes of weights; what does not fit
    is read from `offload`, a folder, whenever it is needed."""

    dtype: torch.dtype
    device: torch.device
    memory_budget: int
    offload: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A causal language model: `logits` takes token numbers (batch, n) and gives (batch, n, vocab_size)."""

    logits: Callable[[Tensor], Tensor]
    vocab_size: int
    is_offloaded: bool


def check_installed() -> None:
    """Raises UsageError where a package that evaluation needs is not installed."""
    missing = []
    for name in ("transformers", "peft", "accelerate"):
        with silence():
            try:
                __import__(name)
            except ImportError:
                missing.append(name)
    if missing:
        raise UsageError(
            f"{listing(missing)} not installed", where="evaluate", hint="pip install 'distmerge[evaluate]'"
        )


def load_encoder(folder: Path) -> Callable[[str], list[int]]:
    """The tokenizer in `folder`, special tokens included. Raises InputError where there is none that can be loaded."""
    from transformers import AutoTokenizer

    with silence():
        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, **_LOCAL)
        except Exception as error:  # a stranger's file in a stranger's code: whatever it raises, the file is at fault
            raise _cannot(folder, "tokenizer", error) from None

    def encode(text: str) -> list[int]:
        with silence():
            numbers: list[int] = tokenizer(text)["input_ids"]
        return numbers

    return encode


@contextlib.contextmanager
def merged_model(folder: Path, loading: Loading) -> Iterator[Model]:
    """The model in `folder`, for the body."""
    with silence():
        model = _load(folder, loading)
    yield _model(model, loading)
    del model
    gc.collect()


@contextlib.contextmanager
def unmerged_model(
    base: Path, adapters: Sequence[tuple[Path, float]], vocab_size: int, loading: Loading
) -> Iterator[Model]:
    """The model in `base` with `adapters`, each with its weight, beside its weights, for the body. `vocab_size` is that
    of the merged model, which the embedding is resized to as it was for training.

    Raises InputError for an adapter that PEFT does not load whole, or cannot weigh.
    """
    with silence():
        model = _load(base, loading)
        table = model.get_input_embeddings().weight
        if table.shape[0] < vocab_size:
            model.resize_token_embeddings(vocab_size, mean_resizing=False)
        model = _with_adapters(model, adapters)
    yield _model(model, loading)
    del model
    gc.collect()


def _load(folder: Path, loading: Loading) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": loading.dtype, **_LOCAL}
    where = "cpu" if loading.device.type == "cpu" else 0
    if weights_nbytes(folder, loading.dtype) > loading.memory_budget:
        memory = {where: loading.memory_budget} | ({"cpu": loading.memory_budget} if where == 0 else {})
        options |= {"device_map": "auto", "max_memory": memory, "offload_folder": str(loading.offload)}
    elif where == 0:
        options |= {"device_map": {"": 0}}
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise MachineError("out of memory", where=str(folder), hint="a smaller --memory-budget") from error
    except Exception as error:  # a stranger's configuration: whatever transformers raises, it is at fault
        raise _cannot(folder, "model", error) from None
    return model.eval()


def weights_nbytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the weights in `folder` as `dtype`."""
    from distmerge.checkpoint.base import read_base

    return sum(stored.numel for stored in read_base(folder).tensors.values()) * dtype.itemsize


def _with_adapters(model: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    import peft

    offloaded = _is_offloaded(model)
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, (folder, _) in zip(names, adapters, strict=True):
        if not (folder / _WEIGHTS).is_file():
            raise InputError(
                f"holds no {_WEIGHTS}", where=str(folder), hint="evaluate takes adapters as PEFT saves them"
            )
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
        except Exception as error:  # as above
            raise _cannot(folder, "adapter", error) from None
        config.inference_mode = True
        if isinstance(getattr(config, "init_lora_weights", True), str):
            config.init_lora_weights = True  # or PEFT would change the base once more
        if offloaded and (config.peft_type != "LORA" or config.use_dora):
            raise InputError(
                "needs the weights that it changes in memory, and these are on the disk",
                where=str(folder),
                hint="a larger --memory-budget",
            )
        # Layers that are used twice share weights, which PEFT cannot do while it makes empty ones.
        empty = offloaded or not getattr(config, "layer_replication", None)
        try:
            if model.__class__.__name__.startswith("PeftModel"):
                config.layer_replication = None  # the first adapter's has made the layers
                model.add_adapter(name, config, low_cpu_mem_usage=empty)
            else:
                model = peft.get_peft_model(model, config, adapter_name=name, low_cpu_mem_usage=empty)
        except Exception as error:  # as above
            raise _cannot(folder, "adapter", error) from None
        _fill(model, folder, name)
    if len(names) > 1:
        model.base_model.set_adapter(names)
    for name, (folder, weight) in zip(names, adapters, strict=True):
        if weight != 1:
            _weigh(model, name, weight, folder)
    return model.eval()


def _fill(model: Any, folder: Path, name: str) -> None:
    """Gives the tensors of an adapter to the parameters that PEFT has made for it."""
    from accelerate.hooks import remove_hook_from_module  # type: ignore[import-untyped]
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    for path, module in model.named_modules():
        if f".modules_to_save.{name}" in path:
            remove_hook_from_module(module)  # it would bring back the base's own weights
    weights = load_peft_weights(str(folder), device="cpu")
    loaded: Any = set_peft_model_state_dict(model, weights, adapter_name=name, low_cpu_mem_usage=True)
    if unexpected := list(loaded.unexpected_keys):
        raise InputError(
            f"PEFT has no place for {len(unexpected)} of its tensors: {listing(unexpected)}", where=str(folder)
        )
    # Where the base lies on the disk PEFT moves what it has loaded there too, which is nowhere.
    own = {k: p for k, p in model.named_parameters() if f".{name}" in k and p.device.type == "meta"}
    short = {key.replace(".modules_to_save", "").replace(f".{name}", ""): key for key in own}
    dtypes = {key: parameter.dtype for key, parameter in own.items()}
    filled = {short[key]: tensor.to(dtypes[short[key]]) for key, tensor in weights.items() if key in short}
    # What the adapter's file does not hold was not trained: a product that is zero.
    filled |= {key: torch.zeros(own[key].shape, dtype=dtypes[key]) for key in own if key not in filled}
    model.load_state_dict(filled, strict=False, assign=True)


def _weigh(model: Any, name: str, weight: float, folder: Path) -> None:
    """Multiplies what an adapter adds with `weight`."""
    scalings = [getattr(module, "scaling", None) for module in model.modules()]
    scaled = [scaling for scaling in scalings if isinstance(scaling, dict) and name in scaling]
    others = [k for k, _ in model.named_parameters() if f".{name}" in k and "lora_" not in k]
    if not scaled or others or model.peft_config[name].use_dora:
        raise InputError(
            f"is no plain LoRA, so that PEFT cannot apply it with weight {weight:g}",
            where=str(folder),
            hint="evaluate what was merged with weight 1",
        )
    for scaling in scaled:
        scaling[name] *= weight


def _model(model: Any, loading: Loading) -> Model:
    def logits(tokens: Tensor) -> Tensor:
        with torch.inference_mode(), silence():
            found: Tensor = model(input_ids=tokens.to(loading.device), use_cache=False).logits
        return found.float().cpu()

    size = int(model.get_input_embeddings().weight.shape[0])
    return Model(logits=logits, vocab_size=size, is_offloaded=_is_offloaded(model))


def _is_offloaded(model: Any) -> bool:
    return bool({"cpu", "disk"} & {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()})


def _cannot(folder: Path, what: str, error: Exception) -> InputError:
    told = printable(" ".join(str(error).split()), 200)
    hint = "code that comes with a model is never run" if "trust_remote_code" in told else ""
    return InputError(
        f"holds no {what} that can be loaded ({type(error).__name__}: {told})", where=str(folder), hint=hint
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """In the body, the libraries say nothing: errors arrive as such."""
    import os

    before = {name: os.environ.get(name) for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    os.environ.update(dict.fromkeys(before, "1"))
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
