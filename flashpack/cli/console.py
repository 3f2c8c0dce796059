"""How the commands talk: sizes, progress bars, JSON, and text of a pack, which must not command the terminal."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from flashpack.sizes import gb as gb

if TYPE_CHECKING:
    from tqdm import tqdm


def visible(text: str) -> str:
    """``text`` with everything that a terminal obeys or hides written out: controls, line ends, bidi overrides."""
    return "".join(c if c.isprintable() else _written(c) for c in text)


def harmless(text: str) -> str:
    """``text`` with control characters written out, but for newline and tab: generated text on a terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: _written(m[0]), text)


def _written(character: str) -> str:
    return character.encode("unicode_escape").decode()


def say(text: str) -> None:
    """A line of the answer."""
    print(visible(text))


def note(text: str) -> None:
    """A line for the person, not part of the answer."""
    print(wrapped(text), file=sys.stderr)


def wrapped(text: str) -> str:
    """``visible`` text for stderr; on a terminal, broken between words."""
    text = visible(text)
    if not sys.stderr.isatty() or len(text) <= (columns := shutil.get_terminal_size().columns):
        return text
    return "\n".join(textwrap.wrap(text, columns, break_long_words=False, break_on_hyphens=False))


def answer_json(data: Any) -> None:
    """The answer for a script."""
    print(json.dumps(data, indent=1))


def progress_bar(total: int, text: str, done: int = 0, unit: str = "B") -> tqdm[Any]:
    """Bytes (or another unit), rate and time left on stderr; silent where stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(
        total=total, initial=done, desc=text, unit=unit, unit_scale=True, disable=None, leave=False, mininterval=0.2
    )


def quiet_libraries(source: str = "") -> None:
    """Keep the libraries' advice and complaints, which may quote a pack, out of our output, and the libraries from the
    network, but for a ``source`` that is on a hub."""
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
    if not source.lower().startswith("hf://"):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["RUST_BACKTRACE"] = "0"
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
