"""Builds the C extension `edgeinfer._native`; everything else about the package is in pyproject.toml.

Without it (other systems than Linux) edgeinfer installs and runs models through stock llama.cpp.
EDGEINFER_SANITIZE=address,undefined builds it with those sanitizers (see `make sanitize`).
"""

import os
import sys
from glob import glob

from setuptools import Extension, setup


def native_extension() -> list[Extension]:
    sources = sorted(glob("native/*.c"))
    if not sys.platform.startswith("linux") or not sources:
        return []
    compile_flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-pthread"]
    link_flags = ["-pthread"]
    if sanitizers := os.environ.get("EDGEINFER_SANITIZE"):
        sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        compile_flags += [*sanitize, "-O1", "-g", "-fno-omit-frame-pointer"]
        link_flags += sanitize
    return [
        Extension(
            "edgeinfer._native",
            sources=sources,
            depends=sorted(glob("native/*.h")),
            include_dirs=["native"],
            extra_compile_args=compile_flags,
            extra_link_args=link_flags,
        )
    ]


setup(ext_modules=native_extension())
