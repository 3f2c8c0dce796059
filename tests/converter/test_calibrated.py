"""Rounding an expert for its calibration tokens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, silu

from flashpack.converter.calibrated import Arrays, LayerCalibration
from flashpack.converter.gptq import gptq
from flashpack.errors import SourceError
from flashpack.formats.calibration import LayerTokens
from flashpack.formats.dtypes import from_float32
from flashpack.formats.encodings import decode
from flashpack.formats.records import Encoding, affine_dq
from flashpack.kernels.activations import named
from tests.converter.experts import HIDDEN, WIDTH, inputs, matrices

SILU = named("silu", gated=True)
SHAPES = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
EXPERT, ALONE, RARE, NEVER = 0, 1, 2, 3
COUNTS = {EXPERT: 1000, ALONE: 400, RARE: 4, NEVER: 0}
"""Tokens of each of these."""

Encodings = dict[str, Encoding]

MIXED = {"gate": affine_dq(2), "up": affine_dq(2), "down": affine_dq(3)}
PLAIN = {"gate": Encoding("affine", "BF16", 2, 64), "up": Encoding("affine", "BF16", 3, 32), "down": affine_dq(2)}


@pytest.fixture(scope="module")
def tokens() -> LayerTokens:
    """1500 tokens with 4 experts of 16 each."""
    generator = np.random.default_rng(0)
    experts = np.tile(np.arange(8, 12, dtype=np.int32), (1500, 1))
    for expert, count in COUNTS.items():
        experts[generator.permutation(1500)[:count], expert] = expert
    weights = generator.uniform(0.2, 0.8, experts.shape).astype(np.float32)
    return LayerTokens(
        from_float32(inputs(1500).numpy(), "BF16"), experts, weights, np.ones((1500, 1), dtype=np.float32)
    )


def outputs(values: dict[str, NDArray[np.float32]], x: Tensor, biases: dict[str, NDArray[np.float32]]) -> Tensor:
    none = np.zeros(WIDTH, dtype=np.float32)
    gate, up = (linear(x, *map(torch.from_numpy, (values[n], biases.get(n, none)))) for n in ("gate", "up"))
    return (silu(gate) * up) @ torch.from_numpy(values["down"]).T


def decoded(encodings: Encodings, parts: dict[str, Arrays]) -> dict[str, NDArray[np.float32]]:
    return {name: decode(encoding, parts[name], SHAPES[name]) for name, encoding in encodings.items()}


def moved(encodings: Encodings, parts: dict[str, Arrays], biases: dict[str, NDArray[np.float32]]) -> float:
    """The relative error of an expert's outputs for tokens that it was not calibrated with."""
    x = inputs(500, seed=1)
    right = outputs(matrices(), x, biases)
    return float((outputs(decoded(encodings, parts), x, biases) - right).norm() / right.norm())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("encodings", [MIXED, PLAIN], ids=["dq", "affine"])
def test_outputs_of_unseen_tokens_change_less(encodings: Encodings, biased: bool, tokens: LayerTokens) -> None:
    biases = {name: np.linspace(-1, 1, WIDTH, dtype=np.float32) for name in ("gate", "up") if biased}
    found, errors = LayerCalibration(tokens, SILU, refined=True).encode(EXPERT, encodings, matrices(), biases)
    nearest = {
        name: gptq(torch.from_numpy(matrices()[name]), torch.eye(SHAPES[name][1]), encoding, refined=False)
        for name, encoding in encodings.items()
    }
    assert moved(encodings, found, biases) < 0.75 * moved(encodings, nearest, biases)
    assert {name: error.tokens for name, error in errors.items()} == dict.fromkeys(SHAPES, COUNTS[EXPERT])


def test_errors_are_those_of_the_tokens(tokens: LayerTokens) -> None:
    parts, errors = LayerCalibration(tokens, SILU, refined=False).encode(EXPERT, MIXED, matrices(), {})
    chosen = (tokens.experts == EXPERT).any(axis=1)
    x = inputs(1500).bfloat16().float()[chosen]
    weight = torch.from_numpy(tokens.weights[:, EXPERT][chosen])[:, None]
    found, source = decoded(MIXED, parts), matrices()
    for name, error in errors.items():
        lost = found[name].astype(np.float64) - source[name]
        assert error.error == pytest.approx((lost**2).sum(), rel=1e-6)
        assert error.norm == pytest.approx((source[name].astype(np.float64) ** 2).sum(), rel=1e-6)
        if name == "down":
            right, given = outputs(source, x, {}), outputs(found, x, {})
        else:
            right, given = x @ torch.from_numpy(source[name]).T, x @ torch.from_numpy(found[name]).T
        assert error.weighted == pytest.approx(
            float(((given - right) * weight).norm() / (right * weight).norm()), rel=1e-3
        )


def test_down_makes_up_for_what_the_others_lost() -> None:
    """Here inputs lie in few directions, and errors of gate and up can be seen in what they give."""
    directions = torch.randn(8, HIDDEN, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1500, 8, generator=torch.Generator().manual_seed(1)) @ directions
    one = np.zeros((1500, 1))
    tokens = LayerTokens(from_float32(x.numpy(), "BF16"), one.astype(np.int32), *[one.astype(np.float32) + 1] * 2)
    encodings = MIXED | {"down": Encoding("affine", "BF16", 8, 32)}
    parts, _ = LayerCalibration(tokens, SILU, refined=True).encode(EXPERT, encodings, matrices(), {})
    found, source = decoded(encodings, parts), matrices()
    right = outputs(source, x, {})
    moved, without = (
        float((outputs(found | {"down": down}, x, {}) - right).norm()) for down in (found["down"], source["down"])
    )
    assert moved < 0.8 * without


@pytest.mark.parametrize("expert", [RARE, NEVER])
def test_too_few_tokens(expert: int, tokens: LayerTokens) -> None:
    parts, errors = LayerCalibration(tokens, SILU, refined=True).encode(expert, MIXED, matrices(), {})
    assert parts == {}
    assert {name: (e.tokens, e.weighted) for name, e in errors.items()} == dict.fromkeys(SHAPES, (COUNTS[expert], None))


def test_other_matrices_are_left_alone(tokens: LayerTokens) -> None:
    layer = LayerCalibration(tokens, SILU, refined=True)
    parts, errors = layer.encode(EXPERT, {"down": affine_dq(3)}, matrices(), {})
    assert set(parts) == set(errors) == {"down"}
    assert errors["down"].weighted is not None
    assert errors["down"].weighted < 0.15


def test_same_bytes_for_any_workers_and_threads(tokens: LayerTokens) -> None:
    def all_of(layer: LayerCalibration, workers: int) -> list[bytes]:
        with ThreadPoolExecutor(workers) as pool:
            found = pool.map(lambda e: layer.encode(e, MIXED, matrices(), {})[0], [EXPERT, ALONE] * 2)
            return [array.tobytes() for parts in found for one in parts.values() for array in one.values()]

    threads = torch.get_num_threads()
    alone = all_of(LayerCalibration(tokens, SILU, refined=True), 1)
    torch.set_num_threads(4)
    try:
        assert all_of(LayerCalibration(tokens, SILU, refined=True), 4) == alone
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_numbers_that_are_none(bad: float, tokens: LayerTokens) -> None:
    values = matrices()
    values["up"][3, 7] = bad
    with pytest.raises(SourceError, match="expert 0, up: infinite or NaN values cannot be quantized"):
        LayerCalibration(tokens, SILU, refined=False).encode(EXPERT, MIXED, values, {})


def test_outputs_that_are_none(tokens: LayerTokens) -> None:
    values = matrices()
    values["up"] *= np.float32(1e25)
    with pytest.raises(SourceError, match="expert 0: what it does with the calibration's tokens is not finite"):
        LayerCalibration(tokens, SILU, refined=False).encode(EXPERT, MIXED, values, {})


def test_an_expert_without_a_gate(tokens: LayerTokens) -> None:
    encodings = {"up": affine_dq(2), "down": affine_dq(3)}
    values = {name: matrix for name, matrix in matrices().items() if name != "gate"}
    layer = LayerCalibration(tokens, named("relu2", gated=False), refined=True)
    parts, errors = layer.encode(EXPERT, encodings, values, {})
    assert set(parts) == set(errors) == {"up", "down"}
    weighted = errors["down"].weighted
    assert weighted is not None
    assert weighted < 0.3
