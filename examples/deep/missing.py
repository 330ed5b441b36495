"""What a script says in the place of a traceback when a package that it imports is not there."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
"""The root of the source tree."""

OF_PIP = ("matplotlib", "numpy", "torch", "tqdm")
"""Packages that the scripts import when they start. Other packages are asked for where they are used."""
OF_THE_TREE = ("bench", "rvsm_kernels")

EXTRAS = "matplotlib scikit-learn tensorboard torch-pruning tqdm"
"""What the examples need beside rvsm_kernels and what it brings."""

if str(ROOT) not in sys.path:
    # Scripts find bench from any folder. An installed rvsm_kernels goes before that of the tree, which comes last.
    sys.path.append(str(ROOT))


def explain(error: ModuleNotFoundError, module: str) -> None:
    """End a script with one sentence that says what to install; return where that would not help.

    Args:
        error: what an import of the script raised.
        module: the ``__name__`` of the script. A script that another script imports leaves the sentence to that one.
    """
    name = (error.name or "").partition(".")[0]
    if module != "__main__" or name not in OF_PIP + OF_THE_TREE:
        return
    if name in OF_PIP:
        packages = EXTRAS if name in EXTRAS.split() else name
        remedy = f"`pip install {packages}` installs it; or run `make build` in {ROOT} and use the Python in its .venv"
    else:
        remedy = f"{ROOT} has no folder {name}: run this script where it lies in the whole source tree of rvsm_kernels"
    print(f"{Path(sys.argv[0]).name}: the package {name} is missing: {remedy}", file=sys.stderr)
    raise SystemExit(1)
