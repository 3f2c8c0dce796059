"""Dividing bits among matrices."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashpack.converter.allocate import choose, sensitivities
from flashpack.converter.calibrated import LayerCalibration
from flashpack.errors import SourceError
from flashpack.formats.calibration import LayerTokens
from flashpack.formats.dtypes import from_float32
from flashpack.formats.encodings import decode
from flashpack.formats.records import Encoding
from flashpack.kernels.activations import named
from flashpack.kernels.cpu.quantize import quantize
from tests.converter.experts import inputs, matrices

CANDIDATES = [Encoding("affine", "BF16", bits, 64) for bits in (2, 3, 4)]
EVERY = dict.fromkeys(("gate", "up", "down"), CANDIDATES)

rows = st.lists(
    st.tuples(*[st.integers(0, 1000)] * 3, st.integers(1, 4), *[st.integers(1, 8)] * 2), min_size=1, max_size=5
)


def table(found: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Costs, and bits that rise from one candidate to the next."""
    numbers = np.array(found, dtype=np.float64)
    return numbers[:, :3], np.cumsum(numbers[:, 3:], axis=1)


def total(of: np.ndarray, chosen: np.ndarray) -> float:
    return float(of[np.arange(len(of)), chosen].sum())


@given(rows, st.integers(0, 80))
def test_the_budget_is_kept_and_more_bits_take_none_away(found: list[tuple[int, ...]], budget: int) -> None:
    costs, bits = table(found)
    less, more = choose(costs, bits, budget), choose(costs, bits, budget + 3)
    assert total(bits, less) <= max(budget, total(bits, np.zeros(len(bits), dtype=int)))
    assert (bits[np.arange(len(bits)), more] >= bits[np.arange(len(bits)), less]).all()
    assert total(costs, more) <= total(costs, less)


@given(rows, st.integers(0, 80))
def test_no_choice_of_as_many_bits_costs_less(found: list[tuple[int, ...]], budget: int) -> None:
    costs, bits = table(found)
    chosen = choose(costs, bits, budget)
    for other in itertools.product(range(3), repeat=len(costs)):
        if total(bits, np.array(other)) <= total(bits, chosen):
            assert total(costs, np.array(other)) >= total(costs, chosen)


def test_a_budget_that_fits_is_used_up() -> None:
    costs, bits = np.array([[9.0, 3, 1]] * 8), np.array([[2.0, 3, 4]] * 8)
    assert total(bits, choose(costs, bits, 21)) == 21
    assert choose(costs, bits, 21).tolist() == [1] * 5 + [0] * 3


def test_a_step_that_does_not_fit_is_the_last() -> None:
    """Else the second row would have more bits for 5 than for 6."""
    costs, bits = np.array([[100.0, 0], [1.0, 0]]), np.array([[1.0, 5], [1.0, 2]])
    assert [choose(costs, bits, budget).tolist() for budget in (5, 6, 7)] == [[0, 0], [1, 0], [1, 1]]


@pytest.fixture(scope="module")
def tokens() -> LayerTokens:
    """Expert 0 has all of 500 tokens, expert 1 every tenth, expert 2 none; each second one is ten times as large."""
    experts = np.zeros((500, 2), dtype=np.int32)
    experts[:, 1] = 3
    experts[::10, 1] = 1
    weights = np.full((500, 2), 0.5, dtype=np.float32)
    behind = np.where(np.arange(500) % 20 < 10, np.float32(0.25), np.float32(25))[:, None]
    return LayerTokens(from_float32(inputs(500).numpy(), "BF16"), experts, weights, behind)


@pytest.fixture(scope="module")
def layer(tokens: LayerTokens) -> LayerCalibration:
    return LayerCalibration(tokens, named("silu", gated=True), refined=False)


def test_squared_errors_without_tokens() -> None:
    found = sensitivities(matrices(), {}, EVERY, None, 0)
    for name, matrix in matrices().items():
        for cost, encoding in zip(found[name], CANDIDATES, strict=True):
            parts, _, _ = quantize(matrix, "F32", encoding, "starts")
            assert cost == pytest.approx(((decode(encoding, parts, matrix.shape) - matrix) ** 2).sum(), rel=1e-4)


def test_how_far_outputs_move(layer: LayerCalibration, tokens: LayerTokens) -> None:
    """As the expert is moved if it is encoded so, but for what down makes up for."""
    found = sensitivities(matrices(), {}, EVERY, layer, 1)
    x = inputs(500).bfloat16().float().numpy()[::10]

    def outputs(values: dict[str, np.ndarray]) -> np.ndarray:
        gate, up = x @ values["gate"].T, x @ values["up"].T
        return (gate / (1 + np.exp(-gate)) * up) @ values["down"].T

    for name, matrix in matrices().items():
        for cost, encoding in zip(found[name], CANDIDATES, strict=True):
            parts = layer.encode(1, {name: encoding}, matrices(), {})[0]
            rounded = matrices() | {name: decode(encoding, parts[name], matrix.shape)}
            change = 0.5 * (outputs(rounded) - outputs(matrices()))
            share = (change**2).mean(axis=1) / tokens.residual[::10, 0]
            assert cost == pytest.approx(share.sum() / 500, rel=0.1)


def test_experts_of_few_tokens_cost_little(layer: LayerCalibration) -> None:
    costs = [sensitivities(matrices(), {}, EVERY, layer, expert) for expert in (0, 1, 2)]
    for name in EVERY:
        often, seldom, never = (found[name] for found in costs)
        assert (often > 5 * seldom).all()
        assert (seldom > 5 * never).all()
        assert (never > 0).all()


def test_matrices_without_candidates_are_not_rounded(layer: LayerCalibration) -> None:
    some = {"up": CANDIDATES}
    for judge in (layer, None):
        found = sensitivities(matrices(), {}, some, judge, 0)
        assert set(found) == {"up"}
        assert (found["up"] == sensitivities(matrices(), {}, EVERY, judge, 0)["up"]).all()


def test_biases_count(layer: LayerCalibration) -> None:
    biases = {name: np.full(64, 2, dtype=np.float32) for name in ("gate", "up")}
    with_biases, without = (sensitivities(matrices(), b, EVERY, layer, 0)["down"] for b in (biases, {}))
    assert (with_biases > 1.2 * without).all()


def test_numbers_that_are_none() -> None:
    values = matrices()
    values["gate"][0, 0] = np.nan
    with pytest.raises(SourceError, match="expert 4, gate: infinite or NaN values cannot be quantized"):
        sensitivities(values, {}, EVERY, None, 4)
