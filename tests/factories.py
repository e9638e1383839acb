"""Tiny checkpoints and adapters: real files, made by the libraries that users' files come from, seeded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WORDS = [f"w{number}" for number in range(90)]  # of the tokenizer
KEY = "base_model.model.model.layers.0.self_attn.q_proj"


def build_llama(dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """A random Llama; `changes` go to its configuration."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "tie_word_embeddings": False, **changes})
    return transformers.LlamaForCausalLM(config).to(dtype)


def save_base(folder: Path, dtype: torch.dtype = torch.bfloat16, *, shard: str = "50GB", **changes: Any) -> Path:
    """A Llama checkpoint as transformers saves it; `shard="40KB"` gives several files."""
    build_llama(dtype, **changes).save_pretrained(folder, max_shard_size=shard)
    return folder


def save_packed_base(
    folder: Path,
    *,
    quant_type: str = "nf4",
    double: bool = True,
    storage: torch.dtype = torch.uint8,
    dtype: torch.dtype = torch.bfloat16,
    shard: str = "50GB",
    **changes: Any,
) -> Path:
    """A Llama checkpoint packed by bitsandbytes on the CPU and saved by transformers; `folder`-dense is its origin."""
    import transformers

    dense = folder.with_name(folder.name + "-dense")
    save_base(dense, dtype, **changes)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
        bnb_4bit_compute_dtype=dtype,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}
    )
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def save_adapter(
    folder: Path, *, r: int = 4, alpha: float = 6, seed: int = 1, scale: float = 0.1, model: Any = None, **fields: Any
) -> Path:
    """A LoRA that PEFT saved, on every linear of the Llama unless `fields` say otherwise; nothing in it is zero."""
    from peft import LoraConfig, get_peft_model

    fields = {"target_modules": list(LINEARS), **fields}
    config = LoraConfig(r=r, lora_alpha=alpha, task_type="CAUSAL_LM", **fields)
    peft_model = get_peft_model(build_llama(torch.float32) if model is None else model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    peft_model.save_pretrained(folder)
    return folder


def rewrite_adapter(folder: Path, change: Any) -> Path:
    """Saves the adapter's tensors again after `change` (a function from dict to dict, or None after changing it)."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def edit_json(path: Path, **fields: Any) -> Path:
    """Sets `fields` in the JSON object at `path`; None removes nothing, it is written as null."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return path


def load_folder(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder, by the safetensors library, through the index where there is one."""
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    return {name: tensor for file in files for name, tensor in load_file(folder / file).items()}


def hub_snapshot(folder: Path, cache: Path) -> Path:
    """The checkpoint in `folder` laid out as a Hugging Face cache: a snapshot of symlinks into blobs."""
    blobs, snapshot = cache / "models--org--name" / "blobs", cache / "models--org--name" / "snapshots" / "c0ffee"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / f"blob{number}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob{number}")
    return snapshot


def synthetic_base(folder: Path, *, layers: int, hidden: int = 2048, inner: int = 5632, dtype: str = "BF16") -> Path:
    """A bf16 checkpoint of about `layers` x 92 MB (at the defaults) with Llama's names, one layer a file."""
    folder.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    torch_dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    for layer in range(layers):
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        generator = torch.Generator().manual_seed(layer)
        tensors = {
            f"model.layers.{layer}.{name}.weight": torch.randn(shape, generator=generator).mul_(0.02).to(torch_dtype)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return folder


def synthetic_adapter(folder: Path, base: Path, *, r: int = 16) -> Path:
    """A plain LoRA on every 2-D weight of a `synthetic_base`."""
    from safetensors import safe_open

    weight_map = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = {}
    for number, (name, file) in enumerate(sorted(weight_map.items())):
        with safe_open(base / file, framework="pt") as opened:
            rows, cols = opened.get_slice(name).get_shape()
        generator = torch.Generator().manual_seed(1000 + number)
        key = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{key}.lora_A.weight"] = torch.randn(r, cols, generator=generator).mul_(0.02)
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, r, generator=generator).mul_(0.02)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(base: Path, adapters: Path | list[tuple[Path, float]], output: Path, **options: Any) -> Path:
    """Merges in this process on the CPU and returns the output folder."""
    import distmerge

    weighted = [(adapters, 1.0)] if isinstance(adapters, Path) else adapters
    choices = tuple(distmerge.AdapterChoice(folder=folder, weight=weight) for folder, weight in weighted)
    fixed: dict[str, Any] = {"nproc": 1, "device": "cpu"}
    distmerge.merge(distmerge.MergeConfig(base=base, adapters=choices, output=output, **fixed, **options))
    return output


def write_base(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A checkpoint of one file that holds `tensors`, saved by the safetensors library."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def write_adapter(folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], *, alpha: float = 6, **fields: Any) -> Path:
    """A LoRA of the pairs (lora_a, lora_b) by module, in PEFT's layout; `r` is that of the first pair."""
    tensors = {}
    for module, (lora_a, lora_b) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{module}.lora_B.weight"] = lora_b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    r = next(iter(pairs.values()))[0].shape[0]
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": sorted(pairs), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    return folder


def packed_tensors(name: str, weight: Tensor, *, blocksize: int = 64, **options: Any) -> dict[str, Tensor]:
    """`weight` packed by bitsandbytes on the CPU, as transformers lays it down: the codes and their companions.

    `options` go to `quantize_4bit`: quant_type, compress_statistics, quant_storage.
    """
    import bitsandbytes.functional

    data, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=blocksize, **options)
    return {name: data, **{f"{name}.{tail}": value for tail, value in state.as_dict(packed=True).items()}}


def repack_base(dense: Path, folder: Path, *, keep: tuple[str, ...] = ("lm_head",), **options: Any) -> Path:
    """The checkpoint in `dense` with its linears packed; `keep` are modules that stay as they are. In one file."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_folder(dense).items():
        module = name.removesuffix(".weight")
        linear = tensor.dim() == 2 and "embed" not in name and not any(module.endswith(skip) for skip in keep)
        tensors |= packed_tensors(name, tensor, **options) if linear else {name: tensor}
    config = json.loads((dense / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": list(keep)}
    return write_base(folder, tensors, **{**config, "quantization_config": quantization})


def split_files(folder: Path, files: dict[str, str]) -> Path:
    """Saves the checkpoint in `folder` again in several files: `files` gives the file of each tensor."""
    tensors = load_folder(folder)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    for file in sorted(set(files.values())):
        inside = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(inside, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def headers(folder: Path) -> dict[str, list[str]]:
    """The names of the tensors in each weight file of `folder`, read by the safetensors library."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found[path.name] = sorted(opened.keys())
    return found


def wanted(name: str, shape: tuple[int, ...], dtype: str = "BF16", *, r: int = 0) -> Any:
    """An output tensor without a place, of a plain base tensor; with `r`, one delta of that rank."""
    from distmerge.adapter.changes import LORA, Change, Region
    from distmerge.adapter.views import View
    from distmerge.checkpoint.header import ITEMSIZE, TensorSpec
    from distmerge.checkpoint.packing import Stored
    from distmerge.layout import Wanted

    def spec(name: str, dtype: str, shape: tuple[int, ...]) -> Any:
        nbytes = math.prod(shape) * ITEMSIZE[dtype]
        return TensorSpec(name=name, dtype=dtype, shape=shape, file="model.safetensors", begin=0, nbytes=nbytes)

    changes = ()
    if r:
        a, b = spec(f"{name}.A", "F32", (r, shape[-1])), spec(f"{name}.B", "F32", (shape[0], r))
        change = Change(
            adapter=0,
            operator=LORA,
            tensors={"a": View.whole(a).stacked(), "b": View.whole(b).stacked()},
            options={"scaling": 1.5},
            weight=1.0,
            shape=(1, shape[0], shape[-1]),
            region=Region(matrices=(0, 1), rows=(0, shape[0]), cols=(0, shape[-1])),
            transposed=False,
            whole=False,
        )
        changes = (change,)
    source = Stored(data=spec(name, dtype, shape), packing=None)
    kind = "merge" if r else "copy"
    return Wanted(kind=kind, name=name, source=source, origin=0, dtype=dtype, changes=changes)


def plan_of(shards: dict[str, list[Any]]) -> Any:
    """A plan of `wanted` tensors in named output files, without any file on disk."""
    from distmerge.layout import cut_segments, place
    from distmerge.plan import Plan, PlannedAdapter

    files, tasks = place(shards)
    adapter = PlannedAdapter(
        name="lora",
        tuner="LORA",
        base_model="",
        weight=1.0,
        files=("adapter_model.safetensors",),
        partial=False,
        weights_sha256="0",
        config_sha256="0",
        num_tensors=sum(2 * len(task.changes) for task in tasks),
        unused={},
        names="",
    )
    return Plan(
        base_files=(),
        fingerprint={"device": "cpu"},
        adapters=(adapter,),
        files=files,
        tasks=tasks,
        segments=cut_segments(tasks),
        side_files=(),
        config_json=None,
        notes=(),
        warnings=(),
    )


def repeated_base(folder: Path, *, layers: int, hidden: int, inner: int) -> Path:
    """Like `synthetic_base`, at the speed of the disk: every tensor holds the beginning of one list of values."""
    folder.mkdir(parents=True)
    shapes = {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    values = torch.randn(inner * hidden, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    data = values.view(torch.uint8).numpy().data
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (rows, cols) in shapes.items():
            begin, end = end, end + 2 * rows * cols
            key = f"model.layers.{layer}.{name}.weight"
            header[key] = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [begin, end]}
            weight_map[key] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            for rows, cols in shapes.values():
                opened.write(data[: 2 * rows * cols])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    return folder


def add_tokenizer(folder: Path) -> Path:
    """A tokenizer of 90 words, made on the spot."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: number for number, word in enumerate(["<unk>", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>").save_pretrained(folder)
    return folder
