"""Structured mutations of JSON: any node dropped, replaced, doubled, moved or nudged."""

from __future__ import annotations

import copy
import random
from typing import Any

Path = tuple[str | int, ...]
"""The way from the root to a node: keys and positions."""

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 255, 16383, 16384, 16385, 65535, 65536, 65537),
    *(2**31, 2**32 - 16384, 2**32 - 1, 2**32, 2**62 - 1, 2**62, 2**63, 2**64, 10**400, 0.5),
    *(
        "",
        "a",
        ".",
        "..",
        "/",
        "a/../b",
        "../a",
        "/a",
        "C:a",
        "a\\b",
        "a\0b",
        "a\nb",
        "\x7f",
        "\ud800",
        "é",
        "\U0001f600",
    ),
    *("x" * 255, "x" * 256, "x" * 1024, "x" * 1025, "f" * 64, "g" * 64, "F" * 64),
    *("mxfp4", "nvfp4", "fp8_e4m3", "none", "multiply", "divide", "E8M0", "I64", "bias", "global"),
    *("raw", "zstd", "affine", "U8", "U32", "F8_E4M3", "BF16", "F32", "gate", "up", "down", "experts", "dense", "copy"),
    *("flashpack.json", "flashpack.json.b3", "FLASHPACK.JOURNAL", "x.part", "x.py", "__metadata__", "__pad__.1"),
    *([], {}, [[]], [0], [1, 1], [1] * 9, [2**62 - 1] * 8, [""], {"": {}}, {"a": 1}, [[[[[[[[]]]]]]]]),
)
"""Values that code which expects another may stumble over."""


def mutate(value: Any, rng: random.Random, most: int = 3) -> Any:
    """A copy of ``value`` with one to ``most`` nodes changed."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        value = _once(value, rng)
    return value


def nodes(value: Any, at: Path = ()) -> list[Path]:
    """The paths of all nodes, the root first."""
    found = [at]
    if isinstance(value, dict):
        children: list[tuple[str | int, Any]] = list(value.items())
    else:
        children = list(enumerate(value)) if isinstance(value, list) else []
    for key, child in children:
        found += nodes(child, (*at, key))
    return found


def get(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _once(value: Any, rng: random.Random) -> Any:
    paths = nodes(value)
    path = _choose(paths, rng)
    if not path:
        return copy.deepcopy(rng.choice(STRANGE)) if rng.random() < 0.1 else value
    parent: Any = get(value, path[:-1])
    key: Any = path[-1]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[key]
    elif kind == 1:
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
    elif kind == 2:
        parent[key] = copy.deepcopy(get(value, rng.choice(paths)))
    elif kind == 3:
        parent[key] = _nudged(parent[key], rng)
    elif kind == 4:
        other = _choose(paths, rng)
        if other and other[: len(path)] != path and path[: len(other)] != other:
            place = get(value, other[:-1])
            parent[key], place[other[-1]] = place[other[-1]], parent[key]
    elif isinstance(parent, list):
        parent.insert(rng.randint(0, len(parent)), copy.deepcopy(parent[key]))
    else:
        parent[rng.choice(("", "x", "name", "codec", "kind", "\x1b", str(key) + "s"))] = copy.deepcopy(parent[key])
    return value


def _choose(paths: list[Path], rng: random.Random) -> Path:
    """A node, the shallow ones as often as the many deep ones."""
    depth = rng.choice(sorted({len(p) for p in paths}))
    return rng.choice([p for p in paths if len(p) == depth])


def _nudged(value: Any, rng: random.Random) -> Any:
    """A value close to this one."""
    if isinstance(value, bool) or value is None or isinstance(value, float):
        return not value
    if isinstance(value, int):
        step = rng.choice((1, -1, 2, 16, 32, 64, 16384, -16384, value, value * 255))
        return value + step
    if isinstance(value, str):
        at = rng.randint(0, len(value))
        return value[:at] + rng.choice(("", "/", ".", "A", "0", "\0", "é", value)) + value[at + rng.randint(0, 1) :]
    if isinstance(value, list):
        value = list(value)
        rng.shuffle(value)
        return value
    return dict(list(value.items())[1:])
