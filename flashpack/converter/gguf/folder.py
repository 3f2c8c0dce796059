"""The folder of a GGUF file as a checkpoint's: its own small files, and those made from the metadata."""

from __future__ import annotations

from flashpack.converter.folder import GGUF
from flashpack.converter.made import MadeFolder


class GgufFolder(MadeFolder):
    """Other files in the folder are not the model's: it may hold several models, or none but this."""

    def where(self, file: str) -> str:
        return f"{self.name} ({file}, made from the metadata)" if file in self._made else super().where(file)

    def files(self) -> list[str]:
        return [name for name in super().files() if name in self._made or name.endswith(GGUF) or "LICENSE" in name]
