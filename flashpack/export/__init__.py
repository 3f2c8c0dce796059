"""A pack becomes files that other engines read: Hugging Face checkpoints, MLX's, those of flash-moe.

``export`` = open the pack, ask the target what it will write, write it under a temporary name, rename. Every byte of
the pack is compared with its digest on the way. What an export cannot hold is named in ``Report.losses``.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashpack.errors import UsageError
from flashpack.export.content import Content, Progress
from flashpack.export.folder import OutputFolder
from flashpack.export.options import SHARD_BYTES, Options
from flashpack.formats import Pack

__all__ = ["TARGETS", "Report", "export"]

TARGETS = {
    "hf": "flashpack.export.hf",
    "mlx": "flashpack.export.mlx",
    "flash-moe": "flashpack.export.flash_moe",
}
"""Name of a target -> the module whose ``prepare(content, options)`` gives its ``Prepared``."""


@dataclass(frozen=True)
class Report:
    """Result of ``export``. ``identity``: of the pack; ``files``: path -> bytes; ``losses``: a line for each thing that
    the export lacks of the pack or of the checkpoint behind it, or has changed."""

    out: str
    to: str
    identity: str
    files: dict[str, int]
    losses: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"bytes": sum(self.files.values())}


def export(
    pack: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    weights: str | None = None,
    shard_size: int = SHARD_BYTES,
    overwrite: bool = False,
    on_start: Callable[[int], object] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write ``pack`` to the new folder ``out`` in the form ``to``: one of ``TARGETS``.

    ``weights``: how they are stored, where the target has a choice; None: its default. ``shard_size``: bytes after
    which a safetensors file ends, where there are several. ``overwrite``: replace an earlier export. ``on_start`` is
    called with the bytes of the pack that will be read, ``progress`` with those that have been since.

    Raises ``UsageError``, ``UnsupportedError`` where the target has no place for this model or its encodings,
    ``IntegrityError`` where the pack is damaged, ``OutputError`` for the target folder, which is then as it was.
    """
    if to not in TARGETS:
        raise UsageError(f"--to {to}: choose from {', '.join(TARGETS)}")
    if shard_size < 1:
        raise UsageError(f"--shard-size {shard_size}: at least one byte")
    opened = Pack(pack)
    opened.check_copies()
    content = Content(opened, progress or (lambda count: None))
    folder = OutputFolder(Path(out), opened.folder, overwrite)
    prepared = importlib.import_module(TARGETS[to]).prepare(content, Options(weights, shard_size))
    folder.check_space(prepared.nbytes)
    if on_start:
        on_start(content.nbytes)
    with folder.writing() as partial:
        losses = [*prepared.losses, *prepared.write(partial)]
        files = folder.finish({"pack": opened.identity, "to": to, "losses": losses})
    return Report(str(folder.path), to, opened.identity, files, losses)
