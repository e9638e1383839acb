"""What a merge is asked to do: one frozen record, from options, variables and a YAML recipe."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from distmerge.errors import UsageError, printable, shown
from distmerge.redaction import redacted

DTYPES = {"auto": None, "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DEFAULT_SHARD_NBYTES = 5_000_000_000
EXPERT_B_ORDERS = ("auto", "peft", "expert-major")
QUANTIZE = ("none", "nf4", "fp4")
QUANTIZE_MODES = ("plain", "fitted")
COMBINE = ("sum", "ties", "dare_ties", "dare_linear", "magnitude_prune")
DIGESTS = ("sha256", "crc32", "xxh3", "none")
SIMULATE_QUANT = ("none", "nf4", "fp4")
QUANT_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
LISTS = ("adapter", "weight", "initial_adapter", "map", "quant_skip")  # options that may be given several times
_KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoice:
    """An adapter folder and the weight that its deltas are multiplied with."""

    folder: Path
    weight: float = 1.0
    initial: Path | None = None
    """The adapter as it was before training, for initialisations that changed the base."""

    @property
    def home(self) -> Path:
        """The folder that its files are named in: its own, or that of the single file."""
        return self.folder.parent if self.folder.is_file() else self.folder


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeConfig:
    """Every choice of a merge; what it does not name is decided from the files."""

    base: Path
    """Folder of the checkpoint that is merged into."""
    adapters: tuple[AdapterChoice, ...]
    """Adapters, combined in float32 in this order."""
    output: Path
    """Folder of the merged checkpoint; it appears whole or not at all."""
    nproc: int | None = None
    """Ranks on this machine; None: one for each accelerator, or one on the CPU. Ignored under torchrun."""
    device: str = "auto"
    """`auto`, `cpu`, or an accelerator type such as `cuda`."""
    dtype: str = "auto"
    """Floats of the output: `auto` keeps each tensor's own (packed ones: the recorded one, or that of config.json)."""
    quantize: str = "none"
    """Packs the output's linears in `nf4` or `fp4`, as bitsandbytes does; `none` leaves every tensor in floats."""
    quantize_mode: str = "plain"
    """`plain`: bitsandbytes' own packing of the merged weights; `fitted`: scales searched to make the error small."""
    keep_quantized: bool = False
    """Leave packed tensors that nothing changes packed, byte for byte, instead of dequantizing all of them."""
    max_shard_size: int | None = None
    """Largest output shard in bytes; None: a plain base keeps its own shards, a packed one gets 5 GB."""
    memory_budget: int = 2 << 30
    """Bytes of working memory for each rank, beside what importing torch takes."""
    combine: str = "sum"
    """How the adapters' deltas become one: `sum`, `ties`, `dare_ties`, `dare_linear` or `magnitude_prune`."""
    density: float | None = None
    """Share of each delta's elements that is kept, for every way but the sum."""
    seed: int = 0
    """What chance goes by in `dare_ties` and `dare_linear`."""
    simulate_quant: str = "none"
    """What a 16-bit base is rounded through first, `nf4` or `fp4`: the form that a QLoRA was trained on."""
    quant_blocksize: int = 64
    """Elements of a 4-bit block that share a scale; this and the other `quant_*` hold for `simulate_quant` and for
    `quantize`, so that both have the same."""
    quant_double: bool = True
    """Whether the scales themselves are in 8 bits (double quantization)."""
    quant_compute_dtype: str = "auto"
    """What training rounded the unpacked weights to: `auto` is each tensor's own dtype."""
    quant_skip: tuple[str, ...] = ()
    """Modules that are not packed, by name, end of a name or pattern; they replace the default: the head and what is
    tied."""
    lora_alpha: float | None = None
    """Replaces `lora_alpha` of every adapter's configuration."""
    use_rslora: bool | None = None
    """Replaces `use_rslora` of every adapter's configuration."""
    map: tuple[str, ...] = ()
    """Rules `REGEX=>REPLACEMENT` for the adapters' parameter names, applied in this order."""
    expert_b_order: str = "auto"
    """Order of the columns of experts' lora_B: `peft`, `expert-major` (Unsloth's kernels), or `auto`: PEFT's, refused
    where that is in doubt."""
    allow_pickle: bool = False
    """Read adapters that are pickles, in a process of their own that can only make tensors."""
    allow_zero_delta: bool = False
    """Merge even if every delta is zero."""
    overwrite: bool = False
    """Replace an output folder that an earlier merge wrote."""
    digest: str = "sha256"
    """What is computed of each weight file: `sha256` or `xxh3` of what is read back, `crc32` of what was written, or
    `none`."""
    hash_inputs: bool = False
    """Record the SHA-256 of every file of base and adapters; one that the Hub has another of is refused."""
    read_back: bool = False
    """Read every weight file back from storage, not from the page cache, before it gets its name."""
    run_log: Path | None = None
    """File that gets a line of JSON for each rank: what it did and when."""
    profile: bool = False
    """Say at the end where the time of each rank went."""
    timeout: float = 600.0
    """Seconds without a sign of life after which a rank counts as lost."""

    def __post_init__(self) -> None:
        if not self.adapters:
            raise UsageError("no adapter is given", hint="--adapter FOLDER")
        for adapter in self.adapters:
            if not math.isfinite(adapter.weight) or adapter.weight == 0:
                raise UsageError(f"weight {adapter.weight} of {adapter.folder} is not a finite number other than 0")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is none of {', '.join(DTYPES)}")
        if self.expert_b_order not in EXPERT_B_ORDERS:
            raise UsageError(f"expert-b-order {self.expert_b_order!r} is none of {', '.join(EXPERT_B_ORDERS)}")
        self._check_places()
        self._check_digest()
        self._check_quantize()
        self._check_combine()
        self._check_quant()
        if self.nproc is not None and self.nproc < 1:
            raise UsageError(f"nproc {self.nproc} is not a positive number")
        if not 5 <= self.timeout <= 1e9:  # more overflows the clock of the store
            raise UsageError(f"timeout {self.timeout} is not a number of seconds from 5 to 1e9")
        for name, nbytes in (("memory-budget", self.memory_budget), ("max-shard-size", self.max_shard_size)):
            if nbytes is not None and not 0 < nbytes < 1 << 63:
                raise UsageError(f"{name} {nbytes} is not a size")
        if self.lora_alpha is not None and (not math.isfinite(self.lora_alpha) or self.lora_alpha == 0):
            raise UsageError(f"lora-alpha {self.lora_alpha} is not a finite number other than 0")

    def _check_places(self) -> None:
        places = [("base", self.base), ("output", self.output), *(("adapter", a.folder) for a in self.adapters)]
        for name, place in [*places, *(("initial-adapter", a.initial) for a in self.adapters if a.initial)]:
            if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(place)):  # what is left of `://` in a path
                raise UsageError(
                    f"{name} is a URL, {redacted(printable(str(place)))}, and not a folder",
                    hint="download it first: hf download NAME --local-dir FOLDER",
                )

    def _check_digest(self) -> None:
        if self.digest not in DIGESTS:
            raise UsageError(f"digest {self.digest!r} is none of {', '.join(DIGESTS)}")
        if self.read_back and self.digest == "none":
            raise UsageError("read-back is given, but no digest to compare with", hint="--digest crc32")

    def _check_quantize(self) -> None:
        if self.quantize not in QUANTIZE:
            raise UsageError(f"quantize {self.quantize!r} is none of {', '.join(QUANTIZE)}")
        if self.quantize_mode not in QUANTIZE_MODES:
            raise UsageError(f"quantize-mode {self.quantize_mode!r} is none of {', '.join(QUANTIZE_MODES)}")
        if self.quantize == "none" and self.quantize_mode != "plain":
            raise UsageError("quantize-mode is given, but nothing is packed", hint="--quantize nf4")
        if self.quantize != "none" and self.keep_quantized:
            raise UsageError("keep-quantized and quantize exclude each other", hint="--quantize packs all linears anew")

    def _check_combine(self) -> None:
        if self.combine not in COMBINE:
            raise UsageError(f"combine {self.combine!r} is none of {', '.join(COMBINE)}")
        if self.combine == "sum" and self.density is not None:
            raise UsageError(f"density {self.density} is given, but a sum keeps everything", hint="--combine ties")
        if self.combine != "sum" and self.density is None:
            raise UsageError(f"combine {self.combine!r} needs a density", hint="--density 0.5 keeps half of each delta")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"density {self.density} is not a number above 0 and up to 1")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"seed {self.seed} is not a whole number from 0 on")
        if self.seed and not self.combine.startswith("dare"):
            raise UsageError(f"seed {self.seed} is given, but {self.combine!r} leaves nothing to chance")

    def _check_quant(self) -> None:
        if self.simulate_quant not in SIMULATE_QUANT:
            raise UsageError(f"simulate-quant {self.simulate_quant!r} is none of {', '.join(SIMULATE_QUANT)}")
        if self.quant_blocksize not in QUANT_BLOCKSIZES:
            sizes = ", ".join(map(str, QUANT_BLOCKSIZES))
            raise UsageError(f"quant-blocksize {self.quant_blocksize} is none of {sizes}")
        if self.quant_compute_dtype not in DTYPES:
            raise UsageError(f"quant-compute-dtype {self.quant_compute_dtype!r} is none of {', '.join(DTYPES)}")
        for pattern in self.quant_skip:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UsageError(f"quant-skip {printable(pattern)!r} is no pattern: {error}") from None
        told = {
            "quant-blocksize": self.quant_blocksize != 64,
            "no-quant-double": not self.quant_double,
            "quant-compute-dtype": self.quant_compute_dtype != "auto",
            "quant-skip": bool(self.quant_skip),
        }
        if self.simulate_quant == self.quantize == "none" and any(told.values()):
            names = " and ".join(name for name, given in told.items() if given)
            raise UsageError(
                f"{names} given, but nothing goes through 4 bits", hint="--simulate-quant nf4, or --quantize nf4"
            )

    @property
    def initials(self) -> tuple[bool, ...]:
        """For each of `all_adapters` whether it is what the one before it began as."""
        return tuple(flag for choice in self.adapters for flag in (False, True)[: 1 + (choice.initial is not None)])

    @property
    def all_adapters(self) -> tuple[AdapterChoice, ...]:
        """Every adapter folder that is read, with its weight: after each adapter the one that it began as, which is
        taken off."""
        found = []
        for choice in self.adapters:
            found.append(choice)
            if choice.initial is not None:
                found.append(AdapterChoice(folder=choice.initial, weight=-choice.weight, initial=choice.initial))
        return tuple(found)

    def to_argv(self) -> list[str]:
        """The options of `distmerge merge` that mean this configuration, without --nproc."""
        argv = ["--base", str(self.base), "--output", str(self.output)]
        for adapter in self.adapters:
            argv += ["--adapter", str(adapter.folder), "--weight", repr(adapter.weight)]
            argv += ["--initial-adapter", str(adapter.initial or "")] * any(a.initial for a in self.adapters)
        argv += ["--device", self.device, "--dtype", self.dtype, "--memory-budget", str(self.memory_budget)]
        argv += ["--timeout", repr(self.timeout), "--digest", self.digest] + ["--keep-quantized"] * self.keep_quantized
        if self.max_shard_size is not None:
            argv += ["--max-shard-size", str(self.max_shard_size)]
        argv += ["--combine", self.combine, "--seed", str(self.seed)]
        if self.density is not None:
            argv += ["--density", repr(self.density)]
        argv += ["--quantize", self.quantize, "--quantize-mode", self.quantize_mode]
        argv += ["--simulate-quant", self.simulate_quant, "--quant-blocksize", str(self.quant_blocksize)]
        argv += ["--quant-double" if self.quant_double else "--no-quant-double"]
        argv += ["--quant-compute-dtype", self.quant_compute_dtype]
        for pattern in self.quant_skip:
            argv += ["--quant-skip", pattern]
        if self.lora_alpha is not None:
            argv += ["--lora-alpha", repr(self.lora_alpha)]
        if self.use_rslora is not None:
            argv += ["--use-rslora" if self.use_rslora else "--no-use-rslora"]
        for rule in self.map:
            argv += ["--map", rule]
        argv += ["--expert-b-order", self.expert_b_order] + ["--allow-pickle"] * self.allow_pickle
        if self.run_log is not None:
            argv += ["--run-log", str(self.run_log)]
        argv += ["--profile"] * self.profile + ["--hash-inputs"] * self.hash_inputs + ["--read-back"] * self.read_back
        argv += ["--allow-zero-delta"] * self.allow_zero_delta + ["--overwrite"] * self.overwrite
        return argv


def parse_nbytes(text: str) -> int:
    """The bytes that `text` means: `5GB` is decimal, `2GiB` binary. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    number = float(match[1]) * _UNITS.get(match[2].upper(), 0) if match else 0.0
    if not 1 <= number < 1 << 63:
        raise UsageError(f"{printable(str(text), 40)!r} is not a size", hint="write it as 5GB or 2GiB")
    return int(number)


def read_recipe(path: Path, known: dict[str, tuple[type, ...]]) -> dict[str, Any]:
    """The options in the YAML file at `path`, by name with underscores; those that are null are left out.

    `known` gives the types that the value of an option, or an item of its list, may have. Raises UsageError, naming
    the key, for tags, duplicate keys, unknown keys (with the nearest known one) and values of another type.
    """
    import yaml  # --help must not pay for it

    class Loader(yaml.SafeLoader):
        """YAML without tags and without duplicate keys."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
        pairs = [(loader.construct_object(k), loader.construct_object(v, deep=True)) for k, v in node.value]
        for number, (key, _) in enumerate(pairs):
            if key in [other for other, _ in pairs[:number]]:
                raise UsageError(f"key {key!r} stands twice", where=str(path))
        return dict(pairs)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read ({error})", where=str(path)) from None
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise UsageError(f"not plain YAML ({' '.join(str(error).split())[:200]})", where=str(path)) from None
    if not isinstance(values, dict):
        raise UsageError("must be a mapping of options", where=str(path))
    recipe = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = get_close_matches(name, sorted(known), n=1, cutoff=0.5)
            hint = f"did you mean {near[0].replace('_', '-')!r}?" if near else ""
            raise UsageError(f"unknown key {printable(str(key))!r}", where=str(path), hint=hint)
        if name in recipe:
            raise UsageError(f"key {printable(str(key))!r} stands twice, in two spellings", where=str(path))
        items = value if isinstance(value, list) and name in LISTS else [value]
        if value is not None and not all(type(item) in known[name] for item in items):
            kinds = " or ".join(_KINDS[kind] for kind in known[name])
            raise UsageError(
                f"{name.replace('_', '-')} must be {kinds}, got {shown(value)}",
                where=str(path),
                hint="put names that look like numbers or dates in quotes" if str in known[name] else "",
            )
        recipe[name] = value
    return {name: value for name, value in recipe.items() if value is not None}
