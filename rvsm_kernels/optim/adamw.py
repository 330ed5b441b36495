"""A name of the interface that a later version fills."""

from __future__ import annotations

from typing import Any


class RVSMAdamW:
    """Reserved: the splitting over AdamW's step comes in a later version."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("RVSMAdamW is not in this version of rvsm_kernels")
