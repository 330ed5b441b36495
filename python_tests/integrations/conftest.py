"""When these tests are collected."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Not in the quick check: it deselects all of them, and the frameworks take ten seconds to import."""
    return True if config.option.markexpr == "not slow" else None
