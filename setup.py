"""Builds csrc/cpu with a C++ compiler alone, against PyTorch's stable ABI: one library serves every torch >= 2.11.

Install with `pip install --no-build-isolation .`; without a compiler the package installs all the same and its
operations run on the reference backend.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

TORCH = Path(torch.__file__).parent
# `make sanitize`: kernels that stop at the first access out of bounds or undefined operation, with line numbers.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-g1", "-O1"]
SANITIZE = SANITIZE if os.environ.get("FUSED_OPS_SANITIZE") else []


class ParallelBuild(build_ext):
    def build_extension(self, ext):
        compile_all = self.compiler.compile

        def compile_each(sources, *args, **kwargs):  # one thread a file
            with ThreadPoolExecutor() as pool:
                return [
                    o for objects in pool.map(lambda s: compile_all([s], *args, **kwargs), sources) for o in objects
                ]

        self.compiler.compile = compile_each
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "fused_ops._C",
            sources=sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])),
            depends=sorted(str(path) for path in Path("csrc").rglob("*") if path.suffix in (".h", ".inc")),
            include_dirs=[str(TORCH / "include")],
            library_dirs=[str(TORCH / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000")],  # 2.11
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-ffp-contract=off",  # a product and a sum are two roundings, as the formulas say
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-Wno-psabi",  # vectors are passed by value only where calls are inlined
                *SANITIZE,
            ],
            extra_link_args=SANITIZE,  # symbols stay, 4 % of the size: profilers and a test read them
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": ParallelBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
