"""The compiler is as strict as Metal's, and is missed if it is not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.metal.emulator import FakeMps, build

ROOT = Path(__file__).resolve().parents[2]
HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = "kernel void k(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]])"

REFUSED = {
    "pointer to no address space": (
        "{ auto p = x; float* q = p; q[i] = 1.0f; }",
        "with an lvalue of type 'device float",
    ),
    "helper without address space": ("{ x[i] = first(x); }", "no matching function for call to 'first'"),
    "threadgroup as device": ("{ threadgroup float s[4]; s[0] = x[i]; x[i] = of_device(s); }", "no matching function"),
    "reference to device memory": ("{ thread float& r = x[i]; r = 1.0f; }", "cannot bind|cannot initialize|binding"),
    "cast": ("{\n thread float* p = (thread float*)x;\n p[i] = 1.0f; }", "line 5: a cast to another address space"),
    "write to constant memory": ("{ table[0] = x[i]; }", "read-only|const-qualified|cannot assign"),
    "const dropped": ("{ device float* p = constant_of(x); p[i] = 1.0f; }", "cannot initialize"),
    "method of a device object": (
        "{ device S* s = (device S*)x; x[i] = s->get(); }",
        "cannot initialize object parameter",
    ),
    "max of uint and int": ("{ x[i] = float(max(i, 3)); }", "no matching function for call to 'max'"),
    "exp of an int": ("{ x[i] = exp(3); }", "call to 'exp' is ambiguous"),
    "libm": ("{ x[i] = expf(x[i]); }", "undeclared identifier 'expf'"),
    "components": ("{ x[i] = float4(1.0f, 2.0f, 3.0f).x; }", "a vector of another number of components"),
    "double": ("{ x[i] = x[i] * 0.5; }", "implicit"),
    "bfloat narrows": ("{ bfloat b = x[i]; x[i] = float(b); }", "implicit conversion loses floating-point precision"),
    "if constexpr": ("{ if constexpr (sizeof(float) == 4) x[i] = 1.0f; }", "C\\+\\+17 extension"),
    "exceptions": ("{ throw 1; }", "exceptions disabled"),
    "sum of bfloat": ("{ x[i] = float(simd_sum(bfloat(x[i]))); }", "SIMD operations take float"),
    "sum of 64 bits": ("{ x[i] = float(simd_sum(ulong(i))); }", "SIMD operations take float"),
    "unknown place": ("{} kernel void m(uint i [[thread_place]]) {}", "'uint i .*' has an attribute"),
    "threadgroup value": ("{ threadgroup float s = 0.0f; x[i] = s; }", "address space"),
}
HELPERS = """inline float first(const float* p) { return p[0]; }
inline float of_device(device const float* p) { return p[0]; }
inline device const float* constant_of(device const float* p) { return p; }
constant float table[1] = {0.0f};
inline float zero() { return table[0]; }
struct S { float a; float get() const { return a; } };"""


@pytest.mark.parametrize("name", REFUSED)
def test_refused(quick_gpu: FakeMps, name: str) -> None:
    body, message = REFUSED[name]
    source = f"{HEAD}{HELPERS.replace(chr(10), ' ')}\n{KERNEL} {body}\n"
    with pytest.raises(SyntaxError, match=message):
        quick_gpu.compile(source)


def test_a_message_has_the_line_of_the_source(quick_gpu: FakeMps) -> None:
    source = f"{HEAD}#define BODY x[i] = nothing;\n\n\n{KERNEL} {{\n    BODY\n}}\n"
    with pytest.raises(SyntaxError, match="metal:7:12: error: use of undeclared identifier 'nothing'"):
        quick_gpu.compile(source)


def test_the_same_source_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"{HEAD}{KERNEL} {{ x[i] = 1.0f; }}"
    first = build.compiled(source)
    monkeypatch.setattr(build, "run_clang", lambda *a, **k: pytest.fail("compiled again"))
    assert build.compiled(source) == first


def test_without_clang_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("FLASHPACK_CLANG", raising=False)
    build.clang.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="apt-get install clang-19"):
            build.clang()
    finally:
        build.clang.cache_clear()


PORTABLE = """
import sys, pytest
from tests.metal.emulator import build
identity = build.identity()
build.identity = lambda: identity + b"portable"
build.OPTIMIZED.append("-DMETAL_EMULATOR_PORTABLE")
sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def test_the_portable_switch_of_stacks() -> None:
    """Where there is none in assembler: a runtime of its own in a process of its own."""
    tests = [f"tests/metal/test_emulator_numbers.py::{name}[forward]" for name in ("test_shuffles", "test_atomics")]
    tests += [
        f"tests/metal/test_emulator_faults.py::test_in_every_schedule[forward-{n}]" for n in ("early_return", "shift")
    ]
    done = subprocess.run([sys.executable, "-c", PORTABLE, *tests], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
