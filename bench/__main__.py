"""``python -m bench``."""

import sys

try:
    from .cli import main
except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if package not in ("torch", "tqdm", "numpy", "rvsm_kernels"):
        raise  # a mistake in the harness, not a package that the user can install
    sys.exit(
        f"python -m bench: {package} is not installed for {sys.executable}."
        " Run `make bench` in a clone of the project: it installs what is needed, builds and measures."
    )

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # each table is seen when it is printed, through a pipe too
    sys.exit(main())
