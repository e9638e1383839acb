"""Writes docs/formats.md from the registries in the code; a test holds the page to them."""

from __future__ import annotations

from pathlib import Path

from distmerge.adapter.naming.tables import TABLES
from distmerge.adapter.peft_config import REFUSED_FIELDS
from distmerge.adapter.tuners.registry import TUNERS, UNMERGEABLE
from distmerge.checkpoint.foreign import SIGNS
from distmerge.checkpoint.quantization import KINDS, SKIP_LISTS
from distmerge.numerics.tuners import LOW_RANK, OPERATORS

_INTRO = """\
# What can be merged

Made from the code by `make docs`.

`W` is the base's weight (out, in), `W0` the unmerged one where several adapters follow one another, `s` the scaling:
`alpha / r`, or `alpha / sqrt(r)` with rsLoRA. Everything is computed in float32 and rounded once to the output's dtype.
Whatever is not listed here is refused by name before a byte is written.

## LoRA

| what was trained | operator | new weight |
| --- | --- | --- |
"""
_LORA = (
    ("linear layers, with rank and alpha patterns, rsLoRA, EVA, orthogonal and MiCA starts", "lora", "W + s B A"),
    ("Conv1D of GPT-2 (stored (in, out)), embeddings", "lora", "W + (s B A)'"),
    ("convolutions of 1 to 3 dimensions", "lora", "W + s B A, kernels flattened"),
    ("`nn.MultiheadAttention`", "lora", "in_proj once; out_proj W + 2 s B A, as the trained function adds it"),
    ("experts (`target_parameters`), fused or one by one on disk", "lora", "W_e + s B_e A_e for each expert e"),
    ("DoRA on any of these but experts", "dora", "m / norm(W0 + s B A) * (W + s B A), a norm for each output"),
    ("block-diagonal LoRA (`use_bdlora`)", "bdlora", "W + s B A, one of them block-diagonal"),
    ("KaSA (`kasa_config`)", "kasa", "W - (the r smallest singular components of W0) + s B diag(d) A"),
    ("PiSSA, from the base it began with", "pissa", "W + s (B A - B0 A0), B0 A0 from the r largest singular values"),
    ("OLoRA, from the base it began with", "olora", "W + s (B A - B0 A0), B0 A0 from a QR of W0"),
    ("CorDA, LoRA-GA, PiSSA, OLoRA with `--initial-adapter`", "lora", "W + s (B A - B0 A0), B0 A0 as given"),
    ("`lora_bias`", "add", "bias + s b"),
    ("`bias` all or lora_only, `modules_to_save`, resized vocabularies, new heads", "-", "take the base's place"),
    ("`trainable_token_indices`", "rows", "W with these rows replaced"),
    ("`layer_replication`", "-", "the new stack of layers is written out, each with its own delta"),
    ("VeLoRA, MonteCLoRA", "lora", "W + s B A; what only training used is left out, and listed in the receipt"),
)


def page() -> str:
    """The page as it should be."""
    lines = [_INTRO + "\n".join(f"| {what} | {operator} | {_cell(formula)} |" for what, operator, formula in _LORA)]
    lines += [
        "",
        "Refused, since no weight can do it: " + "; ".join(f"`{k}` ({v})" for k, v in REFUSED_FIELDS.items()) + ".",
    ]
    lines += [
        "",
        "## Other tuners of PEFT",
        "",
        "| `peft_type` | operator | new weight | source |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {tuner.peft_type} | {tuner.operator or '-'} | {_cell(tuner.formula)} | `{tuner.source}` |"
        for tuner in sorted(TUNERS.values(), key=lambda tuner: tuner.peft_type)
    ]
    lines += ["", "## Tuners that cannot be merged", "", "| `peft_type` | why |", "| --- | --- |"]
    lines += [f"| {name} | {why} |" for name, why in sorted(UNMERGEABLE.items())]
    lines += [
        "",
        "Operators that stream a weight of any size: "
        + ", ".join(sorted({"lora", "add", *LOW_RANK, *(n for n, o in OPERATORS.items() if o.row_local)}))
        + ". These need one weight at a time in memory, within the budget: "
        + ", ".join(sorted(name for name, operator in OPERATORS.items() if not operator.row_local))
        + ". On a weight that is stored transposed every operator but products does.",
    ]
    lines += ["", _BASES + "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in _PACKED), _bases_tail()]
    lines += [_NAMES + "\n".join(f"- {name}" for name in TABLES), _TAIL]
    return "\n".join(lines)


_BASES = """\
## Bases

Plain floats in bfloat16, float16 and float32, and packed weights, known by the tensors beside them (in any shard);
`config.json` must not say otherwise. `q` is a stored number. Everything is computed in float32 and rounded once to the
dense dtype: that of the quantization state, or else of `config.json`.

| packed by | tensors | dense weight |
| --- | --- | --- |
"""
_PACKED = (
    ("bitsandbytes NF4, FP4, any storage, block size and nesting", "`weight.quant_state.*`", "quant_map[q] absmax"),
    ("bitsandbytes int8", "`SCB`, `weight_format` 0", "q SCB 7.874015718698502e-3"),
    ("FP8 in blocks, ragged ones too, or with one scale", "`weight_scale_inv` (F32, BF16, F16, E8M0, U8)", "q scale"),
    ("FP8 experts, fused", "`P`, `P_scale_inv`", "q scale"),
    ("4-bit floats in int8 beside FP8 (DeepSeek-V4)", "`scale`, groups of 32", "E2M1[q] scale, low nibble first"),
    ("FBGEMM FP8", "`weight_scale` for a row, or a column of experts", "q scale"),
    ("compressed-tensors float-quantized", "`weight_scale` for a tensor, row or block", "q scale"),
    ("compressed-tensors int-quantized", "the same, or groups; `weight_zero_point`", "(q - zero) scale"),
    ("MXFP4 experts of gpt-oss", "`P_blocks`, `P_scales`", "E2M1[q] 2^(scale - 127), transposed to (experts, in, out)"),
    ("GPT-2's Conv1D in any of bitsandbytes' formats", "as above", "as above, transposed to (in, out)"),
)


def _bases_tail() -> str:
    methods = "; ".join(f"`{method}` ({', '.join(kinds)})" for method, kinds in KINDS.items())
    signs = ", ".join(f"`{sign}` ({kind})" for sign, kind in SIGNS.items())
    lists = "; ".join(f"{method}: {', '.join(f'`{key}`' for key in keys)}" for method, keys in SKIP_LISTS.items())
    return f"""
Values of `quant_method` that are read, with the names of their formats: {methods}.

Every other method can only be kept: it is refused by name where an adapter changes a weight of it, and without
`--keep-quantized`. So are modules that hold {signs}. A checkpoint that has nothing but `hf_quant_config.json` counts as
modelopt's.

With `--keep-quantized` packed tensors that nothing changes are copied byte for byte with all that lies beside them.
What is changed becomes dense, and with it what loaders fuse: q, k and v, gate and up (w1 and w3), all experts of a
layer. The skip list of the configuration names what is no longer packed; where there was none, the loader's own
defaults are written down too. When nothing is left packed, the section goes. The lists: {lists}.

Scales of activations (`input_scale`, `output_scale`, ...) go with their packed weight; those of a quantized cache
(`self_attn.k_scale`) are copied. A weight that is stored transposed is read one matrix at a time: the budget must hold
one expert's."""


_NAMES = """
## Names

An adapter's names are looked for on disk in this order, and each step is for all of its parameters at once:

1. as they stand, after the rules of `--map`;
2. by one of the tables below, if exactly one of them finds every parameter;
3. by transformers' own conversion tables (install `distmerge[transformers]`): the model's class is built without data,
   and what it does to a checkpoint's tensors when it loads them is read off as geometry. Adapters trained with
   transformers 4 and 5 then fit checkpoints written by either, experts fused or one by one.

What was used is printed and stands in the receipt. The output keeps the base's own names, and tensors that no class
knows. If no step finds everything, or two tables disagree, the merge is refused with the names.

The tables:

"""
_TAIL = """
## Where adapters come from

| folder | what is read |
| --- | --- |
| PEFT's `save_pretrained` | `adapter_config.json` and `adapter_model.safetensors` |
| DeepSpeed ZeRO, consolidated by `zero_to_fp32.py --safe_serialization` | the adapter's tensors; copies of the base \
are compared with `--base`, packed ones by packing it again |
| Accelerate or FSDP, consolidated by `accelerate merge-weights` | the same |
| diffusers, kohya | `pytorch_lora_weights.safetensors`, `lora_down`, `lora_up` and `alpha` |
| torchtune, MLX | their own names, the rows of q and k put in order |
| any of these as `.bin` or `.pt` | only with `--allow-pickle`, in a process that builds tensors and calls nothing |

What a file does not tell is given by `--lora-alpha` and `--use-rslora`, or by an `adapter_config.json` in a parent
folder. Checkpoints that are still in pieces (`global_step*`, `.distcp`, FSDP's flat parameters, Megatron) are refused
with the command that puts them together.
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    Path(__file__).with_name("formats.md").write_text(page())
