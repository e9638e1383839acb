"""Secrets kept out of whatever is shown or written: tokens, passwords in addresses, and what such variables hold."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from typing import Any

_HIDDEN = "***"
_MIN_LENGTH = 8  # of a variable's value: a shorter one may be a word
_NAMES = re.compile(
    r"(?:TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|(?:API|ACCESS|PRIVATE)_?KEY|_(?:KEY|PASS)$)"
    r"(?!.*_(?:FILE|PATH|DIR|DIRECTORY|HOME|ROOT)$)",
    re.IGNORECASE,
)
_SHAPES = (
    re.compile(r"()\b(?:hf|api_org)_[A-Za-z0-9]{30,}"),  # of the Hugging Face Hub
    re.compile(r"(:/{1,2})[^/\s'\"]+(?=@)"),  # user and password of a URL, also as a path writes it
    re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[^\s'\",]+", re.IGNORECASE),
    re.compile(r"(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(
        r"([?&](?:[a-z_-]*token|[a-z_-]*key|signature|x-amz-[a-z-]*|sig|password|secret)=)[^&\s'\"]+", re.IGNORECASE
    ),
)


def redacted(text: str) -> str:
    """`text` with `***` in place of everything that looks like a secret, or is the value of a variable named like one:
    Hub tokens, `user:password@` in addresses, authorization headers, tokens and signatures in queries."""
    return _without(text, _values())


def redacted_json(value: Any) -> str:
    """`value` as JSON on one line, every text in it redacted."""
    return json.dumps(_redacted(value, _values()))


@functools.lru_cache(1 << 12)
def is_secret(name: str) -> bool:
    """True for an environment variable that is named like a secret."""
    return _NAMES.search(name) is not None


def _redacted(value: Any, values: Sequence[re.Pattern[str]]) -> Any:
    if isinstance(value, str):
        return _without(value, values)
    if isinstance(value, dict):
        return {_without(str(key), values): _redacted(item, values) for key, item in value.items()}
    return [_redacted(item, values) for item in value] if isinstance(value, list | tuple) else value


def _without(text: str, values: Sequence[re.Pattern[str]]) -> str:
    for value in values:
        text = value.sub(_HIDDEN, text)
    for shape in _SHAPES:
        text = shape.sub(rf"\g<1>{_HIDDEN}", text)
    return text


def _values() -> list[re.Pattern[str]]:
    """What finds the values of variables that are named like secrets, the longest first."""
    found = {os.environ.get(name, "") for name in os.environ if is_secret(name)}
    return [_pattern(value) for value in sorted(found, key=len, reverse=True) if len(value) >= _MIN_LENGTH]


@functools.lru_cache(1 << 10)
def _pattern(value: str) -> re.Pattern[str]:
    """What finds `value` in a text: one of letters or digits alone, which may be a word, only as a whole."""
    end = r"\b" if value.isalpha() or value.isdigit() else ""
    return re.compile(f"{end}{re.escape(value)}{end}")
