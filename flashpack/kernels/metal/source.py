"""The text that torch compiles: files of this folder joined, as torch takes no includes of ours.

Kernels come in parts, one library each, so that nobody waits for the compilation of formats that his model does not
have: ``FORMATS`` (products of matrices stored in a format), ``combine``, ``steps``.
"""

from __future__ import annotations

import re
from pathlib import Path

FORMATS = {
    **{f"affine{bits}": f"Affine<{bits}>" for bits in (2, 3, 4, 5, 6, 8)},
    **{f"affine_dq{bits}": f"AffineDq<{bits}>" for bits in (2, 3, 4)},
    "mxfp4": "Mxfp4",
    "nvfp4": "Nvfp4",
    "fp8": "Fp8",
    "bf16": "Plain<blocks::BF16>",
    "f16": "Plain<blocks::F16>",
    "f32": "Plain<blocks::F32>",
}
"""How matrices are stored, by the name that ends a kernel's name, with the type that formats.metal has for it."""

PRODUCTS = (
    "linear", "linear_many", "rows", "experts_up", "experts_up_many", "experts_down", "experts_down_many",
    "experts_sum",
)  # fmt: skip
"""Kernels of every format: ``linear_affine4`` and so on."""

PARTS = (*FORMATS, "combine", "steps")

_FOLDERS = (Path(__file__).parent, Path(__file__).parent.parent)


def source(*parts: str) -> str:
    """The source of some of ``PARTS``; without any, of all."""
    known: set[str] = set()
    text = ""
    for part in parts or PARTS:
        text += _file("experts.metal" if part in FORMATS else f"{part}.metal", known)
        if part in FORMATS:
            text += f"PRODUCTS({part}, {FORMATS[part]})\nEXPERTS({part}, {FORMATS[part]})\n"
    return text


def _file(name: str, known: set[str]) -> str:
    """A file with its includes in their places, each only the first time."""
    if name in known:
        return ""
    known.add(name)
    path = next(folder / name for folder in _FOLDERS if (folder / name).exists())
    text = path.read_text(encoding="ascii")
    return re.sub(r'^#include "(.+)"\n', lambda found: _file(found[1], known), text, flags=re.M)
