"""What the doctor says: a fact, or something that should be done."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

LEVELS = ("ok", "note", "problem")
"""A fact; worth knowing, and flashpack works; something does not work."""


@dataclass(frozen=True)
class Remark:
    """``area``: machine, kernels, disk or pack; ``name``: of what; ``todo``: the next step, for all but "ok".
    ``data``: the numbers behind ``text`` (bytes, seconds), as JSON."""

    level: str
    area: str
    name: str
    text: str
    todo: str = ""
    data: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.level not in LEVELS or (self.level == "ok") == bool(self.todo):
            raise ValueError(f"{self.area}, {self.name}: {self.level!r} with {self.todo!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
