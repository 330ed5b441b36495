"""``python -m bench accuracy``: why not plain magnitude pruning? Accuracy at equal zeros and equal epochs.

One-shot and gradual magnitude pruning, torchao's PAT, RVSM under each penalty, and the same over AdamW. Every way is
led to the same shares of zeros along the same cubic curve from a tenth to seven tenths of the steps, from the same
first weights and over the same batches of a seed, on two nets and data sets. Accuracy is that of the sparse weights on
the test images, with the statistics of batch norms made anew from the training images for all alike.

A run goes on where an earlier one into the same folder stopped: each training is written at once, and what is in the
file with the same settings is not trained again. ``--threads N`` trains N nets at a time, each with one thread, so that
no number depends on N. ``bench/accuracy_tables.py`` makes the tables.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

import rvsm_kernels as rk

from . import accuracy_tables, digits, fashion, pruners
from .config import Config, MissingPackage, require
from .digits import Images
from .pruners import Curve
from .results import Result, Row, commit, environment, read_json, write_json

BEGIN, END = 0.1, 0.7
"""The shares of the steps between which the zeros grow."""

ELEMENTS, CHANNELS = (0.8, 0.9, 0.95, 0.98, 0.99), (0.25, 0.5, 0.75)
SEEDS = 5
SEARCH_SEEDS = 2
"""Of the methods that only look for a default."""

BASES: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, rk.RVSM, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    "adamw": (torch.optim.AdamW, rk.RVSMAdamW, {"lr": 2e-3, "weight_decay": 1e-2}),
}
"""Dense optimizer, ours, and what both are told."""
OURS = (rk.RVSM, rk.RVSMAdamW)


@dataclass(frozen=True)
class Problem:
    """A net and data to train it with."""

    title: str
    net: Callable[[], nn.Module]
    data: Callable[[], tuple[Images, Images]]
    epochs: int
    batch: int


PROBLEMS = {
    "fashion": Problem("Fashion-MNIST, four linear layers", fashion.Net, fashion.train_and_test, 12, 128),
    "digits": Problem("Handwritten digits, four convolutions", digits.Net, digits.train_and_test, 30, digits.BATCH),
}


@dataclass(frozen=True)
class Method:
    """A way to a share of zeros.

    Attributes:
        kind: ``"dense"``, with one-shot pruning of it; ``"gradual"``, ``"pat"``, ``"pat-lasso"``, ``"rvsm"``.
        options: of a param group of RVSM.
        schedule: of ``rk.SparsitySchedule``; its ``scope`` also of gradual pruning.
        of: what it is trained for: ``"elements"``, ``"channels"``.
        search: a setting that is tried beside the defaults, with fewer seeds, on elements of Fashion-MNIST.
    """

    name: str
    label: str
    kind: str
    base: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    of: tuple[str, ...] = ("elements", "channels")
    search: bool = False

    @property
    def setting(self) -> dict[str, Any]:
        """What decides about its numbers; a row with another setting is trained anew."""
        return {"kind": self.kind, "base": self.base, "options": self.options, "schedule": self.schedule}


def _methods() -> list[Method]:
    l0 = {"penalty": "l0", "beta": 1.0}
    l1, tl1 = {"penalty": "l1", "beta": 6.0}, {"penalty": "tl1", "beta": 6.0, "a": 1.0}
    topk = {"penalty": "topk", "beta": 1.0, "density": 1.0}
    elements = ("elements",)
    found = [Method("dense", "dense SGD", "dense"), Method("gradual", "gradual magnitude pruning", "gradual")]
    each = "gradual magnitude pruning, of each layer"
    found.append(Method("gradual-each", each, "gradual", schedule={"scope": "tensor"}, of=elements))
    rates: dict[str, Any] = {"0.2": 0.2, "0.1": 0.1, "0.5": 0.5, "0.05 to 0.5": [0.05, 0.5]}
    for (name, rate), hold in product(rates.items(), (False, True)):
        schedule = {"pull_rate": rate} | ({"hold": True} if hold else {})
        label, default = f"RVSM l0, pull_rate {name}{', hold' if hold else ''}", name == "0.2"
        found.append(
            Method(
                f"l0{'' if default else '-' + name}{'-hold' if hold else ''}",
                label,
                "rvsm",
                options=l0,
                schedule=schedule,
                search=not default,
            )
        )
    return [
        *found,
        Method("pat", "PAT (torchao), least sparsity", "pat"),
        Method("pat-lasso", "PAT (torchao), lasso, its λ led", "pat-lasso", of=elements),
        Method("l1", "RVSM l1, beta 6", "rvsm", options=l1),
        Method("l1-hold", "RVSM l1, beta 6, hold", "rvsm", options=l1, schedule={"hold": True}),
        Method("tl1", "RVSM tl1, beta 6", "rvsm", options=tl1, of=elements),
        Method(
            "topk",
            "RVSM top-k (of each tensor), pull_rate 0.2",
            "rvsm",
            options=topk,
            schedule={"pull_rate": 0.2, "scope": "tensor"},
            of=elements,
        ),
        Method("dense-adamw", "dense AdamW", "dense", "adamw"),
        Method("gradual-adamw", "AdamW, gradual magnitude pruning", "gradual", "adamw", of=elements),
        Method("l0-adamw", "RVSMAdamW l0, pull_rate 0.2", "rvsm", "adamw", l0, {"pull_rate": 0.2}, elements),
        Method(
            "l0-adamw-hold",
            "RVSMAdamW l0, pull_rate 0.2, hold",
            "rvsm",
            "adamw",
            l0,
            {"pull_rate": 0.2, "hold": True},
            elements,
        ),
    ]


METHODS = {method.name: method for method in _methods()}


@dataclass(frozen=True)
class Job:
    """One training."""

    problem: str
    of: str
    method: str
    share: float
    seed: int
    smoke: bool = False

    @property
    def dense(self) -> bool:
        return METHODS[self.method].kind == "dense"

    def __str__(self) -> str:
        what = "" if self.dense else f" {self.share:.0%} of {self.of}"
        return f"{self.problem} {METHODS[self.method].label}{what}, seed {self.seed}"


# ---- a training ------------------------------------------------------------------------------------------------------


@cache
def _data(problem: str, smoke: bool) -> tuple[Images, Images]:
    train, test = PROBLEMS[problem].data()
    return (Images(train.x[:500], train.y[:500]), Images(test.x[:200], test.y[:200])) if smoke else (train, test)


def _weights(model: nn.Module, of: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The weights that are pruned, and all other parameters.

    Channels are those between two layers: the pixels, which the first layer reads, stay.
    """
    weights = [p for p in model.parameters() if p.dim() >= 2][0 if of == "elements" else 1 :]
    ids = {id(p) for p in weights}
    return weights, [p for p in model.parameters() if id(p) not in ids]


def _start(job: Job, model: nn.Module, curve: Curve) -> tuple[torch.optim.Optimizer, Any]:
    """The optimizer, and what is stepped after it, or None."""
    method, groups = METHODS[job.method], job.of == "channels"
    dense, ours, options = BASES[method.base]
    weights, rest = _weights(model, job.of)
    if method.kind == "rvsm":
        penalised = {"params": weights, **method.options, "group_dim": 1 if groups else None}
        scope = "tensor" if groups else method.schedule.get("scope", "global")
        params = [{**penalised, "params": [w]} for w in weights] if scope == "tensor" else [penalised]
        optimizer = ours([*params, {"params": rest, "penalty": None}], **options)
        rate = method.schedule.get("pull_rate")
        schedule = {**method.schedule, "scope": scope, "pull_rate": tuple(rate) if isinstance(rate, list) else rate}
        of = "groups" if groups else "elements"
        return optimizer, rk.SparsitySchedule(
            optimizer, curve.share, begin=curve.begin, end=curve.end, every=pruners.EVERY, of=of, **schedule
        )
    if method.kind in ("pat", "pat-lasso"):
        lasso = method.kind == "pat-lasso"
        optimizer = pruners.pat(dense, weights, rest, options, curve, groups, lasso)
        return optimizer, pruners.LedLasso(optimizer, curve) if lasso else None
    optimizer = dense(model.parameters(), **options)
    each = method.schedule.get("scope") == "tensor"
    return optimizer, pruners.Gradual(weights, curve, groups, each) if method.kind == "gradual" else None


def _measure(job: Job, model: nn.Module, images: Images, held_out: Images) -> Row:
    """The zeros of a net, and its accuracy before and after the statistics of batch norms are made anew."""
    weights = _weights(model, job.of)[0]
    zeros = [w == 0 if job.of == "elements" else ~w.transpose(0, 1).flatten(1).any(1) for w in weights]
    row = {
        "problem": job.problem,
        "of": job.of,
        "method": job.method,
        "share": job.share,
        "seed": job.seed,
        "got": sum(int(z.sum()) for z in zeros) / sum(z.numel() for z in zeros),
        "dead": sum(not w.any() for w in weights),
        "accuracy_as_is": digits.accuracy(model, held_out),
    }
    digits.make_statistics(model, images, PROBLEMS[job.problem].batch)
    return {**row, "accuracy": digits.accuracy(model, held_out)}


def train(job: Job) -> list[Row]:
    """The rows of a training: one, or those of a dense net and of what one-shot pruning makes of it."""
    problem, method = PROBLEMS[job.problem], METHODS[job.method]
    images, held_out = _data(job.problem, job.smoke)
    epochs = 1 if job.smoke else problem.epochs
    steps = epochs * -(-len(images) // problem.batch)
    end = max(2, round(END * steps))
    curve = Curve(job.share, min(round(BEGIN * steps), end - 1), end)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        model = problem.net()
    optimizer, lead = _start(job, model, curve)
    order, loss_of, done = torch.Generator().manual_seed(job.seed), nn.CrossEntropyLoss(), 0
    begun, lr = time.perf_counter(), BASES[method.base][2]["lr"]
    for _ in range(epochs):
        for x, y in images.batches(problem.batch, order):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * done / steps)) / 2
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
            done += 1
            if lead is not None:
                lead.step()
    seconds = time.perf_counter() - begun
    with optimizer.sparse_weights(model) if isinstance(optimizer, OURS) else contextlib.nullcontext():
        rows = [{**_measure(job, model, images, held_out), "train_s": seconds}]
        if job.dense:
            with torch.no_grad():
                rows += _one_shot(job, model, images, held_out)
    return [{**row, "steps": steps} for row in rows]


def _one_shot(job: Job, model: nn.Module, images: Images, held_out: Images) -> Iterator[Row]:
    """The rows of one-shot pruning of a dense net, for every share."""
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    for of, shares in (("elements", ELEMENTS), ("channels", CHANNELS)):
        for share in shares:
            model.load_state_dict(dense)
            pruners.prune_(_weights(model, of)[0], share, of == "channels")
            row = _measure(Job(job.problem, of, job.method, share, job.seed), model, images, held_out)
            yield {**row, "method": accuracy_tables.one_shot(job.method)}


# ---- all of them -----------------------------------------------------------------------------------------------------


def jobs(effort: str) -> list[Job]:
    """The trainings of an effort, the most telling first.

    "full": everything. "quick": one seed, on Fashion-MNIST, two shares of elements and one of channels. "smoke": every
    kind of training once, for moments.
    """
    smoke, quick = effort == "smoke", effort == "quick"
    seeds = SEEDS if effort == "full" else 1
    found = []
    for problem, seed, method in product(PROBLEMS, range(seeds), METHODS.values()):
        if (quick and problem != "fashion") or (effort != "full" and method.search):
            continue
        if method.search and (seed >= SEARCH_SEEDS or problem != "fashion"):
            continue
        shares = {"elements": ELEMENTS, "channels": CHANNELS}
        if effort != "full":
            shares = {"elements": (0.9, 0.98) if quick else (0.9,), "channels": (0.5,)}
        if method.kind == "dense":
            found.append(Job(problem, "elements", method.name, 0.0, seed, smoke))
            continue
        for of in ("elements",) if method.search else method.of:
            if method.kind == "pat" and (of, problem) == ("channels", "digits"):
                continue  # PAT has no input channels of a convolution
            found += [Job(problem, of, method.name, share, seed, smoke) for share in shares[of]]
    return sorted(found, key=_turn)


def _turn(job: Job) -> tuple[Any, ...]:
    """Where a training comes: two seeds of SGD on elements of Fashion-MNIST before everything else."""
    method = METHODS[job.method]
    side = job.problem != "fashion", job.of != "elements", method.base != "sgd"
    late = job.seed >= SEARCH_SEEDS
    asked = method.kind in ("dense", "gradual") or method.options.get("penalty") == "l0"
    last = job.share == min(ELEMENTS)
    return sum(side) + late, side, last or not asked, job.seed, last, method.search, job.share


def _key(row: Row) -> tuple[Any, ...]:
    return row["problem"], row["of"], row["method"], row["share"], row["seed"]


def _head(smoke: bool) -> dict[str, Any]:
    """What the file says of all trainings. A file that says otherwise of a problem is not gone on with."""
    return {
        "smoke": smoke,
        "seeds": SEEDS,
        "search_seeds": SEARCH_SEEDS,
        "problems": {
            name: {"title": p.title, "epochs": 1 if smoke else p.epochs, "batch": p.batch}
            for name, p in PROBLEMS.items()
        },
        "bases": {name: options for name, (_, _, options) in BASES.items()},
    }


def _kept(old: Result | None, head: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run that belong to this one: of methods that are still set as they were."""
    if old is None or any(old.get(key) != head[key] for key in ("smoke", "problems", "bases")):
        return []
    same = {m["name"] for m in old["methods"] if m["name"] in METHODS and m["setting"] == METHODS[m["name"]].setting}
    return [row for row in old["rows"] if accuracy_tables.trained(row["method"]) in same]


def _worker() -> None:
    torch.set_num_threads(1)


def _trained(todo: list[Job], processes: int) -> Iterable[list[Row]]:
    """The rows of every training, in order."""
    if processes == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield from map(train, todo)
        finally:
            torch.set_num_threads(threads)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _worker) as pool:
        yield from pool.map(train, todo)


def run(config: Config) -> None:
    """Train what the effort asks for and the file does not have yet, write accuracy.json and print its tables.

    Raises:
        MissingPackage: a data set cannot be had.
    """
    require("numpy", "sklearn")
    fashion.check()
    from tqdm import tqdm

    effort = config.effort.name
    todo = _possible(jobs(effort))
    path, head = config.out / "accuracy.json", _head(effort == "smoke")
    kept = _kept(read_json(path), head)
    have = {_key(row) for row in kept}
    left = [job for job in todo if (job.problem, job.of, job.method, job.share, job.seed) not in have]
    result: Result = {
        **environment("cpu", config.command),
        "complete": False,
        **head,
        "methods": [{"name": m.name, "label": m.label, "setting": m.setting} for m in METHODS.values()],
        "rows": kept,
    }
    if kept:
        print(f"accuracy: {len(todo) - len(left)} of {len(todo)} trainings are in the file already")
    where = commit()
    with tqdm(total=len(left), desc="accuracy", unit="run", disable=None) as bar:
        for job, rows in zip(left, _trained(left, torch.get_num_threads()), strict=True):
            result["rows"] += [{**row, "commit": where} for row in rows]
            write_json(path, result)
            first = rows[0]
            tqdm.write(
                f"{job!s:<70} got {first['got']:.2%}  accuracy {first['accuracy']:.2%}  {first['train_s']:.1f} s"
            )
            bar.update()
    result["complete"] = True
    write_json(path, result)
    print(f"\n{accuracy_tables.table(result)}\n")


def _possible(todo: list[Job]) -> list[Job]:
    """All trainings that can be made here; torchao is not needed by anything else."""
    try:
        require("torchao")
    except MissingPackage as error:
        print(f"accuracy: PAT is not trained, because {error}")
        return [job for job in todo if not METHODS[job.method].kind.startswith("pat")]
    return todo
