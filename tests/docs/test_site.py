"""The pages as a site: all of them are in it, and every link leads somewhere, there and in the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.pages import PAGES, prose

_LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of the headings of ``page``, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", h)).strip().lower().replace(" ", "-")
        for h in headings
    }


@pytest.mark.parametrize("page", [*PAGES, ROOT / "SPEC.md"], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    broken = []
    for link in _LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        if ":" in path:
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    """Warned of are a page outside the nav, a link or anchor without a target, a name of the reference that is gone."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    reference = (tmp_path / "site" / "api.html").read_text()
    for name in (
        "flashpack.converter.convert.convert",
        "flashpack.runtime.load.load",
        "flashpack.runtime.session.Session.answer",
    ):
        assert f'id="{name}"' in reference
    assert "continues when called again" in reference  # a docstring
    shutil.rmtree(tmp_path / "site")
