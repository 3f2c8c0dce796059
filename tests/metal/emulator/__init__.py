"""An emulator of Metal's execution model: kernels are compiled with clang++ and run on the processor.

``FakeMps`` stands in for an Apple GPU: see fake_mps.py. ``include`` is Metal's standard library, ``runtime`` runs
threads as fibers, SIMD groups of 32, barriers and threadgroup memory.
"""

from .fake_mps import FakeMps
from .library import time_limit

__all__ = ["FakeMps", "time_limit"]
