"""The benchmark harness: ``python -m bench --help``, or bench/README.md."""
