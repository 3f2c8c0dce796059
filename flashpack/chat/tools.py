"""Functions that a model may call: the user's own, from a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashpack.errors import UsageError

Function = Callable[..., Any]

_MODULE = "flashpack_chat_tools"


class Declined(Exception):
    """The user does not want this call: the turn ends with it."""


class Tools:
    """Functions by name. ``schemas``: as the OpenAI API describes them, from type hints and Google docstrings.

    Raises ``UsageError`` for a function that has not both, and for two with the same name.
    """

    def __init__(self, functions: list[Function]) -> None:
        from transformers.utils.chat_template_utils import get_json_schema

        self._functions: dict[str, Function] = {}
        self.schemas: list[dict[str, Any]] = []
        for one in functions:
            name = one.__name__
            if name in self._functions:
                raise UsageError(f"there are two tools called {name}; rename one")
            try:
                self.schemas.append(get_json_schema(one))
            except Exception as e:  # whatever a hint or a docstring of the user's makes of it
                why = " ".join(str(e).split())[:300]
                raise UsageError(
                    f"the tool {name} needs type hints, and a docstring that has each argument under 'Args:': {why}"
                ) from e
            self._functions[name] = one

    @property
    def names(self) -> list[str]:
        return list(self._functions)

    def call(self, name: str, arguments: str) -> str:
        """The result as JSON; what goes wrong is a result, too: ``{"error": ...}``. ``arguments``: a JSON object.

        Raises ``Declined``.
        """
        function = self._functions.get(name)
        if function is None:
            return _json({"error": f"there is no tool {name}; there are: {', '.join(self._functions)}"})
        given = json.loads(arguments)
        if not isinstance(given, dict):
            return _json({"error": "the arguments are no object"})
        try:
            inspect.signature(function).bind(**given)
        except TypeError as e:
            return _json({"error": f"{name}: {e}"})
        try:
            return _json(function(**given))
        except Declined:
            raise
        except (Exception, SystemExit) as e:
            return _json({"error": f"{type(e).__name__}: {e}"})


def _json(value: Any) -> str:
    # A lone half of a character is nothing a tokenizer takes.
    return json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", "replace").decode()


def functions_of(path: Path) -> list[Function]:
    """Run a Python file of the user's; the functions in its ``__all__``, else the public ones defined in it.

    Raises ``UsageError`` if it fails or has none.
    """
    spec = importlib.util.spec_from_file_location(_MODULE, path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"--tools {path}: no Python file (.py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # where dataclasses and type hints look
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        raise UsageError(f"--tools {path} fails: {type(e).__name__}: {' '.join(str(e).split())[:300]}") from e
    found: list[Any]
    chosen = getattr(module, "__all__", None)
    if chosen is None:
        found = [
            one
            for name, one in vars(module).items()
            if inspect.isfunction(one) and one.__module__ == _MODULE and not name.startswith("_")
        ]
    else:
        found = [getattr(module, str(name), None) for name in chosen]
        for name, one in zip(chosen, found, strict=True):
            if not inspect.isfunction(one):
                raise UsageError(f"--tools {path}: {name} of its __all__ is no function")
    if not found:
        raise UsageError(f"--tools {path}: there is no public function in it")
    return found
