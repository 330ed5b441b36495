"""What pip installs: one small build, in folders with spaces and a locale without UTF-8, and what is done with it.

The environments have, by a path file, what the Python that runs the tests has: pip, torch, setuptools, triton.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from builds import shared_folder

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("csrc", "cmake", "rvsm_kernels", "CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py")
NO_UTF8 = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
OFFLINE = ("No matching distribution found", "Could not find a version", "Failed to establish a new connection")


def has(name: str) -> bool:
    """Whether a package is installed. To look for the module pip would give this process the distutils of Python."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the environments are made for Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here"),
    *(pytest.mark.skipif(not has(name), reason=f"there is no {name} here") for name in ("pip", "setuptools", "cmake")),
]

STEP = """
import sys, torch, rvsm_kernels as rk
from pathlib import Path
model = torch.nn.Linear(6, 4)
optimizer = rk.RVSM(rk.param_groups(model, penalty="l0", lam=1e-2, beta=0.1), lr=0.1, momentum=0.9, engine={engine!r})
model(torch.ones(2, 6)).square().sum().backward()
before = model.weight.detach().clone()
optimizer.step()
assert not torch.equal(before, model.weight)
assert Path(rk.__file__).is_relative_to(sys.argv[1]), rk.__file__
"""

REPORTS = """
import importlib.util, locale, sys, torch, rvsm_kernels as rk
assert locale.getpreferredencoding(False) != "UTF-8" and sys.stdout.encoding != "utf-8", sys.stdout.encoding
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 16, 4))
x = torch.ones(2, 3, 6, 6)
groups = rk.param_groups(net, structure="coupled", example_inputs=x, penalty="l0", lam=0.0, beta=1.0)
optimizer = rk.RVSM(groups, lr=0.01)
schedule = rk.SparsitySchedule(optimizer, 0.5, of="groups", end=2, every=1)
print(rk.describe(net), rk.param_groups(net, verbose=True), optimizer, schedule)
print(rk.PenaltySchedule(optimizer, "lam", steps=4))
for _ in range(3):
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()
    schedule.step()
print(rk.sparsity(net), optimizer.sparsity(), repr(optimizer.sparsity()))
report = rk.shrink(net, optimizer, example_inputs=x)
print(report, repr(report), rk.suggest(optimizer, 0.9, steps=100))
if importlib.util.find_spec("safetensors") is not None:
    print(rk.save_sparse(net, "net.safetensors"), rk.load_sparse(net, "net.safetensors"))
"""


def environment(**settings: str) -> dict[str, str]:
    """The variables of a child: no setting of the build, and no folder where Python would find the source tree."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RVSM_", "PYTHON", "CMAKE_")) and k != "CXX"}
    scripts = str(Path(sys.executable).parent)  # cmake and ninja
    return {**kept, "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]), **settings}


def succeeds(command: Sequence[str | Path], cwd: Path, env: dict[str, str], **options: object) -> str:
    """What a command that must succeed prints."""
    result = subprocess.run(  # type: ignore[call-overload]
        command,
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=1500,
        check=False,
        **options,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return str(result.stdout + result.stderr)


def make_environment(folder: Path) -> Path:
    """The Python of a new environment."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def settings_of_build(folder: Path) -> dict[str, str]:
    """One small build for all, which a second one goes on from."""
    return environment(
        **NO_UTF8,
        RVSM_CUDA="0",
        RVSM_BUILD_DIR=str(folder / "build folder"),
        RVSM_CMAKE_ARGS="-DRVSM_BASE_ONLY=ON -DRVSM_OPTIMIZATION=-O0 -DCMAKE_CXX_FLAGS_RELEASE=-O0",
        PIP_CONSTRAINT=str(folder / "constraints.txt"),
        PIP_BUILD_CONSTRAINT=str(folder / "constraints.txt"),  # the name since pip 25.3
    )


@dataclass(frozen=True)
class Built:
    """The sources, the wheel, and an environment that has it."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "source with spaces"

    @property
    def wheel(self) -> Path:
        (found,) = (self.folder / "wheels").glob("*.whl")
        return found

    @property
    def not_isolated(self) -> str | None:
        """Why build isolation was not tried, or None."""
        note = self.folder / "not_isolated.txt"
        return note.read_text(encoding="utf-8") if note.exists() else None

    @property
    def python(self) -> Path:
        return self.folder / "environment with spaces" / "bin" / "python"

    @property
    def site(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.python.parents[1])}))

    def make(self) -> None:
        """Build the wheel with isolation where torch can be had, and install it."""
        self.source.mkdir(parents=True)
        for name in PROJECT:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            else:
                shutil.copy(ROOT / name, self.source / name)
        shutil.copy(ROOT / "constraints.txt", self.folder / "constraints.txt")
        make_environment(self.python.parents[1])
        command = [self.python, "-m", "pip", "wheel", "--no-deps", "-w", self.folder / "wheels", self.source]
        env = settings_of_build(self.folder)
        reason = "with CUDA, torch and what it needs are gigabytes" if torch.version.cuda is not None else None
        if reason is None:
            first = subprocess.run(
                command, cwd=self.folder, env=env, capture_output=True, text=True, errors="replace", check=False
            )
            reason = next((line for line in first.stderr.splitlines() for word in OFFLINE if word in line), None)
            assert first.returncode == 0 or reason is not None, f"{first.stdout[-3000:]}\n{first.stderr[-3000:]}"
        if reason is not None:
            (self.folder / "not_isolated.txt").write_text(reason, encoding="utf-8")
            succeeds([*command, "--no-build-isolation"], self.folder, env)
        install = [self.python, "-m", "pip", "install", "--no-index", "--no-deps", self.wheel]
        succeeds(install, self.folder, environment(**NO_UTF8))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Made by the first of the processes that share the tests."""
    with shared_folder(tmp_path_factory, "installed") as folder:
        built = Built(folder)
        done = built.folder / "done"
        if not done.exists():
            shutil.rmtree(built.folder, ignore_errors=True)
            built.make()
            done.touch()
    return built


def test_build_isolation(built: Built) -> None:
    """The wheel holds a module and nothing of the build; pip has made it with a torch that it installed itself."""
    names = zipfile.ZipFile(built.wheel).namelist()
    (module,) = [name for name in names if name.endswith(".so")]
    assert module == f"rvsm_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert "rvsm_kernels/no_module.txt" not in names and "rvsm_kernels/py.typed" in names
    assert {name.split("/")[0] for name in names} == {
        "rvsm_kernels",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    if built.not_isolated is not None:
        pytest.skip(built.not_isolated)


def test_a_wheel_needs_torch_and_the_system_alone(built: Built) -> None:
    """Then auditwheel, told to leave torch's libraries out, has nothing to copy: the one OpenMP is torch's."""
    (module,) = (built.site / "rvsm_kernels").glob("_C*.so")
    entries = succeeds(["readelf", "-dW", module], built.folder, environment(LC_ALL="C")).splitlines()
    needed = {line.split("[")[1].rstrip("]") for line in entries if "(NEEDED)" in line}
    torchs = {"libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so", "libgomp.so.1"}
    system = {
        "libstdc++.so.6",
        "libm.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libdl.so.2",
        "libpthread.so.0",
        "librt.so.1",
    }
    assert {name for name in needed - torchs - system if not name.startswith("ld-linux")} == set()
    assert not any("PATH)" in line for line in entries)  # RPATH, RUNPATH


def test_paths_with_spaces(built: Built, tmp_path: Path) -> None:
    code = STEP.format(engine="native")
    succeeds([built.python, "-c", code, built.site], tmp_path, environment())


def test_a_locale_without_utf8(built: Built, tmp_path: Path) -> None:
    """What the package prints of itself is ASCII."""
    env = environment(**NO_UTF8)
    printed = succeeds([built.python, "-m", "rvsm_kernels"], tmp_path, env)
    assert "native     cpu   available" in printed and printed.isascii()
    assert succeeds([built.python, "-c", REPORTS], tmp_path, env).isascii()


def without_rights() -> None:
    """In a child of root: files and folders refuse it what their modes refuse their owner."""
    PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1
    if os.geteuid() == 0 and ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, 0, 0, 0) != 0:
        raise OSError("root keeps its right to write everywhere")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing below can be written."""
    paths = [p for p in (folder, *folder.rglob("*")) if not p.is_symlink()]
    modes = {path: path.stat().st_mode for path in paths}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@pytest.mark.parametrize("engine", ["native", "triton"])
def test_a_site_packages_that_is_read_only(built: Built, tmp_path: Path, engine: str) -> None:
    """As is the home folder, where Triton keeps what it compiles."""
    if engine == "triton":
        pytest.importorskip("triton")
    target = tmp_path / "site"
    shutil.copytree(built.site / "rvsm_kernels", target / "rvsm_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    home = tmp_path / "home"
    home.mkdir()
    code = f"""
import pathlib, sys
for name in sys.argv[1:3]:
    try:
        (pathlib.Path(name) / "probe").touch()
        raise SystemExit(name + " can be written")
    except PermissionError:
        pass
{STEP.format(engine=engine)}"""
    env = environment(PYTHONPATH=str(target), HOME=str(home), TRITON_INTERPRET="1" if engine == "triton" else "0")
    with read_only(target), read_only(home):
        succeeds([built.python, "-c", code, target, home], tmp_path, env, preexec_fn=without_rights)
    assert not list(target.rglob("*.pyc")) and list(home.iterdir()) == []


def test_editable(built: Built, tmp_path: Path) -> None:
    """The module lies in the sources, which are what is imported."""
    python = make_environment(tmp_path / "an environment")
    install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", built.source]
    succeeds(install, tmp_path, settings_of_build(built.folder))
    succeeds([python, "-c", STEP.format(engine="native"), built.source], tmp_path, environment())
    version = built.source / "rvsm_kernels" / "version.py"
    version.write_text(version.read_text(encoding="utf-8") + "\n__version__ = 'edited'\n", encoding="utf-8")
    assert "rvsm_kernels  edited" in succeeds([python, "-m", "rvsm_kernels"], tmp_path, environment())
