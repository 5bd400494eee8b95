"""Builds the compiled libraries with CMake and ninja; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def run(self) -> None:
        output = (
            ROOT / "dsa_kernels" if self.inplace else Path(self.build_lib).resolve() / "dsa_kernels"
        )
        build = ROOT / "build" / f"cmake-{sys.version_info.major}.{sys.version_info.minor}"
        configure = [
            f"-DDSA_OUTPUT_DIR={output}",
            f"-DPython3_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=Release",
        ]
        if archs := os.environ.get("DSA_CUDA_ARCHS"):
            configure.append(f"-DDSA_CUDA_ARCHS={archs}")
        # cmake and ninja from PyPI lie beside the interpreter, which need not be on PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        for command in (
            ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *configure],
            ["cmake", "--build", build],
        ):
            subprocess.run(command, check=True, env={**os.environ, "PATH": path})


setup(ext_modules=[Extension("dsa_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
