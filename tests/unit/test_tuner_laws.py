"""What holds for every operator: blocks of rows give what all rows give, in float64, and nothing given is changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from distmerge.adapter.tuners.options import ACTIVATIONS
from distmerge.adapter.tuners.registry import TUNERS
from distmerge.numerics import decompositions
from distmerge.numerics.operators import Operator
from distmerge.numerics.rotations import butterfly, cayley, cayley_neumann
from distmerge.numerics.tuners import LOW_RANK, OPERATORS
from tests.tuners import CASES, TOKENS, Case, Tuned, disturb, llama, logits, merge, modules, peft_config, saved, train

OPERATING = [case for case in CASES if case.config not in ("LNTuning",)]
EVERY = pytest.mark.parametrize("case", OPERATING, ids=str)
TOGETHER = [
    Case(config="BOFT", fields={"boft_block_size": 4}, biases=True),
    Case(config="Deft", fields={"r": 4, "decomposition_method": "qr"}, tolerance=2e-5),
    Case(config="Glora", fields={"r": 4}),
    Case(config="Hira", fields={"r": 4}),
    Case(config="HRA", fields={"r": 4}),
    Case(config="IA3", fields={"feedforward_modules": ["down_proj"]}, biases=True),
    Case(config="Miss", fields={"r": 8, "init_weights": "bat"}, noise=0.05),
    Case(config="Peanut", fields={"r": 4, "depth": 1}),
    Case(config="Road", fields={"group_size": 8}, biases=True),
    Case(config="Shira", fields={"r": 2, "random_seed": 3}),
]


def noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def operated(case: Case) -> list[tuple[Operator, Tuned]]:
    """The operators of one layer's modules, products as operators too."""
    trained = train(case)
    name = TUNERS[trained.config["peft_type"]].operator
    found = [tuned for tuned in modules(trained.base, trained.config, trained.tensors) if "layers.1" not in tuned.name]
    return [(OPERATORS.get(name) or product(name), tuned) for tuned in found]


def product(name: str) -> Operator:
    def apply(weight: Tensor, base: Tensor, tensors: Any, options: Any, rows: slice) -> Tensor:
        b, a = LOW_RANK[name](tensors, options)
        return weight + b[rows] @ a

    return Operator(apply=apply, row_local=True)


def applied(operator: Operator, tuned: Tuned, tensors: Any, step: int) -> Tensor:
    """The new rows of a running weight, `step` rows at a time."""
    running = tuned.weight + noise(tuned.weight, 7) * 0.1
    blocks = [slice(first, min(first + step, len(running))) for first in range(0, len(running), step)]
    parts = [operator.apply(running[rows], tuned.weight[rows], tensors, tuned.options, rows) for rows in blocks]
    return torch.cat(parts)


@EVERY
def test_blocks_of_rows_give_what_all_rows_give(case: Case) -> None:
    for operator, tuned in operated(case):
        whole = applied(operator, tuned, tuned.tensors, len(tuned.weight))
        prepared = operator.prepare(tuned.tensors, tuned.options)
        for step in (1, 7, 24) if operator.row_local else (len(tuned.weight),):
            for tensors in (tuned.tensors, prepared):
                assert torch.allclose(applied(operator, tuned, tensors, step), whole, rtol=0, atol=1e-12)


@EVERY
def test_an_operator_changes_nothing_that_it_is_given(case: Case) -> None:
    for operator, tuned in operated(case):
        weight, base = tuned.weight + 0.1, tuned.weight.clone()
        before = {name: tensor.clone() for name, tensor in tuned.tensors.items()}
        new = operator.apply(weight, base, tuned.tensors, tuned.options, slice(0, len(weight)))
        assert new.dtype == weight.dtype
        assert new.shape == weight.shape
        assert torch.equal(weight, tuned.weight + 0.1)
        assert torch.equal(base, tuned.weight)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.tensors.items())


@EVERY
def test_a_transposed_view_gives_what_the_matrix_gives(case: Case) -> None:
    for operator, tuned in operated(case):
        rows, view = slice(0, len(tuned.weight)), tuned.weight.T.contiguous().T
        new, same = (operator.apply(w, w, tuned.tensors, tuned.options, rows) for w in (tuned.weight, view))
        assert torch.allclose(new, same, rtol=0, atol=1e-12)


@EVERY
def test_an_operator_in_float64_has_the_digits_of_float64(case: Case) -> None:
    for operator, tuned in operated(case):
        # Away from the saved values: constrained OFT saves them on the edge of what it allows.
        before = response(operator, tuned, 1e-3)
        long, short = ((response(operator, tuned, 1e-3 + step) - before) / step for step in (1e-8, 1e-9))
        assert float((long - short).abs().max() / long.abs().max()) < 1e-3


def response(operator: Operator, tuned: Tuned, step: float) -> Tensor:
    """The new weight when every input has moved by about `step`."""
    tensors = {
        name: tensor + step * noise(tensor, 3) if tensor.is_floating_point() else tensor
        for name, tensor in tuned.tensors.items()
    }
    base = tuned.weight + step * noise(tuned.weight, 4)
    return operator.apply(base, base, tensors, tuned.options, slice(0, len(base)))


@pytest.mark.parametrize("case", TOGETHER, ids=str)
def test_two_adapters_one_after_another_give_the_logits_of_both(case: Case) -> None:
    import peft

    model = llama(case.biases)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, peft_config(case)).eval()
        tuned.add_adapter("second", peft_config(case))
        tuned.base_model.set_adapter(["default", "second"])
        tuned.eval()
        disturb(tuned, case.noise)
        expected = tuned(TOKENS).logits
        files = [saved(tuned, adapter) for adapter in ("default", "second")]
    weights = base
    for config, tensors in files:
        before, weights = weights, merge(weights, base, config, tensors)
        assert max(float((weights[name] - before[name]).abs().max()) for name in weights) > 0.01
    assert float((logits(weights, case.biases) - expected).abs().max()) < case.logits_tolerance


def test_a_long_neumann_series_is_the_cayley_transform() -> None:
    skew = noise(torch.empty(3, 6, 6), 1) * 0.05
    skew = skew - skew.transpose(1, 2)
    rotation = cayley_neumann(-skew, terms=40, halves_last=True)
    assert torch.allclose(rotation, cayley(skew), atol=1e-12)
    assert torch.allclose(rotation @ rotation.transpose(1, 2), torch.eye(6, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("terms", range(1, 9))
def test_the_series_of_peft_before_0_18_counts_its_last_power_twice(terms: int) -> None:
    skew = noise(torch.empty(1, 4, 4), 1)
    expected = torch.eye(4, dtype=torch.float64) + sum(
        2 * torch.linalg.matrix_power(skew, power) for power in range(1, terms)
    )
    assert torch.allclose(cayley_neumann(skew, terms=terms, halves_last=False), expected)


def test_the_registry_names_the_activations_that_the_arithmetic_has() -> None:
    assert set(ACTIVATIONS) == decompositions.ACTIVATIONS.keys()


@pytest.mark.parametrize(("width", "size", "factors"), [(64, 4, 2), (64, 8, 3), (48, 2, 4), (64, 8, 1)])
def test_butterfly_permutations_are_those_of_peft(width: int, size: int, factors: int) -> None:
    from peft.tuners.boft.layer import BOFTLayer

    for number in range(factors):
        blocks = width // size >> number
        expected = BOFTLayer.block_butterfly_perm(None, width, blocks, size // 2, factors - 1)
        assert torch.equal(butterfly(width, blocks, size // 2, factors), expected)


@pytest.mark.parametrize("factors", [2, 3])
def test_butterfly_factors_give_the_logits_of_peft_with_its_cuda_extension(
    factors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft
    from peft.tuners.boft import layer

    class BlockDiagonal:
        """What the extension computes: block-diagonal matrices, one for each factor."""

        @staticmethod
        def apply(blocks: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in blocks])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", BlockDiagonal)
    model = llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fields = {"boft_block_size": 4, "boft_n_butterfly_factor": factors, "target_modules": ["q_proj", "gate_proj"]}
    case = Case(config="BOFT", fields=fields)
    with torch.no_grad():
        tuned = peft.get_peft_model(model, peft_config(case)).eval()
        disturb(tuned, case.noise)
        expected = tuned(TOKENS).logits
        config, tensors = saved(tuned)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.boft_R"].shape[0] == factors
    assert float((logits(merge(base, base, config, tensors)) - expected).abs().max()) < case.logits_tolerance
