"""What ``plan`` and ``convert`` have in common: options that say what is made of a checkpoint."""

from __future__ import annotations

from typing import Annotated

import typer

Experts = Annotated[
    str,
    typer.Option(help="auto, source, q8, q6, q5, q4, q3, q2, dq4, dq3 or dq2; or by projection: gate_up=dq2,down=dq3."),
]
Dense = Annotated[str, typer.Option(help="auto, source, q8, q6, q5 or q4.")]
GroupSize = Annotated[int, typer.Option(help="Values per scale: 32, 64 or 128.")]
Codec = Annotated[str, typer.Option(help="raw, or zstd: each expert compressed; smaller, and slower to read.")]
Quality = Annotated[
    str, typer.Option(help="fast, default, high or max: how values are rounded; high and max need --calib.")
]
Calib = Annotated[str, typer.Option(help="Calibration file, as flashpack calibrate writes it; for high and max.")]
BitsPerWeight = Annotated[
    str, typer.Option(help="Bits per weight of all routed experts, such as 2.8: each expert gets its own width.")
]
CalibMemory = Annotated[str, typer.Option(help="Memory of the experts that are calibrated at once.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Files written at once. Default: one per processor.")]
