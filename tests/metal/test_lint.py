"""Each rule of the lint finds what it is for; what is right passes."""

from __future__ import annotations

import pytest

from tests.metal.lint import lint

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
KERNEL = "kernel void k(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]])"


def kernel(body: str) -> str:
    return f"{KERNEL} {{\n{body}\n}}"


def signed(parameters: str) -> str:
    return f"kernel void k({parameters}) {{}}"


BROKEN = {
    "non-ascii": ("// a \u2192 b", "ASCII"),
    "include": ('#include "other.h"', "one string"),
    "double": (kernel("x[i] = float(double(x[i]));"), "'double'"),
    "long long": (kernel("long long n = 1; x[i] = float(n);"), "'long long'"),
    "literal": (kernel("x[i] = x[i] * 0.5;"), "'0.5': double in C++"),
    "exponent": (kernel("x[i] = x[i] * 1e-6;"), "'1e-6': double in C++"),
    "macro literal": ("#define HALF 0.5\n" + kernel("x[i] = x[i] * HALF;"), "line 5: '0.5': double in C++"),
    "goto": (kernel("again: goto again;"), "'goto'"),
    "virtual": ("struct S { virtual float f(); };", "'virtual'"),
    "new": (kernel("auto p = new float;"), "'new'"),
    "try": (kernel("try {} catch (...) {}"), "'try'"),
    "union": ("union U { float f; uint u; };", "'union'"),
    "std": (kernel("x[i] = std::exp(x[i]);"), "'std::'"),
    "main": ("inline float main(float x) { return x; }", "'main('"),
    "base class": ("struct A {}; struct B : A {};", "a base class"),
    "lambda": (kernel("auto f = [&](float v) { return v + 1.0f; }; x[i] = f(x[i]);"), "a lambda"),
    "lambda without parameters": (kernel("auto f = [i] { return i; }; x[i] = float(f());"), "a lambda"),
    "dynamic threadgroup memory": (signed("threadgroup float* s [[threadgroup(0)]]"), "torch cannot size"),
    "function constant": ("constant uint N [[function_constant(0)]];", "torch cannot set"),
    "host name": ('template [[host_name("k_1")]] kernel void k<1>();', "a name of its own"),
    "kernel that returns": (KERNEL.replace("void", "float") + " { return x[i]; }", "'kernel float'"),
    "kernel attribute": ("[[kernel]] void k() {}", "a kernel is written"),
    "memory order": (kernel("foo(memory_order_seq_cst);"), "relaxed"),
    "wide atomic": (signed("device atomic_ulong* n [[buffer(0)]]"), "32 bits"),
    "pointer": (kernel("float* p = nullptr;"), "'float*': a pointer"),
    "reference": (kernel("float v = 1.0f; float& r = v;"), "'float&': a pointer"),
    "const reference": ("inline float f(const float4& v) { return v.x; }", "'const float4&'"),
    "own type": ("struct S { uint n; };\ninline uint f(S& s) { return s.n; }", "line 4: 'S&'"),
    "template type": ("template <typename T> inline T f(T* p) { return p[0]; }", "'T*'"),
    "auto": (kernel("auto& r = x[i]; r = 1.0f;"), "'auto&'"),
    "cast": (kernel("uint n = 0; x[i] = *(float*)&n;"), "'float*'"),
    "returned pointer": ("float* f();", "'float*'"),
    "recursion": ("inline int f(int n) { return n < 2 ? n : f(n - 1); }", "'f' calls itself"),
    "mutual recursion": (
        "int g(int n);\ninline int f(int n) { return g(n); }\nint g(int n) { return f(n); }",
        "'g' calls itself",
    ),
    "template recursion": ("template <int N> int f() { return N + f<N - 1>(); }", "'f' calls itself"),
    "program variable": ("float table[2] = {1.0f, 2.0f};", "not in constant memory"),
    "static const table": ("static const float table[2] = {1.0f, 2.0f};", "not in constant memory"),
    "constexpr": ("constexpr uint N = 4;", "not in constant memory"),
    "static in a function": (kernel("static const float t[2] = {1.0f, 2.0f}; x[i] = t[0];"), "'static'"),
    "threadgroup in a helper": (
        "inline void f() { threadgroup float s[4]; }",
        "'s[4]': a threadgroup variable outside",
    ),
    "threadgroup of the program": ("threadgroup float s[4];", "outside of a kernel"),
    "threadgroup value": (kernel("threadgroup float s = 0.0f; x[i] = s;"), "no initial value"),
    "buffer twice": (signed("device float* x [[buffer(0)]], device float* y [[buffer(0)]]"), "[0, 0]: torch binds"),
    "buffer left out": (signed("device float* x [[buffer(0)]], device float* y [[buffer(2)]]"), "[0, 2]: torch binds"),
    "too many": (signed(", ".join(f"device float* x{i} [[buffer({i})]]" for i in range(32))), "32 buffers, 31"),
    "no attribute": (signed("device float* x"), "needs a name and one attribute"),
    "unknown attribute": (signed("uint i [[thread_position]]"), "an attribute that kernels here cannot have"),
    "buffer by value": (signed("uint n [[buffer(0)]]"), "'uint n': a buffer is"),
    "buffer without space": (signed("const uint& n [[buffer(0)]]"), "'const uint& n': a buffer is"),
    "64 bits": (signed("constant long& n [[buffer(0)]]"), "64-bit"),
    "position type": (signed("int i [[thread_position_in_grid]]"), "not a type of thread_position_in_grid"),
    "index type": (signed("uint2 i [[thread_index_in_simdgroup]]"), "not a type of thread_index_in_simdgroup"),
    "mixed positions": (
        signed("uint i [[thread_position_in_grid]], uint2 j [[threads_per_threadgroup]]"),
        "of 1 and 2 components",
    ),
    "twice the same kernel": (signed("") + "\n" + signed(""), "defined twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_found(name: str) -> None:
    source, expected = BROKEN[name]
    found = lint(HEAD + source)
    assert any(expected in message for message in found), found


def test_what_is_right_passes() -> None:
    assert lint(RIGHT) == []


def test_the_line_is_that_of_the_source() -> None:
    assert lint(HEAD + "// a comment\n\n/* of\nseveral lines */\nunion U { float f; };") == [
        "line 7: 'union': not in Metal"
    ]


RIGHT = """#include <metal_stdlib>
using namespace metal;

enum class Kind : uint { one, two };
constant float table[4] = {0.0f, 1.0f, 2.5e-3f, 3.0f};
constant constexpr uint WIDTH = 32 * 2;
struct Parameters { uint rows; float scale; device const float* more; };
template <typename T> struct Pair { T a, b; };
typedef device const uchar* Bytes;
#define SQUARE(x) ((x) * (x))
static inline float helper(float x, thread float& sum) { return sum += x * SQUARE(x); }
template <typename T, int N>
inline float load(device const T* p, constant Parameters& parameters, threadgroup float (&shared)[N], uint i)
{
    thread const float* nothing = nullptr;
    float x = float(p[i]), y = 3 * x * parameters.scale & 1 ? 1.0f : .5f;
    return nothing ? x : x * y + shared[i % N];
}
inline float even(float x) { return x; }
kernel void copy(
    device const half* x [[buffer(0)]],
    device float* y [[buffer(1)]],
    constant Parameters& parameters [[buffer(2)]],
    device atomic_uint* count [[buffer(3)]],
    uint2 i [[thread_position_in_grid]],
    uint2 size [[threads_per_grid]],
    ushort lane [[thread_index_in_simdgroup]])
{
    threadgroup float shared[1 == 1 ? 32 : 64], other[2];
    threadgroup float* p = shared;
    float sum = 0.0f;
    p[lane] = helper(float(x[i.x]), sum);
    y[i.x * size.y] = load<half>(x, parameters, shared, i.x) + even(even(sum)) * table[i.y & 3u];
    atomic_fetch_add_explicit(count, 1u, memory_order_relaxed);
    switch (i.x) { case 0: break; default: return; }
}
"""
