"""Drives CMake for pip: CMakeLists.txt is the one description of the build."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    """Configure, build, and put the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("rvsm_kernels needs CMake to build: pip install cmake ninja")
        source = Path(__file__).resolve().parent
        build = Path(os.environ.get("RVSM_BUILD_DIR", Path(self.build_temp) / "cmake")).resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [
            cmake, "-S", str(source), "-B", str(build), *generator,
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *os.environ.get("RVSM_CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        subprocess.run(configure, check=True)
        jobs = self.parallel or os.cpu_count() or 1
        subprocess.run([cmake, "--build", str(build), "--parallel", str(jobs)], check=True)


def wants_module() -> bool:
    """Whether to compile: RVSM_NATIVE=0/1 decides, else whether there is a C++ compiler."""
    wanted = os.environ.get("RVSM_NATIVE", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"RVSM_NATIVE is {wanted!r}; it is 0, 1 or not set")
    compilers = [os.environ.get("CXX", "c++").split()[0], "g++", "clang++", "cl"]
    if wanted == "" and not any(map(shutil.which, compilers)):
        print("rvsm_kernels: no C++ compiler here, so no native engine; GPU tensors go to Triton", file=sys.stderr)
        return False
    return wanted != "0"


modules = [Extension("rvsm_kernels._C", sources=[])] if wants_module() else []
setup(ext_modules=modules, cmdclass={"build_ext": CMakeBuild})
