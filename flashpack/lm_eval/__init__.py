"""Packs as a model of EleutherAI's lm-evaluation-harness, under the name ``flashpack``.

lm_eval finds no models of other packages by itself, so its command is started as ``python -m flashpack.lm_eval``, with
lm_eval's own arguments; who calls ``lm_eval.simple_evaluate`` calls ``register`` before.
"""

from __future__ import annotations

from flashpack.errors import UsageError

NAME = "flashpack"


def register() -> None:
    """Make ``--model flashpack`` known to lm_eval. Raises ``UsageError`` where lm_eval is not installed."""
    try:
        from lm_eval.api.registry import model_registry  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ModuleNotFoundError as e:
        raise UsageError(f"lm_eval cannot be imported ({e}): pip install 'flashpack-moe[eval]'") from e
    # With a class in the place of its name, lm_eval has used it already, and refuses to have it named again.
    if NAME not in model_registry:
        model_registry.register(NAME, target="flashpack.lm_eval.model:PackLM")
