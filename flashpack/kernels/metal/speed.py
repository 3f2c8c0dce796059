"""How fast the GPU computes: products of each format, a layer of a large model, launches and waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from flashpack.formats.records import MXFP4, Encoding, affine_dq, align, fp8, nvfp4
from flashpack.kernels.metal.cases.samples import Samples, to
from flashpack.kernels.metal.device import Gpu
from flashpack.kernels.metal.kernels import MetalKernels
from flashpack.kernels.metal.layer import LARGE, Layer, Sizes
from flashpack.kernels.metal.watch import Watched

ENCODINGS = (
    *(Encoding("affine", "BF16", bits, 64) for bits in (2, 3, 4, 5, 6, 8)), *map(affine_dq, (2, 3, 4)), MXFP4,
    nvfp4("multiply"), fp8("F32", (128, 128)), *(Encoding("raw", dtype) for dtype in ("BF16", "F16", "F32")),
)  # fmt: skip

LAYERS = {"recurrent": 45, "attention": 15}
"""Of Qwen3.5-397B."""

ROUNDS = 3
"""The fastest counts."""


@dataclass(frozen=True)
class LayerSpeed:
    """One layer for one token, everything in memory. ``rate``: of its weights, in bytes per second."""

    launches: int
    waits: int
    seconds: float
    rate: float


@dataclass(frozen=True)
class Speed:
    """``products``: bytes per second of a matrix times one token. ``layers``: by kind, empty where a step is refused.
    Seconds of a launch, and of a launch that is waited for."""

    products: dict[str, float]
    layers: dict[str, LayerSpeed]
    launch: float
    wait: float

    @property
    def token(self) -> LayerSpeed | None:
        """All layers of a token of Qwen3.5-397B, with launches for its embedding, last norm and head, and a wait for
        its logits."""
        if not self.layers:
            return None
        of = [(count, self.layers[kind]) for kind, count in LAYERS.items()]
        seconds = sum(count * layer.seconds for count, layer in of)
        rate = sum(count * layer.seconds * layer.rate for count, layer in of) / seconds
        launches, waits = (sum(count * getattr(layer, name) for count, layer in of) for name in ("launches", "waits"))
        return LayerSpeed(launches + 3, waits + 1, seconds, rate)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"token": asdict(self.token) if self.token else None}


def measure(gpu: Gpu, refused: Iterable[str], sizes: Sizes = LARGE, nbytes: int = 2**26, times: int = 20) -> Speed:
    """Without kernels that are ``refused``. Matrices have ``nbytes``; all is done ``times`` times in a round."""
    watched = Watched(gpu)
    unused = frozenset(refused)
    kernels = MetalKernels(watched, unused)

    def seconds(run: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(ROUNDS + 1):  # the first is to warm up
            kernels.wait()
            begun = time.perf_counter()
            for _ in range(times):
                run()
            kernels.wait()
            best = min(best, (time.perf_counter() - begun) / times)
        return best

    products = {}
    for encoding in ENCODINGS:
        width = sizes.hidden
        # A multiple of 8, so that blocks of values are whole in every encoding.
        rows = align(int(nbytes / (width * encoding.bits_per_weight() / 8)), 8)
        samples = Samples(0)
        x = samples.normal(1, width).to(kernels.device)
        matrix = to(kernels.device, samples.matrix(encoding, rows, width))
        size = rows * width * encoding.bits_per_weight() / 8
        # Kernels keep what they know of a matrix, and so the matrix: these are gone with theirs.
        products[str(encoding)] = size / seconds(partial(MetalKernels(watched, unused).linear, x, matrix))
    layers = {}
    for kind in LAYERS if kernels.steps() is not None else ():
        layer = Layer(kernels, kind, sizes)
        layer()
        launches, waits = watched.launches, watched.waits
        layer()
        counted = watched.launches - launches, watched.waits - waits
        taken = seconds(layer)
        layers[kind] = LayerSpeed(*counted, taken, layer.nbytes / taken)
    outputs, weights = torch.zeros(1, 8, device=kernels.device), torch.ones(1, 1, device=kernels.device)
    places = torch.zeros(1, 1, dtype=torch.int32, device=kernels.device)

    def launch() -> None:
        kernels.combine(outputs, places, weights)

    def launch_and_wait() -> None:
        launch()
        kernels.wait()

    return Speed(products, layers, seconds(launch), seconds(launch_and_wait))
