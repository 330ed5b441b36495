"""Drives CMake for pip: CMakeLists.txt is the one description of the build."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


def setting(name: str) -> str:
    """An environment variable; a blank one counts as not set."""
    return os.environ.get(name, "").strip()


def words(name: str) -> list[str]:
    """The words of an environment variable, divided and unquoted as a shell does it."""
    try:
        return shlex.split(setting(name))
    except ValueError as error:
        raise SystemExit(
            f"rvsm_kernels: {name} is {setting(name)!r}, which cannot be divided into words: {error}"
        ) from None


def jobs(asked: int | None) -> int:
    """How many files are compiled at once: --parallel decides, else what the variables allow, else the processors."""
    limits = []
    for name in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        value = setting(name)
        if value and not re.fullmatch("0*[1-9][0-9]{0,8}", value):
            raise SystemExit(f"rvsm_kernels: {name} is {value!r}; it is a whole number above 0 or not set")
        limits += [int(value)] if value else []
    return asked or min(limits, default=os.cpu_count() or 1)


def run(command: list[str], what: str) -> None:
    """Run CMake, whose own words about an error are on the screen already."""
    result = subprocess.run(command, check=False)
    if result.returncode != 0:
        raise SystemExit(f"rvsm_kernels: CMake {what} (it returned {result.returncode}); its messages above say why")


class CMakeBuild(build_ext):
    """Configure, build, and put the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        cmake = shutil.which("cmake")
        if cmake is None:
            raise SystemExit("rvsm_kernels needs CMake to build: pip install cmake ninja")
        parallel, arguments = jobs(self.parallel), words("RVSM_CMAKE_ARGS")
        source = Path(__file__).resolve().parent
        build = Path(setting("RVSM_BUILD_DIR") or Path(self.build_temp) / "cmake").resolve()
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        ninja = shutil.which("ninja")
        # By its path: a kept build folder remembers the one of an isolated build, which is gone by the next.
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        configure = [
            cmake, "-S", str(source), "-B", str(build), *generator,
            "-U", "_Python3_*",  # what a kept build folder remembers of another Python
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            *arguments,
        ]  # fmt: skip
        target.mkdir(parents=True, exist_ok=True)
        run(configure, "could not configure the build")
        run([cmake, "--build", str(build), "--parallel", str(parallel)], "could not build the module")


class BuildPython(build_py):
    """Copies the package; a package without a compiled module gets a note that says why."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the package is the source tree, where `make build` may add a module later
            return
        note = Path(self.build_lib) / "rvsm_kernels" / "no_module.txt"
        note.unlink(missing_ok=True)
        if no_module is not None:
            note.write_text(no_module + "\n", encoding="utf-8")


def has_compiler() -> bool:
    """Whether there is a C++ compiler: the program that CXX names, else any that CMake looks for."""
    named = setting("CXX")
    if not named:
        return any(map(shutil.which, ("c++", "g++", "clang++", "cl")))
    # A path with blanks in it, or a program and its arguments ("ccache g++").
    program = named if shutil.which(named) else words("CXX")[0]
    if shutil.which(program) is None:
        raise SystemExit(f"rvsm_kernels: CXX is {named!r}, but there is no {program!r}; set it to a C++ compiler")
    return True


def why_no_module() -> str | None:
    """Why nothing is to be compiled, or None: RVSM_NATIVE=0/1 decides, else whether there is a C++ compiler."""
    wanted = setting("RVSM_NATIVE")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"rvsm_kernels: RVSM_NATIVE is {wanted!r}; it is 0, 1 or not set")
    if wanted == "0":
        return "it was installed with RVSM_NATIVE=0; install it again without"
    if not has_compiler() and wanted == "":
        print("rvsm_kernels: no C++ compiler here, so no native engine; GPU tensors go to Triton", file=sys.stderr)
        return "there was no C++ compiler when it was installed; install it again where there is one (g++, clang++)"
    return None


no_module = why_no_module()
setup(
    ext_modules=[] if no_module is not None else [Extension("rvsm_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
