"""README.md of the output: what was merged into what, how it was proven, how to load it."""

from __future__ import annotations

import re
from typing import Any

from distmerge import __version__
from distmerge.checkpoint.packing import Simulated
from distmerge.plan import Plan
from distmerge.report.verdict import Verdict

_AUTO_CLASSES = (
    *((f"For{task}", f"AutoModelFor{task}") for task in ("CausalLM", "SequenceClassification", "TokenClassification")),
    ("LMHeadModel", "AutoModelForCausalLM"),
    ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
    ("ForConditionalGeneration", "AutoModelForImageTextToText"),
)
_DIGESTS = {
    "sha256": "every file's SHA-256",
    "xxh3": "the XXH3 of every weight file and the SHA-256 of every other file",
    "crc32": "the CRC-32 of every weight file and the SHA-256 of every other file",
    "none": "the length of every weight file and the SHA-256 of every other file",
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def model_card(plan: Plan, base_name: str, num_applied: int, config: dict[str, Any], verdict: Verdict) -> str:
    """The model card in Markdown, with metadata that the Hub reads; `config` is the output's configuration."""
    merged = [adapter for adapter in plan.adapters if not adapter.initial]
    told = [adapter.base_model for adapter in merged if _HUB_NAME.fullmatch(adapter.base_model)]
    several = len(merged) > 1
    auto_class = _auto_class(config)
    lines = [
        "---",
        *([f"base_model: {told[0]}"] if told else []),  # no name of this form means anything else in YAML
        "library_name: transformers",
        *("tags:", "- distmerge", "- lora", "- merge"),
        *([f"base_model_relation: {'merge' if several else 'finetune'}"] if told else []),
        "---",
        "",
        f"# {base_name}, with {_join([adapter.name for adapter in merged])} merged in",
        "",
        f"This checkpoint is [{base_name}]"
        + (f"(https://huggingface.co/{told[0]})" if told else "")
        + " with the deltas of "
        + ("these adapters" if several else "this adapter")
        + ("" if plan.combine.is_sum else f" combined ({_cell(str(plan.combine))}) and")
        + " added to its weights by distmerge "
        + f"{__version__}:",
        "",
        "| adapter | weight | tensors | SHA-256 |",
        "| --- | --- | --- | --- |",
        *(
            f"| {_cell(adapter.name)}{' (as it began, taken off)' * adapter.initial} | {adapter.weight:g} "
            f"| {adapter.num_tensors} | `{adapter.weights_sha256}` |"
            for adapter in plan.adapters
        ),
        "",
        f"All {num_applied} adapter tensors were applied exactly once, in float32, and each element was rounded once"
        + _forms(plan)
        + _packing(plan)
        + "`merge_receipt.json` lists every adapter tensor with the tensor it went into, and "
        + f"{_DIGESTS[plan.file_digest]}.",
        "",
        *_survival(verdict),
        "```python",
        f"from transformers import {auto_class}",
        "",
        f'model = {auto_class}.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "Served as any other checkpoint: `vllm serve path/to/this/folder`. Checked by `distmerge verify "
        "path/to/this/folder`.",
        "",
    ]
    return "\n".join(lines)


def _survival(verdict: Verdict) -> list[str]:
    """What is left of the change after rounding, as a paragraph."""
    if verdict.cosine is None or verdict.kept is None or verdict.cosines is None:
        return []
    low, high = verdict.cosines
    return [
        f"After rounding {100 * verdict.kept:.1f} % of the change is left along its own direction (cosine "
        f"{verdict.cosine:.4f}; {low:.4f} to {high:.4f} over {verdict.num_changed} tensors).",
        "",
    ]


def _forms(plan: Plan) -> str:
    """The end of the sentence on rounding: what was packed after it, and how."""
    forms = [task.form for task in plan.tasks if task.form]
    if not forms:
        return ". "
    form = forms[0]
    scales = "scales fitted to make the error small" if form.fitted else "bitsandbytes' own scales"
    return (
        f" to its dtype. Then {len(forms)} linear weights were packed in {form.kind.upper()} with {scales} (blocks of "
        f"{form.blocksize}{', double quantization' * form.double}), which rounds them once more. "
    )


def _packing(plan: Plan) -> str:
    """What the base was to begin with, and what of it is kept."""
    packings = [task.source.packing for task in plan.tasks if task.source.packing]
    if rounded := {packing.kind for packing in packings if isinstance(packing, Simulated)}:
        through = _join([kind.upper() for kind in rounded])
        return (
            f"The linear weights of the base were rounded through {through} first, as they are in 4-bit training; the "
            "deltas were added to the rounded values. "
        )
    kinds = sorted({packing.kind for packing in packings})
    seen = ", those that training saw" if {*kinds} <= {"nf4", "fp4"} else ""
    text = f"The base was packed in {_join(kinds)}; the deltas were added to its dequantized values{seen}. "
    return text * bool(kinds) + "What no adapter changes is still packed. " * bool(plan.num_kept)


def _auto_class(config: dict[str, Any]) -> str:
    """The class of transformers that loads the output."""
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "ForCausalLM"
    return next((auto for tail, auto in _AUTO_CLASSES if name.endswith(tail)), "AutoModel")


def _join(names: list[str]) -> str:
    cells = [_cell(name) for name in names]
    return "".join(cells) if len(cells) < 2 else f"{', '.join(cells[:-1])} and {cells[-1]}"


def _cell(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
