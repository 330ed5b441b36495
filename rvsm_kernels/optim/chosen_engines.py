"""The engines of one optimizer: which of them serves a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..dist.engine import ShardEngine
from ..dist.shards import is_sharded, shard_of
from ..engines.interface import Engine, Group
from ..engines.registry import check_requested, engine_name_for, make_engine
from ..method.memory import kind_of, tracer
from ..method.parameters import param_name


class Share(NamedTuple):
    """What one engine serves of the param groups of a step.

    Attributes:
        groups: copies of the param groups, each with those parameters alone that have a gradient and that the engine
            serves, and with the names of all of them.
        places: where these groups are in ``optimizer.param_groups``.
    """

    engine: Engine
    groups: list[Group]
    places: list[int]


class ChosenEngines:
    """Makes each engine once, where a parameter needs it first.

    Args:
        requested: the name of an engine, or None for the fastest that serves a device.

    Raises:
        ValueError: an unknown engine.
        RuntimeError: an engine that serves no device here.
    """

    def __init__(self, requested: str | None) -> None:
        check_requested(requested)
        self.requested = requested
        self._engines: dict[tuple[str, bool], Engine] = {}  # by name, and whether they serve shards

    def engine_of(self, p: Tensor, name: str) -> Engine:
        """The engine that serves a parameter.

        Raises:
            TypeError: a parameter without memory of its own, and a named engine that needs it.
            RuntimeError: a named engine in code that is being traced: the tracer would not see what the engine does.
        """
        return self._engine_for(self._key_for(p, name))

    def _engine_for(self, key: tuple[str, bool]) -> Engine:
        if key not in self._engines:
            engine, of_shards = key
            made = make_engine(engine)
            self._engines[key] = ShardEngine(made, lambda p: self._key_for(p, "") == key) if of_shards else made
        return self._engines[key]

    def _key_for(self, p: Tensor, name: str) -> tuple[str, bool]:
        if is_sharded(p) and tracer() is None:
            with torch.no_grad():
                shard = shard_of(p)
            if kind_of(shard) is None:
                return self._name_for(shard, name), True
        return self._name_for(p, name), False

    def _name_for(self, p: Tensor, name: str) -> str:
        if self.requested == "reference":
            return "reference"
        by = tracer()
        kind = kind_of(p)
        if by is None and kind is None:
            return engine_name_for(self.requested, p.device.type)
        if self.requested is None:
            return "reference"
        if kind is not None:
            raise TypeError(
                f"engine={self.requested!r} cannot serve {name}: it is {kind}. Leave engine=None for such tensors"
            )
        raise RuntimeError(
            f"{by} would not see what engine={self.requested!r} does. Leave engine=None for code that is traced"
        )

    def the_only(self) -> Engine | None:
        """The engine that served all parameters of the last step, if it knows whether it serves those of this step.

        The reference engine does not know: it serves every tensor, also those that belong to a faster engine.
        """
        if len(self._engines) != 1 or tracer() is not None:
            return None
        ((name, of_shards),) = self._engines
        return None if name == "reference" else self._engines[name, of_shards]

    def divide(self, groups: Sequence[Group]) -> list[Share]:
        """Param groups, divided by the engine that serves each parameter. Engines that serve none are forgotten."""
        shares: dict[tuple[str, bool], Share] = {}
        for i, group in enumerate(groups):
            for j, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                name = param_name(group, i, j)
                key = self._key_for(p, name)
                share = shares.setdefault(key, Share(self._engine_for(key), [], []))
                if not share.places or share.places[-1] != i:
                    share.groups.append({**group, "params": [], "param_names": []})
                    share.places.append(i)
                share.groups[-1]["params"].append(p)
                share.groups[-1]["param_names"].append(name)
        if shares:
            self._engines = {key: share.engine for key, share in shares.items()}
        return list(shares.values())
