"""Charts: what is in them, equal bytes, no half files, and one line where matplotlib is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flashpack.errors import OutputError, UsageError
from flashpack.performance.compare import chart, compare, sizes_of
from flashpack.performance.plots import Bars, Chart, Line, draw
from flashpack.performance.policies import POLICIES
from tests.performance.routings import made_up

LINES = {"a": Line([(10, 20.0), (0, 10.0)], bold=True), "b < c": Line([(0, 5.0)], dashed=True)}
CHART = Chart("of lines", "memory, GB", "tokens/s", LINES, above=("per cent", 10))
BARS = Bars("of bars", "memory", "ms", ["1 GB", "2 GB"], {f"part {i}": [i, 2.0 * i] for i in range(8)})


def texts(path: Path) -> set[str]:
    return {(e.text or "").strip() for e in ElementTree.parse(path).iter() if e.tag.endswith("text")}


def test_labels_and_names_are_text_and_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        draw(tmp_path / name, CHART, BARS)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    expected = {"of lines", "memory, GB", "tokens/s", "per cent", "a", "b < c", "of bars", "ms", "2 GB", "part 7"}
    assert expected <= texts(tmp_path / "a.svg")
    assert b"<dc:date>" not in (tmp_path / "a.svg").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


def test_hit_rates_are_drawn_where_they_are() -> None:
    routing = made_up(1, (4, *[1] * 30))
    rows = compare(routing, sizes_of(routing, "25%,50%"))
    drawn = chart(routing, rows, "a.routing")
    assert set(drawn.lines) == set(POLICIES)
    assert drawn.title == "a.routing: hit rates of decoded tokens"
    assert drawn.lines["LRU"].points == [
        (25.0, 100 * rows[0].found["LRU"].decoded.rate),
        (50.0, 100 * rows[1].found["LRU"].decoded.rate),
    ]
    assert drawn.above == ("memory for experts, MB", pytest.approx(24 * 16384 / 1e8))
    prompts = made_up(1, (4, 9))
    rows = compare(prompts, sizes_of(prompts, "50%"))
    assert chart(prompts, rows, "").lines["LRU"].points == [(50.0, 100 * rows[0].found["LRU"].prompt.rate)]


def test_what_cannot_be_drawn_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"a\.pdf: the name must end with \.svg or \.png"):
        draw(tmp_path / "a.pdf", CHART)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot write"):
        draw(tmp_path / "file" / "a.svg", CHART)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"needs the extra 'plot': pip install 'flashpack-moe\[plot\]'"):
        draw(tmp_path / "a.svg", CHART)
