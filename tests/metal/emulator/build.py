"""Compiles the runtime and Metal source with clang++, once for all test processes."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from . import source as metal
from .instrument import instrumented

HERE = Path(__file__).resolve().parent
KEPT = 24 * 3600  # seconds after its last use

# What Metal 3.1 is: C++14 without exceptions and run-time types; nothing of the processor's own is defined.
LANGUAGE = ["-std=c++14", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-D__METAL_VERSION__=310"]
WARNINGS = [
    *("-Wall", "-Wextra", "-Werror", "-Werror=c++17-extensions", "-Wimplicit-float-conversion", "-Wdouble-promotion"),
    *("-Wno-unused-function", "-Wno-unused-parameter", "-Wno-unknown-attributes"),
]
# torch compiles with safe math: no contraction, no reordering. half and bfloat are rounded after each operation.
NUMBERS = [
    *("-Xclang", "-ffloat16-excess-precision=none", "-Xclang", "-fbfloat16-excess-precision=none"),
    "-ffp-contract=off",
]
CHECKS = [
    "-fsanitize=shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow",
    "-fsanitize=bounds,bool,unreachable,return",
    "-fno-sanitize-recover=all",
    "-ftrivial-auto-var-init=pattern",  # variables that were not set are NaN
]
# Where a pointer to a thread's own array comes from is known once helpers are inlined; what unrolled loops access
# beyond its end would be dropped before. The check traps: it calls nothing.
OWN_ARRAYS = ["-fsanitize=local-bounds", "-fsanitize-trap=local-bounds"]
OWN_ARRAYS += ["-mllvm", "-inline-threshold=10000", "-fno-unroll-loops"]
UNROLL = "#pragma clang loop unroll(full)\n"
PROCESSOR = ["-mf16c", "-mfma"] if platform.machine() == "x86_64" else []
# With frame pointers the runtime tells calls from each other: see scheduler.cpp. Threads' stacks are small.
OPTIMIZED = ["-O2", "-fPIC", "-fno-omit-frame-pointer", "-fno-optimize-sibling-calls", "-fstack-clash-protection"]
SHARED = ["-shared", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]


@functools.cache
def clang() -> str:
    """The command of clang++ 19 or newer. ``RuntimeError`` that says how to install it."""
    chosen = os.environ.get("FLASHPACK_CLANG")
    names = [chosen] if chosen else [*(f"clang++-{n}" for n in range(30, 18, -1)), "clang++"]
    for path in filter(None, map(shutil.which, names)):
        version = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        number = re.search(r"clang version (\d+)", version)
        if number and int(number[1]) >= 19 and "Apple" not in version:
            return path
    raise RuntimeError(
        f"Metal kernels are tested with clang++ 19 or newer, which {chosen or 'this machine'} is not or has not: "
        "apt-get install clang-19, or name one in FLASHPACK_CLANG"
    )


def run_clang(*arguments: str, stdin: str | None = None) -> str:
    """Standard output; ``SyntaxError`` with what clang says."""
    done = subprocess.run([clang(), *arguments], input=stdin, capture_output=True, text=True)
    if done.returncode:
        raise SyntaxError(done.stderr.strip())
    return done.stdout


def preprocess(source: str) -> str:
    """Source with its macros expanded, the standard library's not; markers tell the lines."""
    own = re.sub(r"^[ \t]*#[ \t]*include[ \t]*<metal_stdlib>.*$", "", source, flags=re.M)
    return run_clang("-E", "-undef", "-nostdinc", *LANGUAGE, "-x", "c++", "-", stdin=own).replace(
        '"<stdin>"', '"metal"'
    )


def compiled(source: str, strict: bool = True) -> Path:
    """The shared library of Metal source, with a launcher for each kernel; ``SyntaxError`` with clang's text.

    Not ``strict``: without warnings.
    """

    def make(target: Path) -> None:
        text = preprocess(source).replace(UNROLL, "\n")
        with tempfile.TemporaryDirectory() as folder:
            code, checked, compiled_code = (str(Path(folder) / name) for name in ("a.cpp", "a.ll", "a.o"))
            Path(code).write_text(metal.generated(text, metal.kernels(text)), encoding="ascii")
            flags = [*LANGUAGE, *(WARNINGS if strict else ["-w"]), *NUMBERS, *CHECKS, *PROCESSOR, *OPTIMIZED]
            include = ["-nostdinc++", "-isystem", str(HERE / "include")]
            plain = ["-S", "-emit-llvm", "-Xclang", "-disable-llvm-passes", "-gline-tables-only"]
            plain_code = run_clang(*plain, *flags, *include, code, "-o", "-")
            Path(checked).write_text(instrumented(plain_code), encoding="ascii")
            run_clang("-c", *OPTIMIZED, *PROCESSOR, *OWN_ARRAYS, checked, "-o", compiled_code)
            # Linked apart: with -fsanitize the linker would add clang's own runtime.
            run_clang(*SHARED, compiled_code, "-o", str(target))

    return cached("kernels" if strict else "changed", source, make)


def refused_lines(source: str) -> set[int]:
    """Lines of Metal source that clang does not take, with or without warnings."""
    text = preprocess(source)
    code = metal.generated(text, metal.kernels(text))
    include = ["-nostdinc++", "-isystem", str(HERE / "include")]
    try:
        run_clang("-fsyntax-only", "-ferror-limit=0", "-w", *LANGUAGE, *include, "-x", "c++", "-", stdin=code)
    except SyntaxError as e:
        return {int(line) for line in re.findall(r"^metal:(\d+):\d+: error", str(e), re.M)} or {0}
    return set()


def runtime() -> Path:
    """The shared library that runs kernels."""

    def make(target: Path) -> None:
        files = sorted(str(p) for p in (HERE / "runtime").glob("*.cpp"))
        run_clang("-std=c++17", *OPTIMIZED, *SHARED, "-isystem", str(HERE / "include"), *files, "-o", str(target))

    return cached("runtime", "", make)


@functools.cache
def identity() -> bytes:
    """Of everything but the source that decides what is built."""
    digest = hashlib.sha256(run_clang("--version").encode())
    for path in sorted(p for p in HERE.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        digest.update(path.read_bytes())
    return digest.digest()


def cached(kind: str, source: str, make: Callable[[Path], None]) -> Path:
    """The file that ``make`` writes, made by the first process that needs it."""
    folder = Path(tempfile.gettempdir()) / f"flashpack-metal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    name = hashlib.sha256(identity() + source.encode()).hexdigest()[:24]
    target = folder / f"{kind}-{name}.so"
    with locked(folder / "lock"):
        if not target.exists():
            remove_old(folder)
    with locked(target.with_suffix(".lock")):
        if not target.exists():
            unfinished = target.with_name(f"{target.stem}-unfinished.so")
            make(unfinished)
            unfinished.rename(target)
    os.utime(target)
    return target


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def remove_old(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != "lock" and time.time() - path.stat().st_mtime > KEPT:
            path.unlink(missing_ok=True)
