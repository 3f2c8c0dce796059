"""What pyproject.toml cannot say yet: the native routines, built where there is a compiler."""

from setuptools import Extension, setup

NATIVE = "flashpack/kernels/cpu/native"
HEADERS = (
    "kernels",
    "level",
    "body",
    "numbers",
    "one",
    "strips",
    "many",
    "bytes",
    "plain",
    "activate",
    "decode",
    "recurrent",
    "pool",
    "workers",
)
LEVELS = ("portable", "avx2", "avx512", "neon")
# Python's own flags come first, and many say that integers wrap around: products of 16 bits took a quarter longer.
FLAGS = [
    "-O3",
    "-g0",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fno-wrapv",
    "-fstrict-overflow",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-pthread",
]

setup(
    ext_modules=[
        # A plain library, loaded with ctypes. Without a compiler the installation goes on, and numpy does its work.
        Extension(
            "flashpack.kernels.cpu.native._quantize",
            [f"{NATIVE}/quantize.c"],
            depends=[f"{NATIVE}/quantize_{name}.h" for name in ("numbers", "body", "starts", "dq")],
            extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-Wno-psabi"],
            optional=True,
        ),
        Extension(
            "flashpack.kernels.cpu.native._kernels",
            [f"{NATIVE}/{name}.cpp" for name in ("kernels", "steps", *(f"level_{level}" for level in LEVELS))],
            depends=[
                "setup.py",
                "flashpack/kernels/blocks.h",
                *(f"{NATIVE}/{n}.h" for n in HEADERS),
                f"{NATIVE}/floats_x86.inc",
            ],
            extra_compile_args=[*FLAGS, "-std=c++17"],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        ),
    ]
)
