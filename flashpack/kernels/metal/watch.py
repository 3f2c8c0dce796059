"""A GPU whose launches are noted, and one without shared memory: what the self-test looks through."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from flashpack.kernels.metal.device import Gpu


class Watched:
    """``gpu``, and what is done with it. ``launched``: names of kernels, since somebody emptied it; ``launches`` and
    ``waits`` count."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu, self.device = gpu, gpu.device
        self.launched: set[str] = set()
        self.launches = self.waits = 0
        self._groups: dict[str, int] = {}
        self._kernels: dict[str, Any] = {}
        self._libraries: dict[str, Any] = {}

    def compile(self, source: str) -> _Library:
        if source not in self._libraries:
            self._libraries[source] = self._gpu.compile(source)
        return _Library(self._libraries[source], self)

    def host(self, tensor: Tensor) -> Tensor | None:
        return self._gpu.host(tensor)

    def commit(self) -> None:
        self._gpu.commit()

    def wait(self) -> None:
        self.waits += 1
        self._gpu.wait()

    def limits(self) -> dict[str, tuple[int, int, int]]:
        """Of each kernel that was launched: the width of its SIMD groups, the most threads that a group of it can have,
        and the most that one had."""
        return {
            name: (kernel.thread_execution_width, kernel.max_threads_per_threadgroup, self._groups[name])
            for name, kernel in self._kernels.items()
        }

    def launch(self, library: Any, name: str, arguments: tuple[Any, ...], how: dict[str, Any]) -> None:
        """Note, and launch, a kernel; it is looked up now, so that one that cannot be made keeps no other from it."""
        self.launched.add(name)
        self.launches += 1
        kernel = self._kernels[name] = getattr(library, name)
        size = how["group_size"]
        self._groups[name] = max(size if isinstance(size, int) else math.prod(size), self._groups.get(name, 0))
        kernel(*arguments, **how)


class _Library:
    """Kernels by name."""

    def __init__(self, library: Any, watched: Watched) -> None:
        self._library, self._watched = library, watched

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._library) if not name.startswith("_")]

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **how: self._watched.launch(self._library, name, arguments, how)


class Unshared:
    """``gpu``, of whose memory the processor sees nothing."""

    def __init__(self, gpu: Gpu) -> None:
        self.device = gpu.device
        self.compile, self.commit, self.wait = gpu.compile, gpu.commit, gpu.wait

    def host(self, tensor: Tensor) -> None:
        return None
