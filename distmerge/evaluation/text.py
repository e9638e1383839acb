"""The text that models are compared on: documents of a file, as windows of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmerge.errors import InputError


def read_documents(path: Path) -> list[str]:
    """The documents in `path`: a .jsonl file has one in the field `text` of each line, any other file is one.

    Raises InputError, naming the line, for what is no UTF-8, no JSON or has no text, and for a file without any.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise InputError(f"is no UTF-8 (byte {error.start})", where=str(path)) from None
    if path.suffix != ".jsonl":
        documents = [content]
    else:
        lines = enumerate(content.split("\n"), start=1)
        documents = [_text_of(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not any(document.strip() for document in documents):
        raise InputError("holds no text", where=str(path), hint="--text takes a .txt file, or a .jsonl with `text`")
    return [document for document in documents if document.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("is no JSON", where=where) from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise InputError("has no field `text`", where=where)
    text: str = value["text"]
    return text


def cut_windows(
    documents: list[str], encode: Callable[[str], list[int]], *, context: int, max_tokens: int | None, where: str
) -> list[list[int]]:
    """Windows of at most `context` tokens that follow one another, each within one document, until `max_tokens` tokens
    can be predicted. In a window every token but the first is. Raises InputError where nothing can be."""
    windows: list[list[int]] = []
    left = max_tokens
    for document in documents:
        tokens = encode(document)
        for begin in range(0, len(tokens), context):
            room = context if left is None else min(context, left + 1)
            window = tokens[begin : begin + room]
            if len(window) < 2:
                break
            windows.append(window)
            left = None if left is None else left - (len(window) - 1)
    if not windows:
        raise InputError("holds fewer than 2 tokens", where=where, hint="there is nothing to predict; give more text")
    return windows
