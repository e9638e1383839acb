"""The matrix of architectures, kinds of adapters and names on disk."""

from __future__ import annotations

from tests.matrix import others, parts, text
from tests.matrix.case import Case

CASES: list[Case] = [*text.CASES, *parts.CASES, *others.CASES]
