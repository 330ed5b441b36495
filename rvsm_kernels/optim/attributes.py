"""Errors for arguments of a constructor, what a step takes, and attributes of an optimizer that are no plain values."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from ..method.options import shown, unknown_option


def names_its_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor whose errors for wrong arguments name the class and the option that was probably meant."""
    names = inspect.signature(init).parameters
    keywords = [name for name in names if name not in ("self", "params")]

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in keywords and key != "params":
                raise TypeError(unknown_option(key, keywords, type(self).__name__))
        params = (args[0] if args else kwargs.get("params")) if "params" in names else None
        if isinstance(params, (numbers.Real, str)):
            raise TypeError(f"{type(self).__name__} takes the parameters first, then lr; params is {shown(params)}")
        if isinstance(params, torch.nn.Module):
            raise TypeError(
                f"{type(self).__name__} takes parameters, not a module: rvsm_kernels.param_groups(model, ...) or"
                " model.parameters()"
            )
        init(self, *args, **kwargs)

    return wrapper


class OptionOfGroups:
    """An option as an attribute of the optimizer: reading or setting it raises, for it belongs to the param groups."""

    def __init__(self, name: str) -> None:
        self._text = (
            f"{name} is an option of the param groups: for group in optimizer.param_groups: group[{name!r}] = ..."
        )

    def __get__(self, optimizer: Any, owner: type) -> Any:
        if optimizer is None:
            return self
        raise AttributeError(self._text)

    def __set__(self, optimizer: Any, value: Any) -> None:
        raise AttributeError(self._text)


class FromScaler:
    """An attribute that a GradScaler sets before a step and that is gone when the step ends, with or without an error.

    The scaler deletes it after the step too; deleting it twice must not be an error.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        if optimizer is None:
            return self
        try:
            return optimizer.__dict__[self._name]
        except KeyError:
            raise AttributeError(f"{self._name} is there only while a GradScaler steps the optimizer") from None

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer.__dict__[self._name] = value

    def __delete__(self, optimizer: Any) -> None:
        optimizer.__dict__.pop(self._name, None)


def ends_scaling(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that deletes grad_scale and found_inf when it ends, its hooks included."""

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return step(self, *args, **kwargs)
        finally:
            self.__dict__.pop("grad_scale", None)
            self.__dict__.pop("found_inf", None)

    wrapper.hooked = True  # type: ignore[attr-defined]  # torch.optim.Optimizer need not wrap it in hooks again
    return wrapper


def outside_graphs(step: Callable[..., Any]) -> Callable[..., Any]:
    """A step that torch.compile calls as it is, in one piece: one break of the graph.

    A kernel's launch is no graph. But a closure, which computes the loss, may be compiled; and the reference engine,
    which calls torch's operators alone, is traced.
    """
    in_one_piece = torch._disable_dynamo(step)

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        traced = torch.compiler.is_dynamo_compiling()
        # Most steps are called where nothing is compiled; what keeps torch.compile out would cost them a microsecond.
        if (traced or get_eval_frame_callback() is not None) and not kwargs and (not args or args == (None,)):
            return self._traced_step() if traced and self._can_be_traced() else in_one_piece(self)
        return step(self, *args, **kwargs)

    wrapper.hooked = True  # type: ignore[attr-defined]  # see ends_scaling
    return wrapper


@torch._disable_dynamo
@functools.cache
def takes_closure(kind: type[torch.optim.Optimizer]) -> tuple[bool, bool]:
    """Whether a step of an optimizer takes a closure, and whether it cannot do without."""
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None, closure is not None and closure.default is inspect.Parameter.empty
