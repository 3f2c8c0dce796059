"""flashpack: run Mixture-of-Experts models that do not fit in memory.

The functions under the commands, loaded on first use so that ``import flashpack`` stays light:
``convert``, ``verify``, ``repair``, ``recode`` and ``load``. Every error derives from
``flashpack.errors.FlashpackError``. After the import, ``from_pretrained`` of transformers' models opens packs, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flashpack import pretrained
from flashpack.version import __version__

if TYPE_CHECKING:
    from flashpack.converter import convert, recode, repair
    from flashpack.formats import verify
    from flashpack.runtime import load

__all__ = ["__version__", "convert", "load", "recode", "repair", "verify"]

_HOMES = {
    "convert": "flashpack.converter",
    "recode": "flashpack.converter",
    "repair": "flashpack.converter",
    "verify": "flashpack.formats",
    "load": "flashpack.runtime",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flashpack' has no attribute {name!r}")


pretrained.install()
