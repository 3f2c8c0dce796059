"""What a check finds, and the regions of a pack that it reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing wrong with a pack. ``section`` is the region of the file: manifest, header, record, table,
    digests, tensor, padding or file; ``offset`` its first byte; ``expected`` and ``found`` are digests or sizes."""

    code: str
    file: str
    section: str
    message: str
    layer: int | None = None
    expert: int | None = None
    tensor: str | None = None
    offset: int | None = None
    expected: str | int | None = None
    found: str | int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        place = [self.file]
        if self.layer is not None:
            place.append(f"layer {self.layer}")
        if self.expert is not None:
            place.append(f"expert {self.expert}")
        if self.tensor is not None:
            place.append(f"tensor {self.tensor}")
        if self.offset is not None:
            place.append(f"{self.section} at byte {self.offset}")
        text = f"{', '.join(place)}: {self.message}"
        if self.expected is not None or self.found is not None:
            text += f" (expected {self.expected}, found {self.found})"
        return text


@dataclass(frozen=True)
class Region:
    """Bytes with a digest of their own: a record (``expert``) or a dense tensor (``tensor``).

    ``frame``, for a compressed record: (bytes of the frame, bytes and digest of the record it holds).
    """

    path: str
    offset: int
    size: int
    expected: str
    layer: int | None = None
    expert: int | None = None
    tensor: str | None = None
    frame: tuple[int, int, str] | None = None

    def finding(
        self, code: str, section: str, message: str, expected: str | None = None, found: str | None = None
    ) -> Finding:
        """Something wrong with this region."""
        return Finding(
            code, self.path, section, message, self.layer, self.expert, self.tensor, self.offset, expected, found
        )
