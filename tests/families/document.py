"""The table of families in docs/families.md."""

from __future__ import annotations

import re
from dataclasses import dataclass

DOCUMENT = "docs/families.md"

_HEAD = """# Families

Made by `python tools/families.py` with transformers {version}. Each family whose experts modules have transformers'
experts hook (`use_experts_implementation`) is tried with a tiny seeded checkpoint under released names: converted with
`--experts source --dense source`, loaded with the smallest memory budget, and compared with transformers' own model in
float32 with eager attention and experts: logits of a prompt of 20 tokens, and of 4 more that are decoded greedily with
the cache. Every value of the checkpoint is in the pack once, or its tensor is listed in the conversion's report.
`tests/families` does the same at every run.

Parts for images, sound and multi-token prediction are left out. Families without the hook are in
`flashpack/adapters.py`.

| family | converts | runs | max logit difference | remark |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """A family's row; ``difference`` None: refused, as ``remark`` says."""

    family: str
    difference: float | None
    remark: str = ""


def table(rows: list[Row], version: str) -> str:
    """The whole document."""
    lines = [
        f"| {r.family} | no | no | | {r.remark} |"
        if r.difference is None
        else f"| {r.family} | yes | yes | {f'{r.difference:.0e}' if r.difference else 0} | {r.remark} |"
        for r in sorted(rows, key=lambda r: r.family)
    ]
    return _HEAD.format(version=version) + "\n".join(lines) + "\n"


def families_in(document: str) -> list[str]:
    """The first cells of the table."""
    return re.findall(r"^\| (\w+) \| (?:yes|no) \|", document, re.MULTILINE)
