"""What calibrated rounding costs: seconds per 10^9 weights on one core, and on a GPU where there is one.

    python bench/gptq_speed.py [--tokens 2560] [--device cpu --device cuda]

Of an expert as Qwen3.5-397B-A17B has it: gate and up [1024, 4096], down [4096, 1024], random weights, inputs that lie
near some directions. ``tokens``: those that chose it, of 131,072 with 10 of 512 experts each about 2,560. The last row
is an expert from its tokens to its stored parts. Processor time on the CPU, time that passed on a GPU; the best of 3.
"""

from __future__ import annotations

import argparse
import math
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flashpack.converter.calibrated import LayerCalibration, damped
from flashpack.converter.gptq import feedback, gptq
from flashpack.formats.calibration import LayerTokens
from flashpack.formats.dtypes import from_float32
from flashpack.formats.records import Encoding, affine_dq
from flashpack.kernels.activations import named
from flashpack.kernels.cpu.quantize import quantize

WIDTH, HIDDEN = 1024, 4096
SHAPES = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
ENCODINGS = (affine_dq(2), Encoding("affine", "BF16", 2, 64))
ROUNDS = 3


def measure(device: str, work: Callable[..., object], *given: object) -> float:
    """Seconds that ``work`` takes with what is ``given``."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found = []
    for _ in range(ROUNDS):
        begun = clock()
        work(*given)
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(clock() - begun)
    return min(found)


def print_row(name: str, encoding: str, device: str, seconds: float, weights: int) -> None:
    each = seconds / weights * 1e9
    print(f"| {name} | {encoding} | {device} | {seconds:.2f} | {each:.0f} | {each * 397 / 3600:.1f} |", flush=True)


def inputs(count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(count, width // 8, generator=generator) @ torch.randn(width // 8, width, generator=generator)
    return few / (width // 8) ** 0.5 + torch.randn(count, width, generator=generator) / 4


def parts_of(device: str, weights: dict[str, Tensor]) -> None:
    """Rows for the steps of the work, of one expert."""
    for name, matrix in (("gate, up", torch.stack([weights["gate"], weights["up"]])), ("down", weights["down"])):
        x = inputs(2 * matrix.shape[-1], matrix.shape[-1])
        hessian = damped(x.T @ x / len(x)).to(device)
        print_row(f"{name}: factor of H", "", device, measure(device, feedback, hessian), matrix.numel())
        moved = matrix.to(device)
        for encoding in ENCODINGS:
            if device == "cpu":
                rows = matrix.reshape(-1, matrix.shape[-1]).numpy()
                seconds = measure(device, quantize, rows, "F32", encoding, "starts")
                print_row(f"{name}: starts", str(encoding), device, seconds, matrix.numel())
            for refined in (False, True):
                seconds = measure(device, gptq, moved, hessian, encoding, refined)
                step = "gptq-refined" if refined else "gptq"
                print_row(f"{name}: {step}", str(encoding), device, seconds, matrix.numel())


def experts_of(device: str, weights: dict[str, Tensor], tokens: int) -> None:
    """Rows for the whole of it."""
    data = LayerTokens(
        from_float32(inputs(tokens, HIDDEN).numpy(), "BF16"),
        np.zeros((tokens, 1), dtype=np.int32),
        *[np.ones((tokens, 1), dtype=np.float32)] * 2,
    )
    values = {name: matrix.numpy() for name, matrix in weights.items()}
    for encoding in ENCODINGS:
        encodings = dict.fromkeys(SHAPES, encoding)
        for refined in (False, True):
            layer = LayerCalibration(data, named("silu", gated=True), refined, device)
            layer.hessian()
            seconds = measure(device, layer.encode, 0, encodings, values, {})
            step = "gptq-refined" if refined else "gptq"
            print_row(f"whole expert: {step}", str(encoding), device, seconds, sum(map(math.prod, SHAPES.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2560)
    parser.add_argument("--device", action="append", help="cpu or cuda; repeatable")
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
    for device in args.device or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        if device == "cuda":
            print(torch.cuda.get_device_name())
        print(
            "\n| step | encoding | device | s | s per 10^9 weights | hours for 397 * 10^9 |\n|---|---|---|---|---|---|"
        )
        parts_of(device, weights)
        experts_of(device, weights, args.tokens)


if __name__ == "__main__":
    main()
