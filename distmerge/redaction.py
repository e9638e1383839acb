"""Secrets kept out of whatever is shown or written: tokens, passwords in addresses, and what such variables hold."""

from __future__ import annotations

import json
import os
import re
from typing import Any

_HIDDEN = "***"
_MIN_LENGTH = 8  # of a variable's value: a shorter one may be a word
_NAMES = re.compile(
    r"(?:TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)(?!.*_(?:FILE|PATH|DIR)$)",
    re.IGNORECASE,
)
_SHAPES = (
    re.compile(r"()\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),  # of the Hugging Face Hub
    re.compile(r"(:/{1,2})[^/\s@'\"]+(?=@)"),  # user and password of a URL, also as a path writes it
    re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:(?:bearer|basic|token)\s+)?)[^\s'\",]+", re.IGNORECASE),
    re.compile(r"(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE),
    re.compile(
        r"([?&](?:[a-z_-]*token|[a-z_-]*key|signature|x-amz-[a-z-]*|sig|password|secret)=)[^&\s'\"]+", re.IGNORECASE
    ),
)


def redacted(text: str) -> str:
    """`text` with `***` in place of everything that looks like a secret, or is the value of a variable named like one:
    Hub tokens, `user:password@` in addresses, authorization headers, tokens and signatures in queries."""
    for value in sorted(_values(), key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    for shape in _SHAPES:
        text = shape.sub(rf"\g<1>{_HIDDEN}", text)
    return text


def redacted_json(value: Any) -> str:
    """`value` as JSON on one line, every text in it redacted."""
    return json.dumps(_redacted_values(value))


def _redacted_values(value: Any) -> Any:
    if isinstance(value, str):
        return redacted(value)
    if isinstance(value, dict):
        return {redacted(str(key)): _redacted_values(item) for key, item in value.items()}
    return [_redacted_values(item) for item in value] if isinstance(value, list | tuple) else value


def is_secret(name: str) -> bool:
    """True for an environment variable that is named like a secret."""
    return _NAMES.search(name) is not None


def _values() -> list[str]:
    return [value for name, value in os.environ.items() if is_secret(name) and len(value) >= _MIN_LENGTH]
