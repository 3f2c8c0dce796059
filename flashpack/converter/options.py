"""What the user of a conversion may choose."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flashpack.errors import UsageError
from flashpack.formats import constants as C
from flashpack.formats.records import PROJECTIONS, Encoding

WIDTHS = ("q8", "q6", "q5", "q4", "q3", "q2", "dq4", "dq3", "dq2")
"""Affine integers of so many bits in groups; ``dq``: with scales that are quantized themselves (``affine_dq``)."""

EXPERT_CHOICES = ("auto", "source", *WIDTHS)
DENSE_CHOICES = ("auto", "source", "q8", "q6", "q5", "q4")

CANDIDATES = ("dq2", "dq3", "dq4")
"""Widths that experts may get where each gets its own, the narrowest first."""

QUANTIZERS = {"fast": "minmax", "default": "starts", "high": "gptq", "max": "gptq-refined"}
"""Quality -> how values are rounded, as the recipe names it."""

COSTS = {"minmax": 2, "starts": 20, "gptq": 290, "gptq-refined": 1030}
"""Seconds of one core for 10^9 weights, about: the largest of docs/quality.md."""

CALIBRATED = ("gptq", "gptq-refined")
"""Quantizers that need the model's own activations."""

_NUMBER = re.compile(r"\d{1,2}(\.\d{1,4})?")


@dataclass(frozen=True)
class Options:
    """What the user may choose. ``auto`` carries a quantized source over, else q4 for experts and q8 for dense.

    ``experts``: one of ``EXPERT_CHOICES`` or of ``WIDTHS`` by projection ("gate_up=q2,down=q4", or only the bits).
    ``quality``: one of ``QUANTIZERS``. ``calib``: a calibration file, as a path. ``bpw``: bits per weight of all
    routed experts together, as text; then each expert gets its own width. ``calib_memory``: bytes that experts may
    take together while they are calibrated; it changes no result.
    """

    experts: str = "auto"
    dense: str = "auto"
    group_size: int = 64
    codec: str = "raw"
    quality: str = "default"
    calib: str = ""
    bpw: str = ""
    calib_memory: int = 4 * 10**9

    def __post_init__(self) -> None:
        if self.codec not in C.CODECS:
            raise UsageError(f"--codec {self.codec}: choose from {', '.join(C.CODECS)}")
        object.__setattr__(self, "experts", _normal(self.experts))
        if self.dense not in DENSE_CHOICES:
            raise UsageError(f"--dense {self.dense}: choose from {', '.join(DENSE_CHOICES)}")
        if self.group_size not in C.GROUP_SIZES:
            raise UsageError(f"--group-size {self.group_size}: choose from {', '.join(map(str, C.GROUP_SIZES))}")
        if self.quality not in QUANTIZERS:
            raise UsageError(f"--quality {self.quality}: choose from {', '.join(QUANTIZERS)}")
        if self.quantizer in CALIBRATED and not self.calib:
            raise UsageError(
                f"--quality {self.quality} needs --calib FILE: make a pack with --experts source --dense source, "
                f"then run flashpack calibrate on it"
            )
        if self.calib and self.quantizer not in CALIBRATED:
            raise UsageError(f"--calib: --quality {self.quality} does not use it; choose high or max")
        if self.bpw and self.experts != "auto":
            raise UsageError("--bpw chooses the experts' widths; leave out --experts")
        if self.bpw and not (_NUMBER.fullmatch(self.bpw) and float(self.bpw) > 0):
            raise UsageError(f"--bpw {self.bpw}: not a number of bits such as 2.8")

    @property
    def quantizer(self) -> str:
        """One of the values of ``QUANTIZERS``."""
        return QUANTIZERS[self.quality]


def cost(options: Options) -> int:
    """Seconds of one core for 10^9 weights, about. To choose widths takes a search, or GPTQ, for each candidate."""
    choosing = COSTS["gptq"] if options.calib else len(CANDIDATES) * COSTS["starts"]
    return COSTS[options.quantizer] + (choosing if options.bpw else 0)


def by_projection(experts: str) -> dict[str, str]:
    """Projection -> choice; ``experts`` as ``Options`` has it."""
    if "=" not in experts:
        return dict.fromkeys(PROJECTIONS, experts)
    chosen = dict(part.split("=") for part in experts.split(","))
    return {name: chosen[name if name == "down" else "gate_up"] for name in PROJECTIONS}


def encoding_of(choice: str, group_size: int) -> Encoding:
    """The encoding that one of ``WIDTHS`` means."""
    if choice.startswith("dq"):
        return Encoding("affine_dq", "BF16", int(choice[2:]), C.DQ_GROUP)
    return Encoding("affine", "BF16", int(choice[1:]), group_size)


def _normal(experts: str) -> str:
    """The one way to write a choice of experts; refuses what is none."""
    if experts in EXPERT_CHOICES:
        return experts
    found: dict[str, str] = {}
    for part in experts.split(",") if "=" in experts else []:
        name, _, width = part.strip().partition("=")
        found[name] = f"q{width}" if width.isdigit() else width
    if set(found) != {"gate_up", "down"} or not set(found.values()) <= set(WIDTHS):
        raise UsageError(
            f"--experts {experts}: choose from {', '.join(EXPERT_CHOICES)}, or by projection as gate_up=dq2,down=q4"
        )
    return f"gate_up={found['gate_up']},down={found['down']}"
