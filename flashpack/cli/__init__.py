"""The command line: one thin file per command over one public function."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import typer

from flashpack.cli.bench import EPILOG as BENCH_EXAMPLES
from flashpack.cli.bench import bench
from flashpack.cli.calibrate import calibrate
from flashpack.cli.card import EPILOG as CARD_EXAMPLES
from flashpack.cli.card import card
from flashpack.cli.chat import EPILOG as CHAT_EXAMPLES
from flashpack.cli.chat import chat
from flashpack.cli.console import note
from flashpack.cli.convert import convert
from flashpack.cli.doctor import doctor
from flashpack.cli.eval import eval
from flashpack.cli.examples import epilog
from flashpack.cli.export import export
from flashpack.cli.inspect import inspect
from flashpack.cli.plan import plan
from flashpack.cli.pull import EPILOG as PULL_EXAMPLES
from flashpack.cli.pull import pull
from flashpack.cli.push import EPILOG as PUSH_EXAMPLES
from flashpack.cli.push import push
from flashpack.cli.recode import recode
from flashpack.cli.repair import repair
from flashpack.cli.run import run
from flashpack.cli.selftest import selftest
from flashpack.cli.serve import EPILOG as SERVE_EXAMPLES
from flashpack.cli.serve import serve
from flashpack.cli.trace import EPILOG as TRACE_EXAMPLES
from flashpack.cli.trace import trace
from flashpack.cli.tune import EPILOG as TUNE_EXAMPLES
from flashpack.cli.tune import tune
from flashpack.cli.verify import verify
from flashpack.errors import FlashpackError
from flashpack.version import __version__

app = typer.Typer(
    help="Run Mixture-of-Experts models that do not fit in memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with errors as one line on stderr and an exit code of their own, never a traceback."""

    @functools.wraps(command)
    def call(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except FlashpackError as e:
            note(f"flashpack: {e}")
            raise typer.Exit(e.exit_code) from e
        except KeyboardInterrupt as e:
            hint = "; run the same command again to continue" if command in (convert, recode, push, pull) else ""
            print(f"\nflashpack: interrupted{hint}", file=sys.stderr)
            raise typer.Exit(130) from e

    return call


for _command in (plan, convert, verify, repair, recode, export, inspect, run, calibrate, eval, selftest, doctor):
    app.command(epilog=epilog(_command.__name__))(_guarded(_command))

app.command(epilog=BENCH_EXAMPLES)(_guarded(bench))
app.command(epilog=CARD_EXAMPLES)(_guarded(card))
app.command(epilog=PUSH_EXAMPLES)(_guarded(push))
app.command(epilog=PULL_EXAMPLES)(_guarded(pull))
app.command(epilog=TUNE_EXAMPLES)(_guarded(tune))
app.command(epilog=TRACE_EXAMPLES)(_guarded(trace))
app.command(epilog=CHAT_EXAMPLES)(_guarded(chat))
app.command(epilog=SERVE_EXAMPLES)(_guarded(serve))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashpack {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()
