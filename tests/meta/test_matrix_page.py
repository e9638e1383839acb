"""The page on what is tested together is that of the cases, and no case is there twice."""

from __future__ import annotations

import runpy
from collections import Counter
from pathlib import Path

from tests.matrix import CASES

ROOT = Path(__file__).parents[2]


def test_the_page_on_the_matrix_is_what_the_cases_say() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_matrix.py"))["page"]()
    assert (ROOT / "docs" / "matrix.md").read_text() == made, "run `make docs`"


def test_every_case_has_a_name_of_its_own_and_checks_something() -> None:
    assert [name for name, count in Counter(map(str, CASES)).items() if count > 1] == []
    assert [str(case) for case in CASES if not case.checks] == []
