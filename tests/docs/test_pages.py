"""Every command of every page is run, or says why not and is at least one that flashpack has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.grammar import all_options, complaint, complaint_of_mention
from tests.docs.pages import PAGES, REASONS, RUN, blocks, calls, prose
from tests.docs.place import Shelf
from tests.docs.running import run

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
RUNNABLE = [
    name
    for name, page in zip(NAMES, PAGES, strict=True)
    if any(b.language in RUN and not b.reason for b in blocks(page))
]

_OTHERS = {
    *("--llama", "--llama-bin", "--only", "--turns"),  # bench
    *("--no-mtp", "--repack"),  # llama.cpp
    *("--apply_chat_template", "--include_path", "--limit", "--num_fewshot", "--output_path", "--tasks"),  # lm_eval
}
"""Options of other programs."""

_INSTALLS = re.compile(r"(sudo|apt|apt-get|brew|make|pip|git)\b|python3? -m (pip|venv)")


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_commands_of_a_page_do_what_it_says(name: str, shelf: Shelf, tmp_path: Path) -> None:
    chosen = [b for b in blocks(ROOT / name) if b.language in RUN and not b.reason]
    for command in (c for b in chosen for c in b.commands()):
        assert not _INSTALLS.match(command.text), f"{command.where}: not in a test; mark the block as not run"
    complaints = [outcome.complaint() for outcome in run(chosen, shelf, tmp_path)]
    assert not any(complaints), "\n".join(filter(None, complaints))


@pytest.mark.parametrize("name", NAMES)
def test_commands_that_are_not_run_are_ones_that_flashpack_has(name: str) -> None:
    for block in blocks(ROOT / name):
        assert not block.reason or block.reason in REASONS, f"{block.where()}: {block.reason!r} is no reason"
        commands = block.commands()
        if block.language in {"", "text"}:
            assert block.language or not re.search(r"^(\$ )?flashpack ", block.text, re.M), (
                f"{block.where()}: sh or console?"
            )
        for command in commands:
            for arguments in calls(command.text):
                assert not (said := complaint(arguments)), f"{command.where}: {said}"


@pytest.mark.parametrize("name", NAMES)
def test_commands_and_options_that_are_mentioned_exist(name: str) -> None:
    mentions = re.findall(r"`([^`]*)`", prose(ROOT / name))
    complaints = [complaint_of_mention(text) for text in mentions if re.match(r"flashpack\s", text)]
    options = {word.split("=")[0] for text in mentions if text.startswith("--") for word in text.split()}
    unknown = {option for option in options if option.startswith("--")} - all_options() - _OTHERS
    assert [*filter(None, complaints), *sorted(unknown)] == []


def test_extras_that_are_mentioned_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    mentioned = {extra for page in PAGES for extra in re.findall(r"flashpack-moe\[(\w+)\]", page.read_text())}
    assert mentioned
    assert mentioned - project["optional-dependencies"].keys() == set()
