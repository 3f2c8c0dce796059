"""Writes docs/families.md: every family is tried, and what comes of it is a row."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import transformers
from transformers import PretrainedConfig

import flashpack
from flashpack.errors import UnsupportedError
from tests.conftest import ROOT
from tests.families.document import DOCUMENT, Row, table
from tests.families.table import FAMILIES, REFUSED, Family
from tests.families.trial import run, write_config


def tried(name: str, family: Family, folder: Path) -> Row:
    outcome = run(family, folder)
    remark = f"built as {outcome.manifest.model['architecture']}" if family.model else ""
    return Row(name, outcome.difference, remark)


def refused(name: str, config: Callable[[], PretrainedConfig], folder: Path) -> Row:
    write_config(config(), folder / "source")
    try:
        flashpack.convert(folder / "source", folder / "pack")
    except UnsupportedError as e:
        return Row(name, None, str(e))
    raise AssertionError(f"{name} is not refused")


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    rows = []
    attempts: dict[str, Callable[[Path], Row]] = {n: partial(tried, n, f) for n, f in FAMILIES.items()}
    attempts |= {n: partial(refused, n, config) for n, (config, _) in REFUSED.items()}
    for attempt in attempts.values():
        with tempfile.TemporaryDirectory() as folder:
            rows.append(attempt(Path(folder)))
        print(rows[-1], flush=True)
    (ROOT / DOCUMENT).parent.mkdir(exist_ok=True)
    (ROOT / DOCUMENT).write_text(table(rows, transformers.__version__))


if __name__ == "__main__":
    main()
