"""lm_eval's command line, which knows packs: ``python -m flashpack.lm_eval --model flashpack ...``"""

from __future__ import annotations

import sys

from flashpack.errors import FlashpackError
from flashpack.lm_eval import register


def main() -> None:
    """Run lm_eval; errors of flashpack are one line on stderr, with their exit code."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found, import-untyped, unused-ignore]

        cli_evaluate()
    except FlashpackError as e:
        sys.stderr.write(f"flashpack: {e}\n")
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
