"""Rules of Metal's language that clang does not check, and those of how torch calls kernels. ``lint(source)``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from tests.metal.emulator import build
from tests.metal.emulator.source import Kernel, functions, kernels, line_of, matching, threadgroup_variables

Finding = tuple[int, str]  # a position in the text, and what is wrong there
SPACES = r"\b(?:device|constant|threadgroup|thread)\b"
SCALARS = "bool char uchar short ushort int uint long ulong half bfloat float size_t"

# Words and forms, where they stand, and why they must not.
FORBIDDEN = [
    (r"\bdouble\b|\blong\s+long\b", "Metal has no such type"),
    (
        r"(?<![\w.])(?=[\d.]*[.eE])(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?(?![\w.])",
        "double in C++, float in Metal: add f",
    ),
    (r"\b(?:goto|virtual|new|delete|throw|try|catch|typeid|dynamic_cast|thread_local|union|asm)\b", "not in Metal"),
    (r"\bstd::|\bmain\s*\(", "not in Metal"),
    (r"(?<!enum )\b(?:struct|class)\s+\w+\s*:[^:]", "a base class: not in Metal"),
    (r"\[[&=\w\s,]*\]\s*(?:\([^()]*\)\s*)?(?:->\s*\w+\s*)?\{", "a lambda: only from Metal 3.2"),
    (r"\[\[\s*threadgroup\s*\(", "torch cannot size threadgroup memory of a launch"),
    (r"\bfunction_constant\b", "torch cannot set function constants"),
    (r"\bhost_name\b", "a kernel needs a name of its own"),
    (r"\[\[\s*kernel\s*\]\]|\bkernel\s+(?!void\b)\w+", "a kernel is written 'kernel void name(...)'"),
    (r"\bmemory_order_(?!relaxed\b)\w+", "Metal's atomics are relaxed"),
    (r"\batomic(?:_|<\s*)u?(?:long|short|char)\b", "Metal's atomics have 32 bits"),
]


def lint(source: str) -> list[str]:
    """What is wrong, as "line 3: ..."; empty if nothing is. ``SyntaxError`` if the preprocessor cannot read it."""
    found = [
        f"line {number}: not ASCII: torch hands the source to Metal as ASCII"
        for number, line in enumerate(source.split("\n"), 1)
        if not line.isascii()
    ]
    for include in re.finditer(r"^[ \t]*#[ \t]*include[ \t]*(?!<metal_stdlib>)\S+", source, re.M):
        found.append(f"line {line_of(source, include.start())}: {include[0].strip()}: torch compiles one string")
    own = re.sub(r"^[ \t]*#[ \t]*include.*$", "", source, flags=re.M)
    text = build.preprocess(own.encode("ascii", "replace").decode())
    for rule in RULES:
        found += [f"line {line_of(text, at)}: {what}" for at, what in rule(text)]
    try:
        for kernel in kernels(text):
            found += [f"line {line_of(text, kernel.start)}: kernel {kernel.name}: {what}" for what in signature(kernel)]
    except SyntaxError as e:
        found.append(str(e))
    return found


def forbidden(text: str) -> Iterator[Finding]:
    for pattern, why in FORBIDDEN:
        for match in re.finditer(pattern, text):
            yield match.start(), f"'{' '.join(match[0].split())}': {why}"


def pointers(text: str) -> Iterator[Finding]:
    """Pointers and references to no address space. Metal wants one even where it is the thread's own."""
    own = re.findall(r"\b(?:struct|class|enum|union|typename|using)\s+(?:class\s+)?(\w+)", text)
    own += re.findall(r"\btypedef\b[^;]*?(\w+)\s*;", text)
    vectors = [f"{s}{n}" for s in SCALARS.split() for n in "234"]
    sized = [
        "int8_t",
        "uint8_t",
        "int16_t",
        "uint16_t",
        "int32_t",
        "uint32_t",
        "void",
        "auto",
        "atomic_int",
        "atomic_uint",
    ]
    types = "|".join([*SCALARS.split(), *vectors, *sized, "atomic_float", *own])
    words = rf"(?:(?:{SPACES}|const|volatile)\s+)*"
    pattern = rf"(?<![\w.]){words}(?:metal::)?(?:{types})\b(?:<[^<>]*>)?(?:\s+(?:{SPACES}|const|volatile))*\s*[*&]"
    for match in re.finditer(pattern, text):
        if not re.search(SPACES, match[0]):
            yield match.start(), f"'{' '.join(match[0].split())}': a pointer or reference without an address space"


def recursion(text: str) -> Iterator[Finding]:
    bodies = {name: (start, end) for name, start, end in functions(text)}
    calls = {
        name: set(re.findall(r"\b(\w+)\s*(?:<[^<>;]*>\s*)?\(", text[start:end])) & bodies.keys()
        for name, (start, end) in bodies.items()
    }
    for name, (start, _) in bodies.items():
        reached: set[str] = set()
        waiting = list(calls[name])
        while waiting:
            other = waiting.pop()
            if other not in reached:
                reached.add(other)
                waiting += calls[other]
        if name in reached:
            yield start, f"'{name}' calls itself: recursion is not in Metal"


def program_scope(text: str) -> Iterator[Finding]:
    """Variables outside of functions that are not in constant memory, and local ones that would be."""
    for start, statement in outer_statements(text):
        declaration = statement.split("=")[0]
        if re.match(r"using\b|typedef\b|template\b|struct\b|enum\b|namespace\b|static_assert\b|inline\b", statement):
            continue
        if "(" not in declaration and not re.search(r"\bconstant\b", declaration):
            yield start, f"'{' '.join(statement.split())[:60]}': a variable of the program is not in constant memory"
    for _, start, end in functions(text):
        for match in re.finditer(r"\bstatic\b", text[start:end]):
            yield start + match.start(), "'static': a function has no static variables in Metal"


def outer_statements(text: str) -> Iterator[tuple[int, str]]:
    """Declarations outside of all braces, without directives and bodies."""
    at = start = 0
    while at < len(text):
        if text[at] == "#" and not text[start:at].strip():
            at = start = text.find("\n", at) + 1 or len(text)
            continue
        if text[at] in "([{":
            close = matching(text, at)
            head = text[start:at].strip()
            if text[at] == "{" and "=" not in head:
                at = start = close
                continue
            at = close
            continue
        if text[at] == ";":
            statement = text[start:at]
            if statement.strip():
                yield start + len(statement) - len(statement.lstrip()), statement.strip()
            start = at + 1
        at += 1


def threadgroup_memory(text: str) -> Iterator[Finding]:
    """Threadgroup variables belong to kernels, and have no values to begin with."""
    names = set(re.findall(r"\bkernel\s+void\s+(\w+)", text))
    inside = [range(start, end) for name, start, end in functions(text) if name in names]
    for start, _, _, declared in threadgroup_variables(text, 0, len(text)):
        if not any(start in body for body in inside):
            yield start, f"'{declared[0]}': a threadgroup variable outside of a kernel"
    for match in re.finditer(r"(?<=[;{}])\s*threadgroup\b[^;]*;", text):
        left, equals, _ = re.sub(r"\[[^\]]*\]", "", match[0]).partition("=")
        if equals and not re.search(r"[*&(]", left):
            yield match.start(), f"'{left.strip()}': a threadgroup variable has no initial value"


def signature(kernel: Kernel) -> Iterator[str]:
    indices = [p.index for p in kernel.buffers]
    if indices != list(range(len(indices))):
        yield f"buffers {indices}: torch binds arguments to 0, 1, 2, ..."
    if len(indices) > 31:
        yield f"{len(indices)} buffers, 31 at most"
    for p in kernel.buffers:
        if not re.search(r"\bdevice\b.*[*&]$|\bconstant\b.*[*&]$", p.type):
            yield f"'{p.type} {p.name}': a buffer is a device or constant pointer or reference"
        if re.fullmatch(r"u?long[234]?|u?int64_t|size_t", p.base):
            yield f"'{p.type} {p.name}': 64-bit integers in buffers are not in every Metal"
    sizes = set()
    for p in kernel.parameters:
        vector = not re.search("index|simdgroup", p.attribute)
        if p.attribute == "buffer":
            continue
        if not re.fullmatch("u(int|short)[23]?" if vector else "u(int|short)", p.type):
            yield f"'{p.type} {p.name}': not a type of {p.attribute}"
        elif vector:
            sizes.add(p.type[-1] if p.type[-1] in "23" else "1")
    if len(sizes) > 1:
        yield f"positions and sizes of {' and '.join(sorted(sizes))} components"


RULES: list[Callable[[str], Iterator[Finding]]] = [forbidden, pointers, recursion, program_scope, threadgroup_memory]
