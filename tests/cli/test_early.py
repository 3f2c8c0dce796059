"""A wrong name of a folder is said at once, not after seconds of imports."""

from __future__ import annotations

import subprocess
import sys

COMMANDS = [
    "run {} -p Hello", "chat {}", "serve {}", "bench {}", "trace {}", "tune {}", "plan {}", "card {}", "push {} a/b",
    "eval {} --text TEXT", "calibrate {} --text TEXT", "inspect {}", "verify {}", "convert {} OUT",
    "export {} OUT --to hf", "repair {} --from SRC",
]  # fmt: skip

SCRIPT = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import of these fails
from flashpack.cli import main
for command in sys.argv[1:]:
    sys.argv = ["flashpack", *command.format("/nowhere/at-all").split()]
    try:
        main()
    except SystemExit as e:
        print(command, e.code)
    except ImportError as e:
        print(command, "imported", e.name)
"""


def test_a_folder_that_is_not_there_is_said_before_anything_heavy_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *COMMANDS], capture_output=True, text=True, check=False)
    ended = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
    assert ended == {c: "3" if c.split()[0] in ("plan", "convert") else "4" for c in COMMANDS}, done.stderr[-2000:]
    assert done.stderr.splitlines() == ["flashpack: /nowhere/at-all: no such folder"] * len(COMMANDS)
