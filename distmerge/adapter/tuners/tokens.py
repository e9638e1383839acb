"""Trained token rows: which rows of which embedding, by the configuration."""

from __future__ import annotations

from typing import Any

from distmerge.adapter.peft_config import PeftConfig
from distmerge.errors import InputError, printable, shown

_MAX_ROWS = 1 << 20


def token_indices(config: PeftConfig, module: str, where: str) -> list[int]:
    """The rows of `module` that were trained, in the order of the file. Raises InputError where the configuration does
    not tell; a list without a module's name means the only one that the file has rows of, the input embedding."""
    field = "trainable_token_indices" if config.peft_type == "LORA" else "token_indices"
    told = config.raw.get(field)
    if isinstance(told, dict):
        fitting = [rows for name, rows in told.items() if module == name or module.endswith(f".{name}")]
        told = fitting[0] if len(fitting) == 1 else None
    if not isinstance(told, list) or not _are_rows(told):
        raise InputError(f"{field} does not list the rows of {printable(module)!r}: {shown(told)}", where=where)
    return told


def _are_rows(values: list[Any]) -> bool:
    return 0 < len(values) <= _MAX_ROWS and all(type(item) is int for item in values)
