"""Progress of commands that do one thing after another."""

from __future__ import annotations

from typing import Any

from flashpack.cli.console import progress_bar


class Bars:
    """One bar at a time; the last one is closed at the end of the ``with``."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def begin(self, text: str, total: int, unit: str = "B") -> None:
        self.__exit__()
        self._bar = progress_bar(total, text, unit=unit)

    def advance(self, count: int) -> None:
        self._bar.update(count)
