"""Random adapters on random bases: a plan is refused in words, or has a place for every tensor of the adapter, exactly
once, and writes every byte of every file exactly once."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from distmerge.config import AdapterChoice, MergeConfig
from distmerge.plan import Plan, make_plan
from fuzz.law import scratch, taken
from fuzz.scenes import Tensors, write_adapter, write_base

FRONT = "base_model.model."
DTYPES = st.sampled_from(["BF16", "F16", "F32", "F32", "BF16", "I8", "F64", "BOOL"])
FLOATS = st.sampled_from(["BF16", "F16", "F32"])
SIZES = st.integers(1, 9)
LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj", "mlp.experts.0.up_proj")
RARE = st.integers(0, 59).map(lambda number: number == 47)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "use_rslora": st.booleans(),
    "use_dora": st.booleans(),
    "bias": st.sampled_from(["none", "all", "lora_only"]),
    "alpha_pattern": st.dictionaries(st.sampled_from(["q_proj", ".*down.*", "layers.1.*"]), st.integers(1, 9)),
    "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", ".*down.*", "layers.1.*"]), st.integers(1, 3)),
    "target_modules": st.sampled_from(["all-linear", ".*_proj", ["q_proj"], ["q_proj", "down_proj", "lm_head"], None]),
    "modules_to_save": st.sampled_from([["lm_head"], ["embed_tokens"], ["lm_head", "norm"], None]),
    "fan_in_fan_out": st.booleans(),
    "lora_bias": st.booleans(),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "pissa", "olora", "corda"]),
    "layer_replication": st.sampled_from([None, [[0, 1]], [[0, 2], [1, 2]]]),
    "trainable_token_indices": st.sampled_from([None, [0, 1], [99]]),
    "peft_type": st.sampled_from(["LORA", "ADALORA", "IA3", "LOHA"]),
}


@st.composite
def bases(draw: st.DrawFn) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Files of a base with one to three layers, and its configuration."""
    vocabulary, hidden = draw(SIZES), draw(SIZES)
    tensors: Tensors = [("model.embed_tokens.weight", draw(FLOATS), (vocabulary, hidden))]
    for layer, linear in itertools.product(range(draw(st.integers(1, 3))), LINEARS):
        name = f"model.layers.{layer}.{linear}"
        shape = (draw(SIZES), hidden) if not draw(RARE) else (hidden,)
        tensors.append((f"{name}.weight", draw(DTYPES) if draw(RARE) else draw(FLOATS), shape))
        if draw(st.booleans()):
            tensors.append((f"{name}.bias", draw(FLOATS), shape[:1]))
    tensors.append(("model.norm.weight", draw(FLOATS), (hidden,)))
    if draw(st.booleans()):
        tensors.append(("lm_head.weight", draw(FLOATS), (vocabulary, hidden)))
    config = {"model_type": draw(st.sampled_from(["llama", "gpt2", "mixtral"])), "vocab_size": vocabulary}
    config["tie_word_embeddings"] = draw(st.booleans())
    if draw(st.booleans()):
        return {"model.safetensors": tensors}, config
    cut = draw(st.integers(1, len(tensors) - 1))
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    return dict(zip(names, (tensors[:cut], tensors[cut:]), strict=True)), config


@st.composite
def adapters(draw: st.DrawFn, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """An adapter that mostly fits a base of `tensors`."""
    r = draw(st.integers(1, 3))
    found: Tensors = []
    for name, _, shape in tensors:
        module, _, kind = name.rpartition(".")
        if kind != "weight" or draw(st.booleans()) or (len(shape) == 1 and not draw(RARE)):
            continue
        if draw(RARE):
            found.append((f"{FRONT}{name}", draw(FLOATS), shape))
            continue
        out, into = shape if len(shape) == 2 else (shape[0], shape[0])
        rank = draw(st.integers(1, 3)) if draw(RARE) else r
        into += draw(RARE)
        a, b = ("lora_A.weight", "lora_B.weight")
        sizes = {a: (rank, into), b: (out, rank)}
        if "embed" in module and draw(st.booleans()):
            sizes = {"lora_embedding_A": (rank, out), "lora_embedding_B": (into, rank)}
        if draw(RARE):
            sizes["lora_magnitude_vector"] = (out,)
        if draw(RARE):
            sizes["lora_B.bias"] = (out,)
        if draw(RARE):
            sizes.popitem()
        front = FRONT if not draw(RARE) else draw(st.sampled_from(["", "module.", "base_model.", "x."]))
        found += [(f"{front}{module}.{tail}", draw(DTYPES if draw(RARE) else FLOATS), s) for tail, s in sizes.items()]
    if draw(RARE):
        found.append(
            (draw(st.sampled_from(["extra", f"{FRONT}lm_head.modules_to_save.weight", "a\u0301"])), "F32", (2,))
        )
    fields = {name: draw(values) for name, values in FIELDS.items() if draw(st.integers(0, 39)) == 23}
    return list({one[0]: one for one in found}.values()), {"peft_type": "LORA", "r": r, "lora_alpha": 4, **fields}


@st.composite
def scenes(draw: st.DrawFn) -> dict[str, Any]:
    """A base, an adapter and options."""
    files, config = draw(bases())
    made, adapter = draw(adapters([tensor for tensors in files.values() for tensor in tensors]))
    options = {"dtype": draw(st.sampled_from(["auto", "auto", "bfloat16", "float32"]))}
    options["max_shard_size"] = draw(st.sampled_from([None, None, 1, 100, 1000]))
    options["quantize"] = draw(st.sampled_from(["none", "none", "none", "nf4"]))
    return {"base": (files, config), "adapter": (made, adapter), "options": options}


def law(scene: dict[str, Any]) -> bool:
    """True if there is a plan for the scene."""
    folder = scratch() / "plan"
    shutil.rmtree(folder, ignore_errors=True)
    write_base(folder / "base", *scene["base"])
    write_adapter(folder / "lora", *scene["adapter"])
    choice = AdapterChoice(folder=folder / "lora")
    config = MergeConfig(base=folder / "base", adapters=(choice,), output=folder / "out", **scene["options"])
    plan = taken(lambda: make_plan(config, "cpu"))
    if plan is None:
        return False
    with safe_open(folder / "lora" / "adapter_model.safetensors", framework="np") as opened:
        keys = set(opened.keys())
    used, unused = [key for _, key in plan.adapter_keys], plan.adapters[0].unused
    assert sorted([*used, *unused]) == sorted(keys), (used, unused, keys)
    _check_bytes(plan)
    return True


def _check_bytes(plan: Plan) -> None:
    """Files hold their tensors, tensors their blocks and segments their pieces without a hole or an overlap."""
    assert len({task.name for task in plan.tasks}) == len(plan.tasks)
    for number, file in enumerate(plan.files):
        offset = len(plan.header_of(number))
        assert offset == file.data_begin
        for task in plan.tasks_of(number):
            assert task.begin == offset
            assert [task.block_begin(n) for n in range(task.num_blocks)] == [
                sum(task.block_nbytes(m) for m in range(n)) for n in range(task.num_blocks)
            ]
            assert sum(map(task.block_nbytes, range(task.num_blocks))) == task.nbytes
            offset += task.nbytes
        assert offset == file.nbytes
    pieces = [piece for segment in plan.segments for piece in segment.pieces]
    assert [(piece.task, piece.first) for piece in pieces] == sorted((piece.task, piece.first) for piece in pieces)
    blocks = [(piece.task, n) for piece in pieces for n in range(piece.first, piece.last)]
    assert blocks == [(number, n) for number, task in enumerate(plan.tasks) for n in range(task.num_blocks)]
    for number, segment in enumerate(plan.segments):
        assert segment.nbytes == sum(plan.tasks[p.task].nbytes_of(p.first, p.last) for p in segment.pieces)
        assert number in plan.segments_of(segment.file)


_taken = False


@given(scenes())
def _driven(scene: dict[str, Any]) -> None:
    global _taken  # noqa: PLW0603 - what hypothesis calls returns nothing
    _taken = law(scene)


def one(data: bytes) -> bool:
    """The law of the scene that hypothesis makes of `data`."""
    global _taken  # noqa: PLW0603
    _taken = False
    _driven.hypothesis.fuzz_one_input(data)
    return _taken
