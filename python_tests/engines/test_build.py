"""The build and what it leaves out: setup.py, cmake/cuda.cmake, and a compiled module beside another torch."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rvsm_kernels.engines import native as native_engine

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
SETTINGS = (
    "MAX_JOBS CMAKE_BUILD_PARALLEL_LEVEL RVSM_CMAKE_ARGS RVSM_BUILD_DIR RVSM_NATIVE RVSM_CUDA RVSM_ISA CXX CC CUDACXX"
    " TORCH_CUDA_ARCH_LIST TRITON_INTERPRET RVSM_OTHER_TORCH"
).split()

needs_cmake = pytest.mark.skipif(CMAKE is None, reason="there is no CMake here")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the build is left from outside."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def program(path: Path, text: str = "exit 0") -> Path:
    """An executable that a shell runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---- setup.py --------------------------------------------------------------------------------------------------------


class Setup:
    """setup.py in a small project with only a C++ compiler and CMake on PATH; commands are noted, not run."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.commands: list[list[str]] = []
        self.status = 0
        self.given: dict[str, Any] = {}
        (folder / "rvsm_kernels").mkdir()
        (folder / "rvsm_kernels" / "__init__.py").touch()
        for name in ("g++", "cmake", "ccache"):
            program(folder / "bin" / name)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", str(folder / "bin"))
        self.setuptools = pytest.importorskip("setuptools")
        monkeypatch.setattr(self.setuptools, "setup", lambda **given: self.given.update(given))
        monkeypatch.setattr(subprocess, "run", self._run)

    def _run(self, command: list[str], check: bool = False) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if check and self.status != 0:
            raise subprocess.CalledProcessError(self.status, command)
        return subprocess.CompletedProcess(command, self.status)

    def command(self, name: str, **options: Any) -> None:
        """Run a command of setup.py."""
        runpy.run_path(str(ROOT / "setup.py"))
        project = {"name": "rvsm_kernels", "packages": ["rvsm_kernels"], "script_name": "setup.py"}
        distribution = self.setuptools.Distribution({**project, **self.given})
        command = distribution.get_command_obj(name)
        command.build_lib = str(self.folder / "lib")
        if name == "build_ext":
            command.build_temp = str(self.folder / "temp")
        for key, value in options.items():
            setattr(command, key, value)
        command.ensure_finalized()
        command.run()

    def build(self, **options: Any) -> tuple[list[str], list[str]]:
        """The commands that configure and build."""
        self.commands.clear()
        self.command("build_ext", **options)
        configure, build = self.commands
        return configure, build


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    return Setup(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("max_jobs", "level", "parallel", "expected"),
    [
        ("3", None, None, 3),
        (None, "5", None, 5),
        ("3", "5", None, 3),
        ("7", "5", None, 5),
        (" 2 ", "", None, 2),
        ("3", "5", 9, 9),
        ("", " ", None, os.cpu_count()),
        (None, None, None, os.cpu_count()),
    ],
)
def test_parallel_jobs(
    script: Setup,
    monkeypatch: pytest.MonkeyPatch,
    max_jobs: str | None,
    level: str | None,
    parallel: int | None,
    expected: int,
) -> None:
    """Both variables limit them; the option of the command line decides."""
    for name, value in (("MAX_JOBS", max_jobs), ("CMAKE_BUILD_PARALLEL_LEVEL", level)):
        if value is not None:
            monkeypatch.setenv(name, value)
    _, build = script.build(parallel=parallel)
    assert build[-2:] == ["--parallel", str(expected)]


@pytest.mark.parametrize("name", ["MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²", "9" * 5000])
def test_invalid_parallel_jobs(script: Setup, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=f"{name} is '{re.escape(value)}'; it is a whole number above 0"):
        script.build()
    assert script.commands == []


def test_cmake_arguments_are_divided_as_in_a_shell(script: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RVSM_CMAKE_ARGS", """-DCMAKE_CXX_FLAGS="-g -Og" '-DA=b c' -DRVSM_CUDA=0""")
    configure, _ = script.build()
    assert configure[-3:] == ["-DCMAKE_CXX_FLAGS=-g -Og", "-DA=b c", "-DRVSM_CUDA=0"]


@pytest.mark.parametrize("value", ['-DCMAKE_CXX_FLAGS="-g', "-DA='", "-DA=b\\"])
def test_cmake_arguments_that_cannot_be_divided(script: Setup, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("RVSM_CMAKE_ARGS", value)
    with pytest.raises(SystemExit, match=r"RVSM_CMAKE_ARGS is .*, which cannot be divided into words: No "):
        script.build()
    assert script.commands == []


def test_blank_build_folder(script: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no name of a folder; the current one stays clean."""
    monkeypatch.setenv("RVSM_BUILD_DIR", "")
    configure, _ = script.build()
    assert configure[configure.index("-B") + 1] == str(script.folder / "temp" / "cmake")


def test_a_kept_build_folder_forgets_another_environment(script: Setup) -> None:
    """Whose ninja is gone, as that of build isolation, or whose Python is another."""
    ninja = program(script.folder / "bin" / "ninja")
    configure, _ = script.build()
    assert f"-DCMAKE_MAKE_PROGRAM={ninja}" in configure
    at = configure.index("-U")
    assert configure[at + 1 : at + 3] == ["_Python3_*", f"-DPython3_EXECUTABLE={sys.executable}"]


@pytest.mark.parametrize("value", ["", " ", "g++", "ccache g++", "'g++' -m64"])
def test_compilers_that_are_there(script: Setup, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CXX", value)
    monkeypatch.setenv("CC", "")
    assert len(script.build()) == 2


def test_a_compiler_with_blanks_in_its_path(script: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(program(script.folder / "my tools" / "c++")))
    assert len(script.build()) == 2


@pytest.mark.parametrize("value", ["no-such-c++", "no-such-c++ -m64", "''"])
@pytest.mark.parametrize("native", ["", "1"])
def test_a_compiler_that_is_not_there(script: Setup, monkeypatch: pytest.MonkeyPatch, value: str, native: str) -> None:
    """Whoever names a compiler does not want another, nor none."""
    monkeypatch.setenv("CXX", value)
    monkeypatch.setenv("RVSM_NATIVE", native)
    with pytest.raises(SystemExit, match=r"CXX is .*, but there is no "):
        script.build()
    monkeypatch.setenv("RVSM_NATIVE", "0")
    script.command("build_py")


def test_a_compiler_that_cannot_be_read(script: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "-g')
    monkeypatch.setenv("PATH", str(script.folder))
    with pytest.raises(SystemExit, match=r"CXX is .*, which cannot be divided into words: No closing quotation"):
        script.build()


def test_an_error_of_cmake_ends_in_a_sentence(script: Setup) -> None:
    script.status = 2
    with pytest.raises(SystemExit, match=r"CMake could not configure the build \(it returned 2\)"):
        script.build()


def test_a_package_without_a_module_says_why(
    script: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that is built again with a module says nothing."""
    note = script.folder / "lib" / "rvsm_kernels" / "no_module.txt"
    monkeypatch.setenv("RVSM_NATIVE", "0")
    script.command("build_py")
    assert "RVSM_NATIVE=0" in note.read_text()
    monkeypatch.setenv("RVSM_NATIVE", "")
    script.command("build_py")
    assert not note.exists()
    (script.folder / "bin" / "g++").unlink()
    script.command("build_py")
    assert "no C++ compiler" in note.read_text() and "no C++ compiler" in capsys.readouterr().err
    monkeypatch.setenv("RVSM_NATIVE", "yes")
    with pytest.raises(SystemExit, match="RVSM_NATIVE is 'yes'; it is 0, 1 or not set"):
        script.command("build_py")


# ---- CMake -----------------------------------------------------------------------------------------------------------

# cuda.cmake without a project: the compiler is tried by a module of this name that comes before CMake's.
STUB = """
cmake_minimum_required(VERSION 3.18)
set(CMAKE_MODULE_PATH {folder})
macro(enable_language)
endmacro()
set(CMAKE_CUDA_COMPILER_VERSION {version})
include({root}/cmake/cuda.cmake)
message("found=${{RVSM_CUDA_FOUND}}")
message("why=${{RVSM_NO_CUDA}}")
message("architectures=${{RVSM_ARCHITECTURES}}")
"""
TRIES = """
macro(check_language language)
  if({works} AND NOT CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_COMPILER "$ENV{{CUDACXX}}")
  endif()
endmacro()
"""


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What cuda.cmake finds where there is an nvcc or none, in CMake's words."""

    def find(
        *arguments: str, nvcc: bool = True, works: bool = True, version: str = "12.8", known: str = "80 90"
    ) -> str:
        listed = "\\n".join(f"compute_{k}" for k in known.split())
        name = program(tmp_path / "nvcc", f"printf '{listed}\\n'") if nvcc else "OFF"
        (tmp_path / "CheckLanguage.cmake").write_text(TRIES.format(works="ON" if works and nvcc else "OFF"))
        stub = tmp_path / "stub.cmake"
        stub.write_text(STUB.format(folder=tmp_path, root=ROOT, version=version))
        command = [str(CMAKE), f"-DRVSM_NVCC={name}", *arguments, "-P", str(stub)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (result.returncode == 0) == ("found=" in result.stderr)
        return " ".join((result.stdout + result.stderr).split())  # CMake breaks lines

    return find


@needs_cmake
def test_why_there_is_no_cuda(cuda: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "found=ON why= architectures=80 90+PTX" in cuda()
    assert "found=OFF why=it found no nvcc architectures=" in cuda(nvcc=False)
    assert "found=OFF why=its nvcc was 11.8, older than 12.1" in cuda(version="11.8")
    broken = cuda(works=False)
    assert "found=OFF why=its nvcc could not compile a test" in broken and "CMake Warning" in broken
    assert "found=OFF why=it was told RVSM_CUDA=0" in cuda("-DRVSM_CUDA=0")
    monkeypatch.setenv("RVSM_CUDA", "0")
    assert "found=OFF why=it was told RVSM_CUDA=0" in cuda()
    assert "found=ON" in cuda("-DRVSM_CUDA=ON")


@needs_cmake
def test_rvsm_cuda(cuda: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """1 insists, a blank value counts as not set, and what is neither is refused."""
    for blank in ("", " "):
        monkeypatch.setenv("RVSM_CUDA", blank)
        assert "found=ON" in cuda()
        assert "why=it found no nvcc" in cuda(nvcc=False)
    monkeypatch.setenv("RVSM_CUDA", "1")
    assert "found=ON" in cuda()
    assert "there is no nvcc that works" in cuda(nvcc=False)
    assert "there is no nvcc that works" in cuda(works=False)
    assert "needs nvcc 12.1 or newer; this is 11.8" in cuda(version="11.8")
    for invalid in ("maybe", "2", "0;1"):
        monkeypatch.setenv("RVSM_CUDA", invalid)
        assert f'RVSM_CUDA is "{invalid}"; it is 0, 1 or not set' in cuda()


@needs_cmake
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "architectures=80 90+PTX"),
        (" ; ", "architectures=80 90+PTX"),
        ("8.0;9.0a 9.0+PTX;", "architectures=80 90a 90+PTX"),
        ("9.9", "nvcc 12.8 does not know 9.9; it knows compute_80 compute_90"),
        ("8.0;Hopper", "Hopper is no architecture"),
        ("sm_80", "sm_80 is no architecture"),
    ],
)
def test_architectures(cuda: Callable[..., str], monkeypatch: pytest.MonkeyPatch, value: str, expected: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", value)
    assert expected in cuda()


@needs_cmake
def test_a_compiler_that_lists_no_architectures(cuda: Callable[..., str]) -> None:
    assert "lists nothing; is it nvcc?" in cuda(known="")


@pytest.mark.slow
@needs_cmake
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
def test_the_reason_is_compiled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configured only, with a compiler behind a launcher; one file hears of the reason."""
    monkeypatch.setenv("CXX", f"{program(tmp_path / 'launcher', 'exec ' + chr(34) + '$@' + chr(34))} g++")
    monkeypatch.setenv("CUDACXX", " ")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path / "build"), *generator, "-DRVSM_CUDA=0"]
    command.append(f"-DPython3_EXECUTABLE={sys.executable}")
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    told = [Path(c["file"]).name for c in commands if "RVSM_NO_CUDA" in c["command"]]
    assert told == ["bindings.cpp"]
    assert all(str(tmp_path / "launcher") in c["command"] for c in commands)


# ---- the module, when it is imported ---------------------------------------------------------------------------------

Load = Callable[..., types.ModuleType]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a copy of native.py beside a compiled module, or beside files that are none."""

    def start(module: Any = None, files: dict[str, bytes] | None = None) -> types.ModuleType:
        for name in [name for name in sys.modules if name.split(".")[0] == "rvsm_copy"]:
            del sys.modules[name]
        folder = tmp_path / "rvsm_copy"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in ("engines", "method"):
            shutil.copytree(ROOT / "rvsm_kernels" / name, folder / name)
        for name, content in (files or {}).items():
            (folder / name).write_bytes(content)
        package: Any = types.ModuleType("rvsm_copy")
        package.__path__ = [str(folder)]
        sys.modules["rvsm_copy"] = package
        if module is not None:
            package._C = module
        importlib.invalidate_caches()
        return importlib.import_module("rvsm_copy.engines.native")

    yield start
    for name in [name for name in sys.modules if name.split(".")[0] == "rvsm_copy"]:
        del sys.modules[name]


class Compiled:
    """A compiled module, as far as it is asked when it is imported."""

    has_cuda = False
    penalties = ("l1", "l0", "tl1")
    numbers: ClassVar = {"prox": 6, "split": 5, "sgd": 6, "none": 0, "adamw": 9}

    def __init__(self, built_for: str = f"torch {torch.__version__}", error: Exception | None = None) -> None:
        self.info = {
            "built for": built_for,
            "vectors": "base",
            "architectures": "none",
            "without CUDA": "it found no nvcc",
        }
        self.error = error

    def build_info(self) -> dict[str, str]:
        return self.info

    def check(self, params: list[torch.Tensor], group_dim: list[int]) -> None:
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def compiled() -> Any:
    """The compiled module of this build."""
    if native_engine.load_error is not None:
        pytest.skip(native_engine.load_error)
    return native_engine._C


def test_what_the_module_was_built_for(compiled: Any) -> None:
    """It says so without any kernel having run, and in words that are found in its file."""
    built_for = compiled.build_info()["built for"]
    assert re.fullmatch(r"torch \d+\.\d+\.\d+\S*", built_for)
    assert f"built for {built_for}\0".encode() in Path(compiled.__file__).read_bytes()
    assert compiled.has_cuda != ("without CUDA" in compiled.build_info())


def test_a_module_for_another_torch_that_works(load: Load, compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.99.1+cpu")
    built_for = re.escape(compiled.build_info()["built for"])
    with pytest.warns(RuntimeWarning, match=rf"built for {built_for}, this is torch 2\.99\.1\+cpu.*build it again"):
        native = load(compiled)
    assert native.load_error is None
    assert "2.99.1" in native.other_torch and "build it again" in native.other_torch


@pytest.mark.parametrize("version", ["2.13.5+cu130", "2.13.0a0+git1234567", "2.13.0.dev20260101"])
def test_the_same_minor_version_is_no_other_torch(load: Load, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with quiet():
        native = load(Compiled("torch 2.13.0"))
    assert native.load_error is None and native.other_torch is None


@pytest.mark.parametrize("error", [TypeError("check(): incompatible function arguments"), RuntimeError("no such op")])
def test_a_module_for_another_torch_that_does_not_work(load: Load, error: Exception) -> None:
    """It is refused: the other engines serve."""
    with pytest.warns(RuntimeWarning, match="built for torch 1.13.1, this is"):
        native = load(Compiled("torch 1.13.1", error))
    for word in ("torch 1.13.1", f"torch {torch.__version__}", str(error), "build it again"):
        assert word in native.load_error
    assert native._C is None and native.missing_cuda() == native.load_error


@pytest.mark.parametrize(
    ("content", "built_for"),
    [(b"\0built for\0built for torch 2.11.0\0", "torch 2.11.0"), (b"\0torch\0", "an unknown torch")],
)
def test_a_module_that_does_not_load(load: Load, content: bytes, built_for: str) -> None:
    with pytest.warns(RuntimeWarning, match=f"runs without its compiled module: .*built for {built_for}, this is"):
        native = load(files={f"_C{EXTENSION_SUFFIXES[0]}": content})
    assert f"was built for {built_for}, this is torch {torch.__version__}" in native.load_error
    assert "does not load" in native.load_error and "build it again" in native.load_error
    assert native._C is None


def test_no_module(load: Load) -> None:
    """For this Python, by wish, or at all."""
    with quiet():
        assert "make build" in load().load_error
        assert "RVSM_NATIVE=0" in load().load_error
        other = load(files={"_C.cpython-39-x86_64-linux-gnu.so": b""}).load_error
        assert "for this Python" in other and "_C.cpython-39-x86_64-linux-gnu.so" in other
        told = load(
            files={"no_module.txt": b"it was installed with RVSM_NATIVE=0; install it again without\n"}
        ).load_error
        assert told.endswith("no compiled module: it was installed with RVSM_NATIVE=0; install it again without")


def test_missing_cuda_says_why(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    module = Compiled()
    for reason in ("it was told RVSM_CUDA=0", "it found no nvcc", "its nvcc was 11.8, older than 12.1"):
        module.info["without CUDA"] = reason
        assert f"this build has no CUDA kernels: {reason}; " in load(module).missing_cuda()


def test_rvsm_isa(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that no instruction set has is not taken for the smallest without a word."""
    for name in ("", "base", "avx2", "avx512"):
        monkeypatch.setenv("RVSM_ISA", name)
        with quiet():
            load(Compiled())
    for name in ("AVX2", "sse", " "):
        monkeypatch.setenv("RVSM_ISA", name)
        with pytest.warns(RuntimeWarning, match=f"RVSM_ISA is '{name}', no instruction set .*base, avx2, avx512"):
            load(Compiled())


MINOR = ".".join(torch.__version__.split(".")[:2])


def program_beside(version: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """From the import to a step and what a bug report holds, in a process whose torch has a version."""
    code = (
        f"import runpy, torch; torch.__version__ = {version!r}; import rvsm_kernels as rk\n"
        "rk.prox(torch.ones(3), 'l1', 0.5); runpy.run_module('rvsm_kernels', run_name='__main__')\n"
    )
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, **settings}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.99.0", f"{MINOR}0.1"])
def test_a_program_beside_another_torch(compiled: Any, version: str) -> None:
    """The module refuses before it calls torch, the import says so, and another engine serves."""
    result = program_beside(version)
    why = rf"built for torch \S+, this is torch {re.escape(version)}, and it does not load"
    why += r" \(another minor version; RVSM_OTHER_TORCH"
    assert re.search(f"RuntimeWarning: rvsm_kernels runs without its compiled module: .*{why}", result.stderr)
    assert re.search(rf"native +cpu +.*{why}=1 loads it all the same\); build it again", result.stdout)
    assert re.search(r"reference +any +available", result.stdout)


@pytest.mark.slow
def test_a_program_beside_another_patch_of_torch(compiled: Any) -> None:
    result = program_beside(f"{MINOR}.99+cu130")
    assert re.search(r"native +cpu +available", result.stdout) and "RuntimeWarning" not in result.stderr


@pytest.mark.slow
def test_a_program_that_tries_another_torch(compiled: Any) -> None:
    """RVSM_OTHER_TORCH=1 loads the module, with a warning; an unknown RVSM_ISA changes nothing."""
    result = program_beside("2.99.0", RVSM_OTHER_TORCH="1", RVSM_ISA="nonsense")
    assert "RuntimeWarning: The compiled module of rvsm_kernels was built for torch" in result.stderr
    assert "RVSM_ISA is 'nonsense'" in result.stderr
    assert re.search(
        r"warning +the compiled module was built for torch \S+, this is torch 2\.99\.0: build", result.stdout
    )
    assert re.search(r"native +cpu +available", result.stdout)
    code = "from rvsm_kernels import _C; print(_C.build_info()['vectors'])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert re.search(rf"vectors +{plain.stdout}", result.stdout)


# ---- Triton ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def missing_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str | None]:
    """The answer where Triton is installed and no compiler is on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    return importlib.import_module("rvsm_kernels.engines.registry").missing_triton


def test_the_c_compiler_of_triton(
    tmp_path: Path, missing_triton: Callable[[str], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton runs what CC names, also where that is nothing."""
    assert "install gcc or clang, or set CC" in str(missing_triton("xpu"))
    gcc = program(tmp_path / "bin" / "gcc")
    assert missing_triton("xpu") is None
    for empty in ("", " "):
        monkeypatch.setenv("CC", empty)
        assert "CC is set but empty" in str(missing_triton("xpu"))
    monkeypatch.setenv("CC", "no-such-cc")
    assert "CC is 'no-such-cc', and there is no such program" in str(missing_triton("xpu"))
    for there in ("gcc", str(gcc), "gcc -m64", str(program(tmp_path / "my tools" / "cc"))):
        monkeypatch.setenv("CC", there)
        assert missing_triton("xpu") is None


def test_the_interpreter_of_triton(
    missing_triton: Callable[[str], str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("", "0"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        assert str(missing_triton("cpu")).endswith("(TRITON_INTERPRET=1)")
    monkeypatch.setenv("TRITON_INTERPRET", "2")
    assert "'2' does not mean yes" in str(missing_triton("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "on")
    assert missing_triton("cpu") is None
    assert "TRITON_INTERPRET=on is set" in str(missing_triton("cuda"))
