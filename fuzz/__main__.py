"""``python -m fuzz TARGET [libFuzzer options] [corpus folders]``: coverage-guided fuzzing with atheris."""

from __future__ import annotations

import json
import random
import sys

import atheris  # type: ignore[import-untyped]

with atheris.instrument_imports(include=["flashpack"]):
    from fuzz.targets import TARGETS

    # The rooms with torch are imported where they are used: here, for the first call must not pay for it.
    if "journal" in sys.argv or "source" in sys.argv:
        import flashpack.converter  # noqa: F401
from fuzz.mutate import mutate

_JSON_AT = {"manifest": (0, None), "header": (4, None), "pack": (1, b"\0"), "source": (0, None), "journal": (1, None)}
"""Where the JSON of a target's input begins, and what ends it."""


def mutator(target: str) -> object:
    """Half of the mutations are of the JSON's structure, the others of bytes."""
    start, end = _JSON_AT[target]
    parts = {"source": b"\0", "journal": b"\n"}.get(target)

    def custom(data: bytes, most: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            before, body, after = data[:start], data[start:], b""
            if end is not None:
                body, _, after = body.partition(end)
                after = end + after
            pieces = [body] if parts is None else body.split(parts, 2 if target == "source" else -1)
            chosen = rng.randrange(len(pieces))
            skip = 8 if target == "source" and chosen == 2 else 0
            try:
                value = mutate(json.loads(pieces[chosen][skip:]), rng)
                indent = 1 if target in ("manifest", "pack") else None
                text = json.dumps(value, sort_keys=target in ("manifest", "pack"), indent=indent).encode()
            except (ValueError, RecursionError):
                pass
            else:
                if target == "manifest":
                    text += b"\n"
                pieces[chosen] = (len(text).to_bytes(8, "little") if skip else b"") + text
                result = before + (parts or b"").join(pieces) + after
                if len(result) <= most:
                    return result
        return bytes(atheris.Mutate(data, most))

    return custom


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: python -m fuzz {'|'.join(TARGETS)} [libFuzzer options] [corpus folders]")
    name = sys.argv.pop(1)
    options = {"custom_mutator": mutator(name)} if name in _JSON_AT else {}

    def run(data: bytes) -> None:
        TARGETS[name](data)

    atheris.Setup(sys.argv, run, **options)
    atheris.Fuzz()


main()
