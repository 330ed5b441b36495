"""A name of the interface that a later version fills."""

from __future__ import annotations

from typing import Any


class RVSMWrapper:
    """Reserved: the fused pull around any torch optimizer comes in a later version."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("RVSMWrapper is not in this version of rvsm_kernels")
