"""Online: a pack becomes a model that runs within a memory budget."""

from flashpack.runtime.load import Runtime, load

__all__ = ["Runtime", "load"]
