"""What the checks of pages are to find: a page that is wrong in one place."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.docs.grammar import complaint, complaint_of_mention
from tests.docs.pages import Block, blocks, calls
from tests.docs.place import Shelf
from tests.docs.running import run


def page(text: str, tmp_path: Path) -> list[Block]:
    path = tmp_path / "page.md"
    path.write_text(text)
    return blocks(path)


def test_blocks_their_languages_and_reasons(tmp_path: Path) -> None:
    text = """a
<!-- not run: needs a Mac -->
```sh
one \\
  two # exit code 3
# note
three
```

- b

    ```console
    $ x
    y
    ```
"""
    first, second = page(text, tmp_path)
    assert (first.language, first.reason, second.language, second.reason) == ("sh", "needs a Mac", "console", "")
    assert [(c.text, c.exit_code, c.where.rpartition(":")[2]) for c in first.commands()] == [
        ("one \\\n  two # exit code 3", 3, "4"),
        ("three", 0, "7"),
    ]
    assert [(c.text, c.shown) for c in second.commands()] == [("x", ("y",))]


def test_the_calls_in_a_line() -> None:
    line = 'A=1 flashpack run P -p "a | b" > out | flashpack verify - && echo flashpack x; flashpack plan \\\n'
    line += "  --json # flashpack y"
    assert list(calls(line)) == [["run", "P", "-p", "a | b"], ["verify", "-"], ["plan", "--json"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("convert SRC --expert q4", "No such option"),
        ("convert", "Missing argument"),
        ("frobnicate PACK", "frobnicate"),
        ("serve PACK --port 99999", "Invalid value"),
        ("convert SRC --experts q4", ""),
        ("--version", ""),
    ],
)
def test_command_lines_that_flashpack_does_not_have(arguments: str, said: str) -> None:
    found = complaint(arguments.split())
    assert said in found
    assert bool(found) == bool(said)


def test_mentions() -> None:
    assert complaint_of_mention("flashpack run --prefer 0.7") == "run: no option --prefer"
    assert complaint_of_mention("flashpack run --prefer-cached 0.7") == ""
    assert complaint_of_mention("flashpack frobnicate") != ""
    assert complaint_of_mention("flashpack COMMAND --help") == ""


def test_what_is_wrong_is_found_when_it_is_run(shelf: Shelf, tmp_path: Path) -> None:
    text = """```sh
flashpack inspect PACK
flashpack inspect PACK --jsom
flashpack inspect no-such-pack
flashpack inspect PACK  # exit code 4
false | true
cat nothing.txt
```
```console
$ flashpack inspect PACK
PACK: format version 1, ... files
identity   0000
$ flashpack inspect no-such-pack  # exit code 4
flashpack: no-such-pack: ...
```
```python
raise SystemExit(open("PACK/flashpack.json").read() == "")
```
```python
import no_such_module
```
"""
    found = page(text, tmp_path)
    (tmp_path / "place").mkdir()
    complaints = [outcome.complaint() for outcome in run(found, shelf, tmp_path / "place")]
    expected = ["", "ends with 2", "ends with 4", "ends with 0, not 4", "ends with 1", "ends with 1"]
    expected += ["no such line, or not in this order: identity   0000", "", "", "ends with 1"]
    assert len(complaints) == len(expected)
    for said, part in zip(complaints, expected, strict=True):
        assert part in said
        assert bool(part) == bool(said)


def test_a_server_that_does_not_start_is_found(shelf: Shelf, tmp_path: Path) -> None:
    found = page("```sh\nflashpack serve no-such-pack\n```\n", tmp_path)
    (tmp_path / "place").mkdir()
    (outcome,) = run(found, shelf, tmp_path / "place")
    assert "ends with 4" in outcome.complaint()


def test_what_is_wrong_with_the_site_is_found(tmp_path: Path) -> None:
    """The settings of mkdocs.yml, on a site of two pages."""
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Page\n[x](nothing.md) [x](#nowhere)\n")
    (tmp_path / "docs" / "forgotten.md").write_text("# Page\n")
    validation = settings[settings.index("validation:") :]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\nnav: [index.md]\n{validation}")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    for wrong in ("nothing.md", "#nowhere", "forgotten.md"):
        assert wrong in done.stderr
