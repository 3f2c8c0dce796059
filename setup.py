"""What pyproject.toml cannot say yet: the native routines, built where there is a compiler."""

from setuptools import Extension, setup

NATIVE = "flashpack/kernels/cpu/native"

setup(
    ext_modules=[
        # A plain library, loaded with ctypes. Without a compiler the installation goes on, and numpy does its work.
        Extension(
            "flashpack.kernels.cpu.native._quantize",
            [f"{NATIVE}/quantize.c"],
            depends=[f"{NATIVE}/quantize_body.h"],
            extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-Wno-psabi"],
            optional=True,
        )
    ]
)
