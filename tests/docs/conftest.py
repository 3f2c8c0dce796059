"""The shelf of the pages' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.place import Shelf
from tests.docs.shell import prepared


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("docs")
    with prepared(folder) as programs:
        (folder / "shelf").mkdir()
        yield Shelf.made(folder / "shelf", programs)
