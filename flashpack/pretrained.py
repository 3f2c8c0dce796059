"""``from_pretrained`` of transformers' models opens packs, once flashpack has been imported.

transformers looks for weight files before it asks any of its quantizers, so there is no hook that a folder without them
could use: ``PreTrainedModel.from_pretrained`` gets a look at the folder first, and all that is no pack goes its way.
Neither import waits for the other: whichever is second finds the first.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "transformers.modeling_utils"
_MANIFEST = "flashpack.json"

_OPTIONS = ("device", "memory", "context", "check", "expect", "reference", "experts_per_token", "prefer_cached")
"""Arguments that are ``flashpack.load``'s."""

_HARMLESS = frozenset(
    {"config", "low_cpu_mem_usage", "local_files_only", "trust_remote_code", "use_safetensors", "cache_dir", "token",
     "revision", "code_revision", "subfolder", "force_download", "adapter_kwargs", "tp_plan", "state_dict",
     "attn_implementation", "experts_implementation"}
)  # fmt: skip
"""Of transformers' arguments, those that a pack has no use for. Others are refused unless they are None or False."""


def install() -> None:
    """Now, or when transformers is imported."""
    module = sys.modules.get(_MODULE)
    if module is not None:
        _extend(module)
    else:
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _extend(module)


def _extend(module: Any) -> None:
    kind = module.PreTrainedModel
    theirs = kind.from_pretrained.__func__

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_pack(pretrained_model_name_or_path):
            return _load(cls, pretrained_model_name_or_path, kwargs)
        return theirs(cls, pretrained_model_name_or_path, *args, **kwargs)

    from_pretrained.__doc__ = theirs.__doc__
    kind.from_pretrained = classmethod(from_pretrained)


def _is_pack(path: Any) -> bool:
    return isinstance(path, (str, os.PathLike)) and os.path.isfile(os.path.join(path, _MANIFEST))


def _load(cls: Any, path: Any, given: dict[str, Any]) -> Any:
    from flashpack.errors import UsageError
    from flashpack.runtime import load

    options = {name: given.pop(name) for name in _OPTIONS if name in given}
    options["device"] = _device(options.get("device"), given.pop("device_map", None))
    dtype = given.pop("dtype", None) or given.pop("torch_dtype", None)
    given.pop("torch_dtype", None)
    if dtype not in (None, "auto"):
        options["dtype"] = dtype
    for name, value in given.items():
        if name not in _HARMLESS and value not in (None, False):
            raise UsageError(f"{path} is a pack, which is loaded without {name}={value!r}; leave it out")
    model = load(path, **options)
    if not isinstance(model, cls):
        raise UsageError(f"{path} is a pack of {type(model).__name__}, not of {cls.__name__}")
    return model


def _device(device: Any, device_map: Any) -> str | None:
    """What ``load`` takes, of a map for the whole model."""
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values())) if set(device_map) == {""} else repr(device_map)
    chosen = device if device is not None else device_map
    return None if chosen in (None, "auto") else str(chosen)
