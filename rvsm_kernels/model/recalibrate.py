"""Running statistics of batch norms, for the weights that a model holds now."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

NORMS = nn.modules.batchnorm._NormBase
"""Batch norms (``SyncBatchNorm`` too), and instance norms, which have running statistics if they are asked for."""


def recalibrate(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> int:
    """Estimate the running statistics of batch norms anew, as the mean over batches.

    The statistics that training leaves belong to the weights w of the last steps, not to u::

        optimizer.sparsify_()
        rk.recalibrate(model, loader, batches=50)

    ``optimizer.sparse_weights(model, recalibrate=loader)`` does it for a while. While the batches pass, all norms that
    keep running statistics are in training mode and all other modules in evaluation mode (no dropout), without
    gradients and without ``torch.compile``; afterwards each module has the mode and the momentum that it had. A norm
    that no batch reaches keeps its statistics, and so does one with ``track_running_stats=False``, which has none.

    Args:
        model: any module, also inside a wrapper (DDP, ``torch.compile``). Across ranks ``SyncBatchNorm`` needs as many
            batches on each; other norms get the statistics of what their rank has seen.
        loader: batches as a ``DataLoader`` gives them. Of a tuple or list the first item is the input; a mapping is
            passed on as keywords, ``model(**batch)``; anything else is the input itself. Tensors are moved to the
            device of the model's parameters. Each batch counts alike, whatever its size.
        batches: at most so many; None takes all.

    Returns:
        The number of batches that were read: 0 where the model has no such norm, and then nothing is read.

    Raises:
        TypeError: something else than a module.
        ValueError: no batch, ``batches`` below 1, a lazy norm that has not seen data yet, statistics that are not
            finite. The statistics are what they were then, as after any other error.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"recalibrate takes a module, but got a {type(model).__name__}")
    check_batches(batches)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, NORMS) and m.track_running_stats}
    for name, norm in norms.items():
        if any(is_lazy(t) for t in (*norm.parameters(recurse=False), *norm.buffers(recurse=False))):
            raise ValueError(f"{name} is a lazy norm that has not seen data: call the model once before recalibrate()")
    norms = {name: norm for name, norm in norms.items() if norm.running_mean is not None}
    if not norms:
        return 0
    before = {norm: [b.detach().clone() for b in norm.buffers(recurse=False)] for norm in norms.values()}
    done = False
    try:
        # A graph that was compiled before would not call the hooks.
        with _averaging(model, norms.values()) as calls, torch.compiler.set_stance("force_eager"):
            seen = _pass(model, itertools.islice(loader, batches))
        if seen == 0:
            raise ValueError("recalibrate() got no batch: the loader is empty, or an iterator that was used up before")
        for name, norm in norms.items():
            if calls[norm] > 0 and not all(bool(b.isfinite().all()) for b in norm.buffers(recurse=False)):
                raise ValueError(f"the statistics of {name} would not be finite: a batch has NaN or infinity there")
        done = True
    finally:
        with torch.no_grad():
            for norm, values in before.items():
                if not done or calls[norm] == 0:
                    for buffer, value in zip(norm.buffers(recurse=False), values, strict=True):
                        buffer.copy_(value)
    return seen


def check_batches(batches: int | None) -> None:
    """Raise ValueError unless this is a number of batches, or None."""
    if batches is not None and (isinstance(batches, bool) or not isinstance(batches, int) or batches < 1):
        raise ValueError(f"batches must be a whole number of 1 or more, or None, not {batches!r}")


def check_recalibration(model: nn.Module | None, loader: Iterable[Any] | None, batches: int | None) -> None:
    """Raise ValueError unless ``sparse_weights()`` can recalibrate what it is asked to."""
    if loader is None and batches is not None:
        raise ValueError("batches is a number of batches of recalibrate=loader: give that too")
    if loader is not None and model is None:
        raise ValueError("recalibrate needs the model: sparse_weights(model, recalibrate=loader)")
    check_batches(batches)


@contextlib.contextmanager
def _averaging(model: nn.Module, norms: Iterable[Any]) -> Iterator[dict[Any, int]]:
    """Norms average over their calls, from nothing on; yields how often each was called."""
    # The attribute, not train(): modules may override the method, to keep a part frozen or to merge weights.
    modes = [(m, m.training) for m in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    calls = {norm: 0 for norm, _ in momenta}

    def count(norm: Any, _: Any) -> None:
        calls[norm] += 1
        norm.momentum = 1.0 / calls[norm]  # momentum=None would do it too, but not in an instance norm

    with contextlib.ExitStack() as stack:
        stack.callback(_restore, modes, momenta)
        for m, _ in modes:
            m.training = m in calls
        for norm in calls:
            norm.reset_running_stats()
            stack.enter_context(norm.register_forward_pre_hook(count))
        yield calls


def _restore(modes: list[tuple[nn.Module, bool]], momenta: list[tuple[Any, float | None]]) -> None:
    for m, training in modes:
        m.training = training
    for norm, momentum in momenta:
        norm.momentum = momentum


def _pass(model: nn.Module, loader: Iterable[Any]) -> int:
    """Call the model with every batch; returns their number."""
    device = next((p.device for p in model.parameters()), None)
    seen = 0
    # What makes a batch may need gradients (an adversarial attack): they are off for the model alone.
    for batch in loader:
        with torch.no_grad():
            _call(model, batch, device)
        seen += 1
    return seen


def _call(model: nn.Module, batch: Any, device: torch.device | None) -> None:
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ValueError("a batch is empty: its first item would be the input")
        batch = batch[0]
    if isinstance(batch, Mapping):
        model(**{key: _moved(value, device) for key, value in batch.items()})
    else:
        model(_moved(batch, device))


def _moved(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if isinstance(value, Tensor) and device is not None else value
