"""The fuzzers' targets on what they found before, and on some hundreds of changes to it, always the
same; `make fuzz` looks for new ones."""

from __future__ import annotations

import importlib
import random
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.law import CORPUS, SECONDS, corpus
from fuzz.targets import plan

TARGETS = sorted(path.name for path in CORPUS.iterdir())
MUTATED = [name for name in TARGETS if name != "plan"]
QUICK = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def target(name: str) -> Any:
    return importlib.import_module(f"fuzz.targets.{name}")


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_of_a_corpus_is_taken_or_refused_in_words_and_time(name: str) -> None:
    one = target(name).one
    one(b"")  # imports what is imported late
    taken = 0
    for path in corpus(name):
        before = time.process_time()
        taken += one(path.read_bytes())
        assert time.process_time() - before < SECONDS, path.name
    assert taken, "none of them is one that a reader takes: the law of the target was not tried"


@pytest.mark.parametrize("name", MUTATED)
def test_no_change_to_an_input_makes_anything_but_words(name: str) -> None:
    module, seeds = target(name), [path.read_bytes() for path in corpus(name)]

    @settings(QUICK, max_examples=150)
    @given(st.sampled_from(seeds), st.integers(0, 1 << 32), st.integers(1, 3))
    def law(data: bytes, seed: int, rounds: int) -> None:
        chance = random.Random(seed)
        for _ in range(rounds):
            data = module.changed(data, chance)
        module.one(data)

    law()


@settings(QUICK, max_examples=80)
@given(plan.scenes())
def test_a_plan_has_a_place_for_every_tensor_and_every_byte_or_is_refused(scene: dict[str, Any]) -> None:
    plan.law(scene)
