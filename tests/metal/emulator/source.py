"""Reads Metal source: macros expanded, kernels and their parameters found, a launcher written for each kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Attributes of a kernel's parameters that are not buffers; include/emulator/execution.h computes them.
PLACES = frozenset(
    f"{what}_in_{where}"
    for what, where in [
        ("thread_position", "grid"),
        ("thread_position", "threadgroup"),
        ("threadgroup_position", "grid"),
        ("thread_index", "threadgroup"),
        ("thread_index", "simdgroup"),
        ("simdgroup_index", "threadgroup"),
    ]
) | frozenset(
    f"{what}_per_{where}"
    for what, where in [
        ("threads", "grid"),
        ("threads", "threadgroup"),
        ("threads", "simdgroup"),
        ("threadgroups", "grid"),
        ("simdgroups", "threadgroup"),
    ]
)


@dataclass(frozen=True)
class Parameter:
    """``type``: as written, without the name. ``attribute``: "buffer" or one of PLACES; ``index``: of a buffer."""

    name: str
    type: str
    attribute: str
    index: int = 0

    @property
    def base(self) -> str:
        """The type that a pointer or reference points to, without qualifiers."""
        words = re.sub(r"[*&]", " ", self.type).split()
        return " ".join(w for w in words if w not in ("device", "constant", "threadgroup", "const", "volatile"))

    @property
    def written(self) -> bool:
        """Whether the kernel may write what it points to."""
        return not re.search(r"\b(const|constant)\b", self.type)


@dataclass(frozen=True)
class Kernel:
    """``start``, ``body``, ``end``: where the declaration, its ``{`` and what follows its ``}`` are in the text."""

    name: str
    parameters: tuple[Parameter, ...]
    start: int
    body: int
    end: int

    @property
    def buffers(self) -> list[Parameter]:
        return sorted((p for p in self.parameters if p.attribute == "buffer"), key=lambda p: p.index)


def matching(text: str, start: int) -> int:
    """The position after the bracket that closes the one at ``start``."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i + 1
    raise SyntaxError(f"line {line_of(text, start)}: '{text[start]}' is never closed")


def line_of(text: str, position: int) -> int:
    """The line of the source that a position in preprocessed text comes from; without line markers, of the text."""
    before = text[:position]
    markers = list(re.finditer(r'^# (\d+) ".*$', before, re.M))
    if not markers:
        return before.count("\n") + 1
    marker = markers[-1]
    return int(marker[1]) + before.count("\n", marker.end()) - 1


def split(text: str) -> list[str]:
    """The parts of a list, at commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for c in text:
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += c
    return [p.strip() for p in [*parts, current] if p.strip()]


def kernels(text: str) -> list[Kernel]:
    """Every kernel of preprocessed source. ``SyntaxError`` for a parameter that Metal would not take."""
    found = []
    for match in re.finditer(r"\bkernel\s+void\s+(\w+)\s*\(", text):
        close = matching(text, match.end() - 1)
        line = line_of(text, match.start())
        parameters = tuple(parameter(match[1], line, p) for p in split(text[match.end() : close - 1]))
        body = close + len(text[close:]) - len(text[close:].lstrip())
        if text[body : body + 1] == "{":
            found.append(Kernel(match[1], parameters, match.start(), body, matching(text, body)))
    names = [k.name for k in found]
    if twice := {n for n in names if names.count(n) > 1}:
        raise SyntaxError(f"kernels defined twice: {', '.join(sorted(twice))}")
    return found


def functions(text: str) -> list[tuple[str, int, int]]:
    """Names of functions and kernels, and where their bodies are, from ``{`` to after ``}``."""
    found = []
    for match in re.finditer(r"\b((?:\w+##)?\w+)\s*\(", text):
        if match[1] in ("if", "for", "while", "switch", "alignas", "sizeof", "static_assert", "__attribute__"):
            continue
        body = re.compile(r"[\s\\]*(?:const\s*)?\{").match(text, matching(text, match.end() - 1))
        if body:
            found.append((match[1], body.end() - 1, matching(text, body.end() - 1)))
    return found


def parameter(kernel: str, line: int, text: str) -> Parameter:
    text = " ".join(text.split())
    attributes = re.findall(r"\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*\]\]", text)
    declared = re.match(r"(.*?)(\w+)$", re.sub(r"\[\[.*?\]\]", "", text).strip())
    if declared is None or len(attributes) != 1:
        raise SyntaxError(f"line {line}: kernel {kernel}: '{text}' needs a name and one attribute")
    attribute, number = attributes[0]
    if attribute == "buffer" and number.isdigit():
        return Parameter(declared[2], declared[1].strip(), attribute, int(number))
    if attribute in PLACES and not number:
        return Parameter(declared[2], declared[1].strip(), attribute)
    raise SyntaxError(f"line {line}: kernel {kernel}: '{text}' has an attribute that kernels here cannot have")


def threadgroup_variables(text: str, start: int, end: int) -> list[tuple[int, int, str, list[str]]]:
    """Declarations of variables in threadgroup memory: where, their type, their names with sizes ("x[32]")."""
    found = []
    for match in re.finditer(r"(?<=[;{})])\s*\bthreadgroup\s+([^;]*);", text[start:end]):
        declarators = split(match[1])
        first = re.match(r"(.*?)\b(\w+(?:\s*\[.*\])?)$", declarators[0], re.S)
        outside = re.sub(r"\[.*?\]", "", match[1])
        if first and not re.search(r"[*&=({]", outside):
            lead = len(match[0]) - len(match[0].lstrip())
            names = [first[2], *declarators[1:]]
            found.append((start + match.start() + lead, start + match.end(), first[1].strip(), names))
    return found


def generated(text: str, found: list[Kernel]) -> str:
    """C++ of preprocessed source: threadgroup variables become references to the runtime's memory; launchers follow."""
    out, done = [], 0
    for kernel in found:
        number = 0
        for start, end, kind, names in threadgroup_variables(text, kernel.body, kernel.end):
            out.append(text[done:start])
            for declared in names:
                name, _, size = declared.partition("[")
                kind_here = f"{kind} [{size}" if size else kind
                variable = f"emulated::Variable<{kind_here}, emulated_{kernel.name}, {number}>"
                reference = f"(&{name.strip()}) [{size}" if size else f"& {name}"
                out.append(f"threadgroup {kind} {reference} = {variable}::here();")
                number += 1
            done = end
    body = "".join([*out, text[done:]])
    heads = "".join(
        f"namespace {{ struct emulated_{k.name} {{ static uint threadgroup_bytes; }}; }} "
        f"uint emulated_{k.name}::threadgroup_bytes;\n"
        for k in found
    )
    return f"#include <metal_stdlib>\n{heads}{body}\n" + "".join(launcher(k) for k in found)


def launcher(kernel: Kernel) -> str:
    arguments = [
        f"emulated::Argument<{p.type}>::of(buffers, {p.index})"
        if p.attribute == "buffer"
        else f"emulated::placed<{p.type}>(place.{p.attribute})"
        for p in kernel.parameters
    ]
    return f"""# 1 "launcher of {kernel.name}"
#define LAUNCHER extern "C" __attribute__((visibility("default")))
LAUNCHER void emulated_launch_{kernel.name}(const emulated::Place& place, void* const* buffers)
{{
    (void)place, (void)buffers;
    ::{kernel.name}({", ".join(arguments)});
}}
LAUNCHER uint emulated_bytes_{kernel.name}() {{ return emulated_{kernel.name}::threadgroup_bytes; }}
#undef LAUNCHER
"""
