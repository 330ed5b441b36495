"""Coupled channels: the groups are what a perturbed channel reaches, and each weight takes part along its inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import SMALL, TRANSFORMERS, Architecture, Attention, close, images, outputs, randomise
from torch import Tensor, nn
from torch.nn import functional as F

import rvsm_kernels as rk
from rvsm_kernels.model.coupled import CoupledChannels, as_arguments, coupled_channels

LAYERS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def found(model: nn.Module, inputs: object) -> CoupledChannels:
    """The groups, of a model that is as it was afterwards."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = coupled_channels(model, inputs)
    assert model.training
    for name, v in model.state_dict().items():
        assert torch.equal(v, before[name]), name
    return result


def slices_of(result: CoupledChannels) -> set[frozenset[tuple[str, int]]]:
    """Each group as a set of (weight, index of its inputs)."""
    return {frozenset((name, i) for name, _, indices in g for i in indices) for g in result.groups.values()}


def by_force(model: nn.Module, inputs: Tensor) -> set[frozenset[tuple[str, int]]]:
    """What one perturbed channel reaches while the outputs of all readers stand still, tied where sets meet."""
    model = model.eval()
    readers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, LAYERS) and not (getattr(m, "groups", 1) == getattr(m, "in_channels", 0) > 1)
    }
    still: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    shift: list[tuple[str, int]] = []

    def hook(name: str) -> Callable[..., Tensor]:
        def run(_m: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen[name] = args[0].clone()
            out = still.setdefault(name, out.clone()).clone()
            for where, channel in shift:
                if where == name:
                    d = 1 if out.dim() == 4 else out.dim() - 1
                    part = out.select(d, channel)  # past every ReLU, whichever side it cuts
                    part.add_((200 * torch.arange(len(part)) - 300).view(-1, *[1] * (part.dim() - 1)))
            return out

        return run

    handles = [m.register_forward_hook(hook(n)) for n, m in readers.items()]
    sets: list[set[tuple[str, int]]] = []
    with torch.no_grad():
        whole = model(inputs)
        base = dict(seen)
        for name, m in readers.items():
            for channel in range(still[name].shape[1 if still[name].dim() == 4 else -1]):
                shift[:] = [(name, channel)]
                reached = set()
                if not torch.equal(model(inputs), whole) and m is not list(readers.values())[-1]:
                    reached.add(("output", 0))
                for reader, before in base.items():
                    d = 1 if before.dim() == 4 else before.dim() - 1
                    others = [k for k in range(before.dim()) if k != d]
                    changed = (seen[reader] != before).any(dim=others[0]) if len(others) == 1 else (
                        (seen[reader] != before).transpose(0, d).flatten(1).any(1)
                    )  # fmt: skip
                    groups = getattr(readers[reader], "groups", 1)
                    width = before.shape[d] // groups
                    transposed = isinstance(readers[reader], nn.ConvTranspose2d)
                    for i in changed.nonzero().flatten().tolist():
                        for j in [i] if groups == 1 else range(i % width, before.shape[d], width):
                            reached.add((f"{reader}.weight", j if transposed else j % width))
                if reached:
                    groups = getattr(m, "groups", 1)
                    if groups > 1:  # every group of the convolution gives up the same channel
                        reached.add((f"out of {name}", channel % (m.out_channels // groups)))
                    sets.append(reached)
    for h in handles:
        h.remove()
    model.train()
    merged: list[set[tuple[str, int]]] = []
    for s in sets:
        meet = [m for m in merged if m & s]
        merged = [m for m in merged if not m & s] + [set().union(s, *meet)]
    return {
        frozenset(k for k in s if not k[0].startswith("out of")) for s in merged if not any(k[0] == "output" for k in s)
    }


FORCED = [a for a in SMALL if a.name not in ("convnext", "shuffle", "transformer")]


@pytest.mark.parametrize("arch", FORCED, ids=[a.name for a in FORCED])
def test_groups_are_what_a_perturbed_channel_reaches(arch: Architecture) -> None:
    torch.manual_seed(1)
    model, x = randomise(arch.build()), arch.inputs()
    assert slices_of(found(model, x)) == by_force(model, x)


class Heads(nn.Module):
    """An attention on what a linear layer makes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)
        return self.head(F.layer_norm(x + y, (12,)))


@pytest.mark.parametrize(
    ("inner", "weight", "heads", "size"),
    [
        (lambda: Attention(12, 6, 3, 4), "inner.out.weight", 3, 8),
        (lambda: Attention(12, 4, 4, 6, norm=False), "inner.out.weight", 4, 6),
        (lambda: nn.MultiheadAttention(12, 3, batch_first=True), "inner.out_proj.weight", 3, 4),
        (lambda: nn.MultiheadAttention(12, 4, bias=False), "inner.out_proj.weight", 4, 3),
    ],
    ids=["grouped-queries", "own-keys", "torch", "torch-seq-first"],
)
def test_heads_are_blocks_of_the_output_projection(
    inner: Callable[[], nn.Module], weight: str, heads: int, size: int
) -> None:
    result = found(Heads(inner()), torch.randn(2, 5, 12))
    assert result.readers[weight].labels == tuple(
        label for label in result.readers[weight].labels[::size] for _ in range(size)
    )
    assert slices_of(result) == {frozenset((weight, h * size + i) for i in range(size)) for h in range(heads)}


def test_who_is_nobodys() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.group = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)
            self.mid, self.out = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
            self.free = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.mid(self.group(self.stem(x)))
            return self.free(self.out(y).mean((2, 3))[:, [0, 1, 2, 3, 0, 1]]), y

    readers = found(Net(), images()).readers
    assert not any(any(r.labels) for r in readers.values())
    assert set(readers["stem.weight"].kept.values()) == {"a constant or an input of the model"}
    assert set(readers["mid.weight"].kept.values()) == {"a GroupNorm mixes the channels of a group"}
    assert set(readers["out.weight"].kept.values()) == {"an output of the model"}
    assert set(readers["free.weight"].kept.values()) == {"its index is a number in the model's code"}


class Cumulated(nn.Module):
    """An operation without a rule between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(torch.fft.fft(self.a(x)).real)))


def _parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Linear(5, 2))
    nn.utils.parametrizations.weight_norm(model[2])
    return model


@pytest.mark.parametrize(
    ("build", "inputs", "free", "module"),
    [
        (Cumulated, (3, 4), {"c.weight"}, "Cumulated"),
        (_parametrized, (3, 4), {"5.weight"}, "2.parametrizations.weight.0 (_WeightNorm)"),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.Bilinear(6, 6, 3)), None, set(), "1 (Bilinear)"),
    ],
    ids=["fft", "parametrized", "bilinear"],
)
def test_what_is_not_followed_is_named_and_nobodys(
    build: Callable[[], nn.Module], inputs: tuple[int, ...] | None, free: set[str], module: str
) -> None:
    model = build()
    if inputs is None:
        model[1].forward = lambda x: F.bilinear(x, x, model[1].weight)  # type: ignore[method-assign]
        inputs = (3, 4)
    result = coupled_channels(model, torch.randn(inputs))
    assert {n for n, r in result.readers.items() if any(r.labels)} == free
    assert module in {name for name, _ in result.untraced}


def test_a_layer_used_twice_and_tied_weights() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)
            self.code = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(torch.tanh(self.code(x)), self.code.weight.t())  # the weight reads along both dimensions
            return self.last(self.twice(torch.relu(self.twice(self.first(x + y)))))

    result = found(Net(), torch.randn(3, 4))
    assert result.readers["twice.weight"].labels == result.readers["last.weight"].labels == (1, 2, 3, 4, 5, 6)
    assert not any(result.readers["code.weight"].labels) and not any(result.readers["first.weight"].labels)


@pytest.mark.parametrize(
    "inputs", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}], ids=["one", "tuple", "list", "dict"]
)
def test_ways_to_give_inputs(inputs: Callable[[Tensor], object]) -> None:
    assert as_arguments(inputs(torch.zeros(1)))[0] or as_arguments(inputs(torch.zeros(1)))[1]
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].forward, was = lambda input: F.linear(input, model[0].weight), model[0].forward
    model[0].forward = was
    if not isinstance(inputs(torch.zeros(1)), dict):
        assert len(coupled_channels(model, inputs(torch.randn(2, 3))).groups) == 4


def test_a_model_that_does_not_run_says_so() -> None:
    with pytest.raises(RuntimeError, match="does not run on example_inputs"):
        coupled_channels(nn.Linear(3, 4), torch.randn(2, 5))


@pytest.mark.parametrize(
    ("module", "weight", "groups"),
    [
        (nn.LSTM(6, 5, batch_first=True), "1.weight_ih_l0", 0),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)), "1.1.weight", 0),
        (nn.Sequential(nn.ReLU(), nn.Linear(6, 4)), "1.1.weight", 6),
    ],
    ids=["lstm", "layer-norm", "relu"],
)
def test_readers_behind_a_layer(module: nn.Module, weight: str, groups: int) -> None:
    model = nn.Sequential(nn.Linear(3, 6), module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = coupled_channels(model, torch.randn(2, 4, 3)).readers.get(weight)
    assert len({*(labels.labels if labels else ()), 0}) - 1 == groups


@pytest.mark.slow
@pytest.mark.parametrize("arch", TRANSFORMERS, ids=[a.name for a in TRANSFORMERS])
def test_architectures_of_transformers_have_groups(arch: Architecture) -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    result = coupled_channels(arch.build(), arch.inputs())
    assert not result.untraced
    members = [k for g in slices_of(result) for k in g]
    assert len(members) == len(set(members)) > 0


# ---- param_groups ----------------------------------------------------------------------------------------------------

OPTIONS = {"penalty": "l0", "lam": 1e-3, "beta": 0.5}


def coupled_norms(groups: list[dict[str, Any]]) -> dict[tuple[str, int], Tensor]:
    """The squared norm of each coupled group of some param groups."""
    norms: dict[tuple[str, int], Tensor] = {}
    for group in groups:
        for _, p in group["params"] if group.get("coupling") else ():
            others = [d for d in range(p.dim()) if d != group["group_dim"]]
            for i, s in zip(group["coupling"], p.detach().square().sum(others), strict=True):
                key = group["coupling_name"], i
                norms[key] = norms.get(key, torch.zeros(())) + s
    return norms


@pytest.mark.parametrize("arch", SMALL, ids=[a.name for a in SMALL])
def test_param_groups_by_coupling(arch: Architecture) -> None:
    torch.manual_seed(2)
    model, x = arch.build(), arch.inputs()
    found, names = slices_of(coupled_channels(model, x)), dict(model.named_parameters())
    groups = rk.param_groups(model, structure="coupled", example_inputs=x, **OPTIONS)
    assert {n for g in groups for n, _ in g["params"]} == set(names)
    sets: dict[int, set[tuple[str, int]]] = {}
    for g in groups[:-1]:
        assert type(g["coupling"]) is tuple and all(type(k) is int for k in g["coupling"])
        assert g["coupling_name"] == "coupled" and g["penalty"] == "l0" and g["group_dim"] in (0, 1)
        for name, p in g["params"]:
            assert len(g["coupling"]) == p.shape[g["group_dim"]]
            assert g["group_dim"] == int(name not in ("up.weight", "grouped.weight") or arch.name != "unet")
            for i, k in enumerate(g["coupling"]):
                sets.setdefault(k, set()).add((name, i))
    assert {frozenset(s) for k, s in sets.items() if k > 0} == found
    assert len({(g["group_dim"], g["coupling"]) for g in groups[:-1]}) == len(groups) - 1
    assert groups[-1]["penalty"] is None and groups[-1]["group_dim"] is None and groups[-1].get("coupling") is None
    # The weakest half of the groups, as a penalty would choose them, can go.
    norms = coupled_norms(groups)
    weak = set(sorted((k for k in norms if k[1] > 0), key=lambda k: norms[k])[: len(norms) // 2])
    with torch.no_grad():
        for g in groups[:-1]:
            index = torch.tensor([i for i, k in enumerate(g["coupling"]) if ("coupled", k) in weak], dtype=torch.long)
            for _, p in g["params"]:
                p.index_fill_(g["group_dim"], index, 0.0)
    before = outputs(model, x)
    assert rk.shrink(model, example_inputs=x).groups > 0
    close(before, outputs(model, x))


def test_a_reader_that_stays_dense_leaves_its_channels_to_nobody() -> None:
    model, x = SMALL[1].build(), images()
    model.blocks[1].short.weight.requires_grad_(False)
    groups = rk.param_groups(model, structure="coupled", example_inputs=x, **OPTIONS)
    taken = {n for g in groups[:-1] for n, _ in g["params"]}
    assert "blocks.1.conv2.weight" in taken and "head.weight" in taken
    assert not taken & {"blocks.0.conv1.weight", "blocks.1.conv1.weight", "blocks.1.short.weight", "stem.0.weight"}
    text = rk.describe(model, structure="coupled", example_inputs=x)
    assert "no coupled group: blocks.1.short.weight reads them, and stays dense" in text
    assert "12 coupled groups" in text


def test_an_index_of_nobody_has_a_negative_integer_of_its_own() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.cat([x, self.a(x)], 1))

    groups = rk.param_groups(Skip(), structure="coupled", example_inputs=images(), **OPTIONS)
    assert groups[0]["coupling"] == (-1, -2, -3, 1, 2, 3, 4)
    assert [n for n, _ in groups[1]["params"]] == ["a.weight", "a.bias", "b.bias"]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"structure": "coupled"}, TypeError, "give example_inputs"),
        ({"structure": "heads", "example_inputs": 1}, TypeError, "go with structure='coupled'"),
        ({"example_inputs": 1}, TypeError, "go with structure='coupled'"),
        ({"structure": "coupled", "example_inputs": 1, "group_dim": 1}, ValueError, "sets group_dim"),
        ({"structure": "coupled", "example_inputs": torch.zeros(1, 1)}, RuntimeError, "does not run"),
        ({"structure": "couple"}, ValueError, "coupled"),
    ],
    ids=["no-inputs", "heads", "no-structure", "group-dim", "bad-inputs", "misspelt"],
)
def test_what_param_groups_refuses(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        rk.param_groups(SMALL[0].build(), **OPTIONS, **arguments)


def test_what_is_not_followed_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"not followed: aten._fft_r2c in Cumulated"):
        groups = rk.param_groups(Cumulated(), structure="coupled", example_inputs=torch.randn(3, 4), **OPTIONS)
    assert [n for n, _ in groups[0]["params"]] == ["c.weight"]


@pytest.mark.parametrize("kind", ["compiled", "lazy"])
def test_models_that_cannot_be_followed(kind: str) -> None:
    model = torch.compile(Cumulated()) if kind == "compiled" else nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    with pytest.raises(TypeError, match=kind):
        rk.param_groups(model, structure="coupled", example_inputs=torch.randn(3, 4), **OPTIONS)


PRUNED = [a for a in SMALL if a.name in ("chain", "resnet", "densenet", "vgg")]


@pytest.mark.parametrize("arch", PRUNED, ids=[a.name for a in PRUNED])
def test_torch_pruning_finds_the_same_groups(arch: Architecture) -> None:
    tp = pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model, x = arch.build(), arch.inputs()
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    names = {m: n for n, m in model.named_modules()}
    theirs = set()
    for module in names:
        if not isinstance(module, LAYERS):
            continue
        outputs_of_layer = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        cut = graph.get_pruner_of_module(module).prune_out_channels
        for i in range(outputs_of_layer):
            reads = frozenset(
                (f"{names[dep.target.module]}.weight", int(k))
                for dep, indices in graph.get_pruning_group(module, cut, idxs=[i])
                if isinstance(dep.target.module, LAYERS) and graph.is_in_channel_pruning_fn(dep.handler)
                for k in indices
            )
            theirs |= {reads} - {frozenset()}
    assert slices_of(coupled_channels(model, x)) == theirs
