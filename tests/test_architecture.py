"""The house: what may import what, that importing does nothing, and which Python it needs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT


def modules_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import flashpack", {"torch", "transformers", "numpy", "typer"}),
        ("import flashpack.formats", {"torch", "transformers", "safetensors", "typer", "tqdm"}),
        ("from flashpack import verify", {"torch", "transformers", "typer"}),
        ("import flashpack.converter", {"torch", "transformers", "typer"}),
        ("import flashpack.runtime", {"torch", "transformers", "typer"}),
    ],
)
def test_imports_are_lean(code: str, absent: set[str]) -> None:
    assert not modules_after(code) & absent


def test_pinned_versions_take_the_oldest_python() -> None:
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    wanted = {
        name: SpecifierSet(metadata.metadata(name).get("Requires-Python") or "")
        for name in pinned
        if any(metadata.distributions(name=name))
    }
    assert len(wanted) > 50
    assert not {name: str(versions) for name, versions in wanted.items() if f"{oldest}.0" not in versions}


def test_only_the_command_line_prints() -> None:
    for path in (ROOT / "flashpack").rglob("*.py"):
        if "cli" not in path.parts:
            assert not re.search(r"(?<![\w.])print\(", path.read_text()), path


def test_no_file_is_longer_than_600_lines() -> None:
    for path in [*(ROOT / "flashpack").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 600, path


def test_every_error_has_a_code_of_its_own_and_an_exit_code() -> None:
    from flashpack import errors

    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.FlashpackError)]
    assert len({e.code for e in kinds}) == len(kinds)
    assert all(1 < e.exit_code < 126 for e in kinds)
