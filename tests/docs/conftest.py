"""The shelf of the pages' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.commands import prepared
from tests.docs.hub import hub
from tests.docs.place import Shelf, readers


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "shelf").mkdir()
    with hub() as settings:
        environment = readers() | settings
        with prepared(folder, environment) as programs:
            yield Shelf.made(folder / "shelf", programs, environment)
