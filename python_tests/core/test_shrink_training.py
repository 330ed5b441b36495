"""Shrink while training: whatever the optimizer, it goes on as with states cut by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import BasicBlock, Chain, close, images, outputs, randomise
from torch import Tensor, nn

import rvsm_kernels as rk
from runner import same_bits

SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 1e-4, "beta": 0.5}


def _rvsm(model: nn.Module, **options: Any) -> Any:
    return rk.RVSM(rk.param_groups(model, **SPLIT), lr=0.05, momentum=0.9, **options)


def _wrapped(make: Callable[[Any], Any], **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: rk.RVSMWrapper(make(rk.param_groups(model)), **SPLIT, **options)


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9),
    "adamw-amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
    "rvsm": _rvsm,
    "rvsm-reference": lambda m: _rvsm(m, engine="reference"),
    "rvsm-delayed": lambda m: _rvsm(m, method="rvsm-delayed"),
    "admm": lambda m: _rvsm(m, method="admm"),
    "rvsm-adamw": lambda m: rk.RVSMAdamW(rk.param_groups(m, **SPLIT), lr=0.01, amsgrad=True),
    "wrapper": _wrapped(lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True)),
    "wrapper-delayed": _wrapped(lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9), method="rvsm-delayed"),
    "wrapper-rmsprop": _wrapped(lambda groups: torch.optim.RMSprop(groups, lr=0.01, centered=True)),
}


class Net(nn.Module):
    """A convolution, a residual block, a hidden layer and an output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = BasicBlock(8, 8, 1)
        self.hidden, self.head = nn.Linear(8 * 16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.block(self.stem(x)), 2)
        return self.head(torch.relu(self.hidden(x.flatten(1))))


def train(model: nn.Module, optimizer: Any, steps: range) -> Tensor:
    """Returns the last loss, and with it a graph."""
    for k in steps:
        gen = torch.Generator().manual_seed(k)
        x, y = torch.randn(6, 3, 8, 8, generator=gen), torch.randint(4, (6,), generator=gen)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return loss


def by_hand(value: Any, indices: dict[int, Tensor]) -> Any:
    """A state, cut."""
    if isinstance(value, Tensor) and value.numel() > 1:
        for d, index in indices.items():
            value = value.index_select(d, index) if value.shape[d] > 1 else value
        return value.clone()
    return copy.deepcopy(value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_with_states_cut_by_hand(name: str) -> None:
    torch.manual_seed(0)
    model = randomise(Net())
    optimizer = OPTIMIZERS[name](model)
    loss = train(model, optimizer, range(3))  # its graph stays alive
    with torch.no_grad():  # two channels of the residual stream and three neurons
        model.block.conv1.weight[:, [1, 6]] = 0
        model.hidden.weight.view(10, 8, 16)[:, [1, 6]] = 0
        model.head.weight[:, [0, 4, 5]] = 0
        for p in model.parameters():
            for states in (optimizer.state, getattr(optimizer, "_own_states", {})):
                if "u" in states.get(p, {}):
                    states[p]["u"].masked_fill_(p == 0, 0.0)
                if "dual" in states.get(p, {}):
                    states[p]["dual"].masked_fill_(p == 0, 0.0)
    big = copy.deepcopy(model)
    states_before = copy.deepcopy(optimizer.state_dict()["state"])
    x = images()
    u_before = None
    if isinstance(optimizer, (rk.RVSM, rk.RVSMAdamW, rk.RVSMWrapper)):
        with optimizer.sparse_weights():
            u_before = {n: p.detach().clone() for n, p in model.named_parameters()}
            before = outputs(model, x)
    else:
        before = outputs(model, x)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    params = dict(model.named_parameters())

    report = rk.shrink(model, optimizer, example_inputs=x)

    assert report.groups >= 5
    indices = {}
    for n, p in model.named_parameters():
        assert p is params[n]
        indices[n] = {}
        for d in range(p.dim()):
            if p.shape[d] != dict(big.named_parameters())[n].shape[d]:
                gone = {10: [0, 4, 5], 8: [1, 6], 128: [*range(16, 32), *range(96, 112)]}[grads[n].shape[d]]
                indices[n][d] = torch.tensor([i for i in range(grads[n].shape[d]) if i not in gone])
        if report.groups == 5:
            assert same_bits(p, by_hand(dict(big.named_parameters())[n].detach(), indices[n]))
            assert same_bits(p.grad, by_hand(grads[n], indices[n]))
    if report.groups != 5:
        pytest.fail(f"more was zero in u than was zeroed: {report}")
    if u_before is not None:
        with optimizer.sparse_weights():
            close(before, outputs(model, x))
            for n, p in model.named_parameters():
                assert same_bits(p, by_hand(u_before[n], indices[n])), n
    else:
        close(before, outputs(model, x))

    other = copy.deepcopy(model)
    fresh = OPTIMIZERS[name](other)
    order = [n for g in fresh.param_groups for p in g["params"] for n, q in other.named_parameters() if p is q]
    saved = fresh.state_dict()
    saved["param_groups"] = copy.deepcopy(optimizer.state_dict()["param_groups"])
    saved["state"] = {
        k: {key: by_hand(v, indices[order[k]]) for key, v in of_p.items()} for k, of_p in states_before.items()
    }
    fresh.load_state_dict(saved)
    del loss
    for step in range(3, 8):
        train(model, optimizer, range(step, step + 1))
        train(other, fresh, range(step, step + 1))
        for (n, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert same_bits(p, q), (n, step)


def test_an_old_graph_and_a_scheduler_go_on() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    average = torch.optim.swa_utils.AveragedModel(Chain())
    loss = train(model, optimizer, range(2))
    with torch.no_grad():
        model.head.weight[:, 3] = 0
    rk.shrink(model, optimizer, example_inputs=images())
    train(model, optimizer, range(2, 4))
    schedule.step()
    assert loss.grad_fn is not None and average is not None
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masters_are_cut(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).to(dtype)
    optimizer = rk.RVSM(rk.param_groups(model, **SPLIT), lr=0.1, momentum=0.9, master_weights=True)
    x = torch.randn(5, 6).to(dtype)
    model(x).float().square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model[2].weight[:, [2, 7]] = 0
        for state in optimizer.state[model[2].weight].values():
            if isinstance(state, Tensor) and state.dim() == 2:
                state[:, [2, 7]] = 0
    assert rk.shrink(model, optimizer, example_inputs=x).groups == 2
    for p in model.parameters():
        assert all(s.shape == p.shape for s in optimizer.state[p].values() if isinstance(s, Tensor) and s.dim() > 0)
    model(x).float().square().mean().backward()
    optimizer.step()


def test_couplings_of_param_groups_are_cut() -> None:
    model, x = Chain(), images()
    optimizer = torch.optim.SGD([{"params": [model.head.weight], "lr": 0.1}, {"params": [model.hidden.weight]}], lr=0.1)
    optimizer.param_groups[0].update(group_dim=1, coupling=tuple(range(20, 30)), coupling_name="coupled")
    optimizer.param_groups[1].update(group_dim=1, coupling=tuple(k // 16 for k in range(96)), coupling_name="coupled")
    with torch.no_grad():
        model.head.weight[:, [1, 8]] = 0
        model.hidden.weight[:, 16:48] = 0
    assert rk.shrink(model, optimizer, example_inputs=x).groups == 4
    assert optimizer.param_groups[0]["coupling"] == (20, 22, 23, 24, 25, 26, 27, 29)
    assert optimizer.param_groups[1]["coupling"] == tuple(k // 16 for k in range(96) if not 16 <= k < 48)
