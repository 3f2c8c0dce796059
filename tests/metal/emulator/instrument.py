"""Checks of a kernel's accesses to memory, put into clang's intermediate code: clang has none for address spaces.

Each access to device, constant or threadgroup memory is preceded by a call of ``emulated_access`` (include/emulator/
access.h), which looks at alignment, and whether another thread may use the same bytes at the same time.
"""

from __future__ import annotations

import re

READ, WRITE = 0, 1
SIZES = {"i1": 1, "i8": 1, "i16": 2, "half": 2, "bfloat": 2, "i32": 4, "float": 4, "i64": 8, "double": 8, "ptr": 8}

TYPE = r"(<(\d+) x (\w+)>|\w+)"
POINTER = r"ptr addrspace\((\d)\) (%[\w.]+)"
LOAD = re.compile(rf" = load (?!volatile){TYPE}, {POINTER}, align (\d+)")
STORE = re.compile(rf"^\s+store (?!volatile){TYPE} .*, {POINTER}, align (\d+)")
PLACE = re.compile(r"^!(\d+) = (?:distinct )?!DILocation\(line: (\d+)", re.M)


def instrumented(code: str) -> str:
    """LLVM's text before any optimization, with the calls. Volatile accesses, which are those of atomics, have none."""
    lines_of = dict(PLACE.findall(code))
    out: list[str] = []
    own = True
    for line in code.split("\n"):
        if line.startswith("define "):
            own = "emulated" not in line.partition("@")[2].partition("(")[0]  # not of the emulator's headers
        elif own and "addrspacecast" in line:
            place = re.search(r"!dbg !(\d+)", line)
            raise SyntaxError(f"line {lines_of[place[1]] if place else '?'}: a cast to another address space")
        for kind, pattern in ((READ, LOAD), (WRITE, STORE)):
            if match := pattern.search(line):
                out += calls(match, kind, line, lines_of, f"%emulated.{len(out)}")
        out.append(line)
    return "\n".join(out)


def calls(match: re.Match[str], kind: int, instruction: str, lines_of: dict[str, str], name: str) -> list[str]:
    whole, count, element, space, pointer, alignment = match.groups()
    size = int(count) * SIZES[element] if count else SIZES[whole]
    place = re.search(r"!dbg !(\d+)", instruction)
    debug, line = (f", !dbg !{place[1]}", lines_of[place[1]]) if place else ("", "0")
    arguments = f"i64 {name}, i64 {size}, i64 {alignment}, i32 {space}, i32 {kind}, i32 {line}"
    return [
        f"  {name} = ptrtoint ptr addrspace({space}) {pointer} to i64{debug}",
        f"  call void @emulated_access({arguments}){debug}",
    ]
