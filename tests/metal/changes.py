"""Small changes of Metal source that should make tests fail: a barrier left out, the next index, another branch.

All changes of a source are in one text, each behind a number that switches it on, so that they are compiled once.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from tests.metal.emulator import build
from tests.metal.emulator.source import functions, matching

# What changes are written with. `mutant`: the number of the one that is on; `reached`: those that were come by.
PREAMBLE = """
extern "C" {
__attribute__((visibility("default"))) unsigned mutant;
__attribute__((visibility("default"))) unsigned char reached[10000];
}
namespace mutated {
inline bool on(unsigned k) { reached[k] = 1; return mutant == k; }
template <class T> T more(unsigned k, T v) { return on(k) ? T(v + 1) : v; }
template <class T> T less(unsigned k, T v) { return on(k) && v > T(0) ? T(v - 1) : v; }
template <class T> T none(unsigned k, T v) { return on(k) ? T(0) : v; }
template <class T> T one(unsigned k, T v) { return on(k) ? T(1) : v; }
template <class T> T assumed(unsigned k, T v) { return on(k) ? T(32) : v; }
inline bool flip(unsigned k, bool v) { return v != on(k); }
}
"""
WORD = re.compile(r"(?:\w+::)*\w+(?:<[^<>;(){}]*>(?=\())?")


@dataclass(frozen=True)
class Change:
    """Text from ``start`` to ``end`` gets ``before`` and ``after`` around it, in which # is the change's number."""

    kind: str
    start: int
    end: int
    before: str
    after: str = ")"


@dataclass(frozen=True)
class Mutated:
    """``text``: source with all changes, none of which is on; ``names`` of them, from number 1 on."""

    text: str
    names: tuple[str, ...]


@functools.cache
def mutated(source: str) -> Mutated:
    """Source with all changes of it that compile."""
    text = without_comments(source)
    bodies = [range(start, end) for _, start, end in functions(text)]
    constant = constants(text)
    possible = [
        c
        for c in changes(text)
        if any(c.start in body for body in bodies) and not any(c.start in place for place in constant)
    ]
    while True:
        result = with_changes(text, possible)
        refused = build.refused_lines(result)
        if not refused:
            return Mutated(result, names(text, possible))
        bad = {line - PREAMBLE.count("\n") for line in refused}
        kept = [c for c in possible if text.count("\n", 0, c.start) + 1 not in bad]
        if len(kept) == len(possible):
            raise SyntaxError(f"lines {sorted(refused)} do not compile, and nothing was changed there")
        possible = kept


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", "", m[0]), source, flags=re.S)


def changes(text: str) -> Iterator[Change]:
    for match in re.finditer(r"\b(?:threadgroup|simdgroup)_barrier\(", text):
        yield Change("no barrier", match.start(), matching(text, match.end() - 1), "if (!mutated::on(#)) ", "")
    for match in re.finditer(r"\bsimd_\w+\(", text):
        end = matching(text, match.end() - 1)
        value = text[match.end() : argument_end(text, match.end())]
        yield Change("no SIMD operation", match.start(), end, f"(mutated::on(#) ? {value} : ")
    for match in re.finditer(r"(?<=[\w)\]])\[(?!\[)", text):
        if not is_declared(text, match.start()):
            yield Change("next index", match.end(), matching(text, match.start()) - 1, "mutated::more(#, ")
    for match in re.finditer(r"\bfor \(", text):
        yield from of_loop(text, match.end(), matching(text, match.end() - 1) - 1)
    for match in re.finditer(r"\bif \(", text):
        yield Change("other branch", match.end(), matching(text, match.end() - 1) - 1, "mutated::flip(#, ")
    for match in re.finditer(r"\s+\?\s", text):
        yield Change("other choice", condition_start(text, match.start()), match.start(), "mutated::flip(#, ")
    for match in re.finditer(r"\bfma\(", text):
        end = matching(text, match.end() - 1) - 1
        third = argument_end(text, argument_end(text, match.end()) + 1) + 1
        yield Change("no addend", third, end, "mutated::none(#, ")
    for match in re.finditer(r" (==|!=|<=?|>=?) ", text):
        if end := operand_end(text, match.end()):
            yield Change(f"{match[1]} more", match.end(), end, "mutated::more(#, ")
            if match[1] in ("<", "<=") and text[match.end()] != "0":
                yield Change(f"{match[1]} less", match.end(), end, "mutated::less(#, ")
    for match in re.finditer(r" ([+*/-])(=?) ", text):
        end = statement_end(text, match.end()) if match[2] else operand_end(text, match.end())
        if end and not in_loop_head(text, match.start()):
            what, function = ("no addend", "none") if match[1] in "+-" else ("no factor", "one")
            yield Change(what, match.end(), end, f"mutated::{function}(#, ")
    for match in re.finditer(r"\bkernel void [\w#]+\(", text):
        close = matching(text, match.end() - 1)
        body = text.index("{", close) + 1
        size = r"(\w+)\s*\[\[(?:threads_per_threadgroup|simdgroups_per_threadgroup)\]\]"
        for name in re.findall(size, text[match.end() : close]):
            yield Change(f"{name} assumed", body, body, f" {name} = mutated::assumed(#, {name});", "")


def of_loop(text: str, start: int, end: int) -> Iterator[Change]:
    head = text[start:end]
    if begin := re.match(r"[\w ]+ = ", head):
        yield Change("later start", start + begin.end(), argument_end(text, start + begin.end()), "mutated::more(#, ")
    if step := re.search(r" [+*/]= ", head):
        yield Change("longer step", start + step.end(), end, "mutated::more(#, ")


def is_declared(text: str, bracket: int) -> bool:
    """Whether a bracket is the size of an array that is declared."""
    start = max(text.rfind(c, 0, bracket) for c in ";{}") + 1
    name = r"\w+(?:\[[^]]*\])*"
    return re.fullmatch(rf"[\s\\]*(?:(?!return\b)[\w:]+ )+(?:{name}, )*{name}", text[start:bracket]) is not None


def in_loop_head(text: str, at: int) -> bool:
    start = text.rfind("for (", 0, at)
    return start >= 0 and at < matching(text, start + 4)


def argument_end(text: str, at: int) -> int:
    """Where the argument, or the statement, that begins here ends."""
    while at < len(text) and text[at] not in ",;)]":
        at = matching(text, at) if text[at] in "([{" else at + 1
    return at


def statement_end(text: str, at: int) -> int:
    end = argument_end(text, at)
    return end if text[end : end + 1] == ";" else 0


def operand_end(text: str, at: int) -> int:
    """The end of the operand that begins here: a name or a number with its calls, members and indices; 0: another."""
    while text[at] in "-!~*&":
        at += 1
    if text[at] == "(":
        at = matching(text, at)
        if not re.match(r"[\w(]", text[at:]):  # no cast
            return postfix_end(text, at)
        return operand_end(text, at)
    word = WORD.match(text, at)
    return postfix_end(text, word.end()) if word else 0


def postfix_end(text: str, at: int) -> int:
    while True:
        if text[at] in "([":
            at = matching(text, at)
        elif member := re.compile(r"(?:\.|->)\w+").match(text, at):
            at = member.end()
        else:
            return at


def condition_start(text: str, end: int) -> int:
    """Where the condition before a question mark begins."""
    at, depth = end, 0
    while at > 0:
        c = text[at - 1]
        if c in ")]}":
            depth += 1
        elif c in "([{" and depth:
            depth -= 1
        elif not depth and (c in "([{,;?:" or re.search(r"[^=!<>]=\s$|\breturn\s$", text[max(0, at - 8) : at])):
            break
        at -= 1
    return at + len(text[at:end]) - len(text[at:end].lstrip())


def constants(text: str) -> list[range]:
    """Where clang computes: lines with constants, functions of constants, sizes of arrays."""
    lines = re.finditer(r"^.*(?:constexpr|\benum\b|static_assert|\bcase\b).*$|^#(?!define).*$", text, re.M)
    found = [range(*line.span()) for line in lines]
    for _, start, end in functions(text):
        if "constexpr" in text[text.rfind("\n", 0, text.rfind("(", 0, start)) : start]:
            found.append(range(start, end))
    for match in re.finditer(r"(?<=\w)\[(?!\[)", text):
        if is_declared(text, match.start()):
            found.append(range(match.start(), matching(text, match.start())))
    return found


def with_changes(text: str, found: list[Change]) -> str:
    """The text with all changes, those that enclose others outside of them."""
    marks = []
    for number, change in enumerate(found, 1):
        size = change.end - change.start
        marks.append((change.start, 1, -size, number, change.before))
        marks.append((change.end, 0 if size else 2, size, number, change.after))
    out, done = [PREAMBLE], 0
    for at, _, _, number, mark in sorted(marks):
        out += [text[done:at], mark.replace("#", str(number))]
        done = at
    return "".join([*out, text[done:]])


def names(text: str, found: list[Change]) -> tuple[str, ...]:
    """What names a change even when others come or go: the function, the kind, the text, and a number if needed."""
    bodies = functions(text)
    structs = [
        (match[1], match.end() - 1, matching(text, match.end() - 1))
        for match in re.finditer(r"\bstruct (\w+)\s*\{", text)
    ]
    count: Counter[str] = Counter()
    result = []
    for change in found:
        outer = "".join(f"{name}::" for name, start, end in structs if start <= change.start < end)
        inner = min((end - start, name) for name, start, end in bodies if start <= change.start < end)[1]
        name = f"{outer}{inner}: {change.kind}: {' '.join(text[change.start : change.end].split())}"
        count[name] += 1
        result.append(name if count[name] == 1 else f"{name} ({count[name]})")
    return tuple(result)
