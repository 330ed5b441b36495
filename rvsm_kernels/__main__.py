"""``python -m rvsm_kernels``: what a bug report needs."""

from __future__ import annotations

import platform

import torch

from . import __version__, engines
from .engines import native


def main() -> None:
    """Print versions, threads, and which engines this build has and why another is missing."""
    print(f"rvsm_kernels  {__version__}")
    print(f"torch         {torch.__version__}")
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"threads       {torch.get_num_threads()}")
    if native.load_error is None:
        for key, value in native._C.build_info().items():
            print(f"{key:<13} {value}")
    if native.other_torch is not None:
        print(f"warning       the compiled module {native.other_torch}")
    print("engines")
    for name, devices in engines().items():
        for device, state in devices.items():
            print(f"  {name:<10} {device:<5} {state}")


if __name__ == "__main__":
    main()
