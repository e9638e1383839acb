"""`distmerge evaluate` in order: check, tokens, the merged model's logits, the unmerged one's, how far they differ."""

from __future__ import annotations

import math
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from distmerge.audit.inputs import check_same_inputs, config_of
from distmerge.checkpoint.base import RECEIPT, Base, read_base
from distmerge.config import AdapterChoice, MergeConfig
from distmerge.errors import InputError, Interrupted, MachineError, UsageError, VerifyError
from distmerge.evaluation.models import (
    Loading,
    Model,
    check_installed,
    load_encoder,
    merged_model,
    unmerged_model,
)
from distmerge.evaluation.reference import dense_base, dense_nbytes
from distmerge.evaluation.text import cut_windows, read_documents
from distmerge.numerics.divergence import Divergence, divergence
from distmerge.plan import make_plan
from distmerge.progress import Counter, Display, gigabytes
from distmerge.receipt import Receipt, read_receipt
from distmerge.simulate import trained_base
from distmerge.storage.files import free_nbytes
from distmerge.world import device_type

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EQUAL_KL, EQUAL_AGREEMENT = 1e-3, 0.98  # what the verdict calls equal where no --max-kl says it
_BATCH_SHARE = 8  # of the memory budget, for the logits of one batch
_CHUNK = 32  # positions that are compared at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How an evaluation is done: windows of `context` tokens, at most `max_tokens` of them predicted, floats as `dtype`
    on `device`, `memory_budget` bytes of weights in memory at once, temporary files in `scratch`, and the largest mean
    KL that passes, in nats."""

    max_tokens: int | None = 4096
    context: int = 512
    dtype: str = "float32"
    device: str = "cpu"
    memory_budget: int = 8 << 30
    scratch: Path | None = None
    max_kl: float | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UsageError(f"max-tokens {self.max_tokens} is not a positive number")
        if self.context < 2:
            raise UsageError(f"context {self.context} is less than 2: nothing would be predicted")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.max_kl is not None and not 0 <= self.max_kl < math.inf:
            raise UsageError(f"max-kl {self.max_kl} is not a number from 0 on")
        if self.memory_budget < 1:
            raise UsageError(f"memory-budget {self.memory_budget} is not a size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A merged model against the unmerged one, over `num_tokens` predicted tokens: the perplexities, KL(unmerged ||
    merged) in nats, its mean and the largest of a token, and the share of tokens whose most likely successor is the
    same. `is_equal` is the verdict."""

    num_tokens: int
    num_windows: int
    merged_perplexity: float
    unmerged_perplexity: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    dtype: str
    is_equal: bool
    was_offloaded: bool


def evaluate(
    output: Path, *, base: Path, adapters: tuple[AdapterChoice, ...], text: Path, choice: Choice, display: Display
) -> Evaluation:
    """Compares `output` with `base` and `adapters` that are not merged, on the tokens of `text`.

    Raises InputError for inputs that are not those of the merge, or that PEFT does not load as they were merged, and
    for a text without tokens; VerifyError where the mean KL exceeds `choice.max_kl`; MachineError without room.
    """
    check_installed()
    documents = read_documents(text)
    receipt = read_receipt(output) if output.is_dir() else None
    if receipt is None:
        raise InputError(f"holds no {RECEIPT}", where=str(output), hint="evaluate takes the output of a merge")
    _check_options(receipt, output)
    config = config_of(receipt, output, base, adapters, device="cpu")
    check_same_inputs(make_plan(config, "cpu"), receipt)
    encode = load_encoder(output)
    windows = cut_windows(documents, encode, context=choice.context, max_tokens=choice.max_tokens, where=str(text))
    with _interruptible(), tempfile.TemporaryDirectory(prefix="distmerge-evaluate-", dir=choice.scratch) as scratch:
        found, offloaded = _compare(output, config, windows, choice=choice, scratch=Path(scratch), display=display)
    result = _result(found, len(windows), choice, offloaded=offloaded)
    if choice.max_kl is not None and not result.mean_kl <= choice.max_kl:
        raise VerifyError(
            f"merged differs from unmerged: mean KL {result.mean_kl:.3g}, more than {choice.max_kl:.3g}; top-1 "
            f"{100 * result.top1_agreement:.2f} %",
            where=str(output),
            hint="distmerge verify with the same inputs says which tensors are wrong",
        )
    return result


def _check_options(receipt: Receipt, output: Path) -> None:
    """Raises InputError where PEFT cannot hold beside the base what was merged into it."""
    options = receipt.options
    told = {
        "--combine": options.combine != "sum",
        "--lora-alpha": options.lora_alpha is not None,
        "--use-rslora": options.use_rslora is not None,
        "--map": bool(options.map),
        "--allow-pickle": options.allow_pickle,
    }
    depth = "probe compares its layers with the adapter beside them"
    if told["--combine"]:  # what was combined is no product of factors, and is not probed
        depth = "full recomputes every tensor that the merge has changed"
    if names := [name for name, given in told.items() if given]:
        raise InputError(
            f"was merged with {' and '.join(names)}: there is no unmerged model with which PEFT would compute the same",
            where=str(output),
            hint=f"distmerge verify --depth {depth}",
        )


def _compare(
    output: Path, config: MergeConfig, windows: list[list[int]], *, choice: Choice, scratch: Path, display: Display
) -> tuple[Divergence, bool]:
    kind = device_type(choice.device)
    device = torch.device(kind) if kind == "cpu" else torch.device(kind, 0)
    base, merged = trained_base(read_base(config.base), config), read_base(output)
    loading = Loading(
        dtype=DTYPES[choice.dtype], device=device, memory_budget=choice.memory_budget, offload=scratch / "offload"
    )
    num_positions = sum(len(window) - 1 for window in windows)
    with display.counting("scoring", 2 * num_positions, "tokens") as counter:
        _check_room(scratch, dense_nbytes(merged))
        with merged_model(_dense(merged, scratch / "merged", choice), loading) as model:
            if (top := max(max(window) for window in windows)) >= model.vocab_size:
                what = f"the tokenizer gives token {top}, the model has {model.vocab_size}"
                raise InputError(what, where=str(output))
            vocab_size, offloaded = model.vocab_size, model.is_offloaded
            # float32: an error of 2^-11 of a logit, as float16 has it, would be more than the KL that is looked for.
            nbytes = 4 * num_positions * vocab_size
            _check_room(scratch, nbytes + dense_nbytes(base))
            kept = torch.from_file(str(scratch / "logits"), shared=True, size=num_positions * vocab_size)
            logits = kept.view(num_positions, vocab_size)
            counter.doing = "merged"
            for place, found in _logits(model, windows, choice, counter):
                logits[place : place + len(found)] = found
        shutil.rmtree(scratch / "merged", ignore_errors=True)
        folder = _dense(base, scratch / "base", choice)
        adapters = [(adapter.folder, adapter.weight) for adapter in config.all_adapters]
        total = Divergence()
        with unmerged_model(folder, adapters, vocab_size, loading) as model:
            offloaded |= model.is_offloaded
            counter.doing = "unmerged"
            targets = torch.tensor([token for window in windows for token in window[1:]])
            for place, found in _logits(model, windows, choice, counter):
                for begin in range(0, len(found), _CHUNK):
                    end = min(begin + _CHUNK, len(found))
                    there = slice(place + begin, place + end)
                    total += divergence(found[begin:end, :vocab_size], logits[there], targets[there])
    return total, offloaded


def _dense(model: Base, folder: Path, choice: Choice) -> Path:
    return dense_base(model, folder, memory_budget=choice.memory_budget)


def _logits(
    model: Model, windows: list[list[int]], choice: Choice, counter: Counter
) -> Iterator[tuple[int, torch.Tensor]]:
    """The logits of every predicted token, in pieces, with the number of the first token of each piece."""
    longest = 4 * max(len(window) for window in windows) * model.vocab_size
    size = max(1, choice.memory_budget // _BATCH_SHARE // longest)
    place = 0
    for begin in range(0, len(windows), size):
        batch = windows[begin : begin + size]
        width = max(len(window) for window in batch)
        # What follows a window changes nothing in it: a causal model looks back only.
        tokens = torch.tensor([window + [window[-1]] * (width - len(window)) for window in batch])
        found = model.logits(tokens)
        for row, window in enumerate(batch):
            yield place, found[row, : len(window) - 1]
            place += len(window) - 1
            counter.add(len(window) - 1)


def _check_room(folder: Path, nbytes: int) -> None:
    if (free := free_nbytes(folder)) < nbytes:
        raise MachineError(
            f"{gigabytes(nbytes)} are needed for temporary files, {gigabytes(free)} are free",
            where=str(folder.parent),
            hint="--scratch names another folder; --max-tokens takes less",
        )


def _result(found: Divergence, num_windows: int, choice: Choice, *, offloaded: bool) -> Evaluation:
    mean_kl = found.kl / found.num_tokens
    agreement = found.num_agreeing / found.num_tokens
    return Evaluation(
        num_tokens=found.num_tokens,
        num_windows=num_windows,
        merged_perplexity=_exp(found.other_nll / found.num_tokens),
        unmerged_perplexity=_exp(found.reference_nll / found.num_tokens),
        mean_kl=mean_kl,
        max_kl=found.max_kl,
        top1_agreement=agreement,
        dtype=choice.dtype,
        is_equal=mean_kl <= EQUAL_KL and agreement >= EQUAL_AGREEMENT if choice.max_kl is None else True,
        was_offloaded=offloaded,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@contextmanager
def _interruptible() -> Iterator[None]:
    """In the body, being asked to end raises Interrupted, so that temporary files go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted("interrupted", hint="temporary files are gone; the same command starts over")

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
