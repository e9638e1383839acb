"""Writes docs/matrix.md from the cases of tests/matrix; a test holds the page to them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script, this file would not see the tests

from tests.matrix import CASES
from tests.matrix.case import Case

_INTRO = """\
# What is tested together

Made from the cases in `tests/matrix` by `make docs`.

Each line is built anew by every run of the tests: a tiny random model of transformers' own class, saved under the names
given, and an adapter that PEFT made on it, moved as by training and saved. After the merge

- **weights**: every tensor of the merged model, loaded by transformers, is the float64 sum by formulas written out in
  the tests, within half an ulp of its dtype and the noise of float32; elements that nothing is added to are the base's,
  bit for bit; names and dtypes are the base's, and `config.json` is true to them;
- **answers**: the merged model answers like the unmerged model of PEFT, and at least 100 times closer to it than the
  base does. Only float32 is held to this.

`distmerge verify` recomputes each of them too. Names on disk: `hub` as transformers saves by default, with the names of
release 4; `modules` with those of its modules, experts fused; `mixed` one layer of each; `clip` with the `vision_model`
of older files; `transposed` with the experts of the Hub's Qwen3-VL-MoE. Sizes are all different where a class allows
it; `_square` models have square experts, `_tied` ones a tied head, `net` is made of convolutions and torch's own
attention.

"""


def page() -> str:
    """The whole page."""
    rows: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        rows.setdefault((case.model, case.kind), []).append(case)
    lines = ["| model | adapter | names on disk | checked |", "| --- | --- | --- | --- |"]
    for (model, kind), cases in sorted(rows.items(), key=lambda row: row[0]):
        names = ", ".join(_variant(case) for case in cases)
        checks = [check for check in ("weights", "answers") if any(check in case.checks for case in cases)]
        lines.append(f"| `{model}` | {kind} | {names} | {', '.join(checks)} |")
    models = {case.model for case in CASES}
    return f"{_INTRO}{len(CASES)} cases on {len(models)} models.\n\n" + "\n".join(lines) + "\n"


def _variant(case: Case) -> str:
    extra = [*[case.dtype] * (case.dtype != "float32"), *["in shards"] * (case.shard != "50GB")]
    return f"{case.naming} ({', '.join(extra)})" if extra else case.naming


if __name__ == "__main__":
    Path(__file__).with_name("matrix.md").write_text(page(), encoding="utf-8")
