"""Experts, routers and heads in modules as transformers defines them, and where their groups are."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk
from models import Conv1D, dims_of

SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 1e-4, "beta": 0.5}

# ---- experts and routers ---------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """Weights of experts as transformers stacks them: (experts, outputs, inputs), or swapped."""

    def __init__(self, swapped: bool = False, says: bool | None = None, gated: bool = True, inner: int = 5) -> None:
        super().__init__()
        first, last = ((2 if gated else 1) * inner, 3), (3, inner)
        if swapped:
            first, last = first[::-1], last[::-1]
        self.register_parameter("gate_up_proj" if gated else "up_proj", nn.Parameter(torch.randn(4, *first)))
        self.down_proj = nn.Parameter(torch.randn(4, *last))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 3))
        if says is not None:
            self.is_transposed = says


def of_transformers(name: str, *bases: type[nn.Module], **namespace: Any) -> type[nn.Module]:
    """A class that transformers could have defined."""
    return type(name, bases, {"__module__": "transformers.models.some.modeling_some", **namespace})


SomeExperts = of_transformers("SomeExperts", Stack)


@pytest.mark.parametrize(
    ("arguments", "swapped"),
    [
        pytest.param({}, False, id="by shape"),
        pytest.param({"swapped": True}, True, id="swapped, by shape"),
        pytest.param({"swapped": True, "says": True}, True, id="swapped, said"),
        pytest.param({"says": False}, False, id="said"),
        pytest.param({"says": False, "gated": False}, False, id="without a gate"),
        pytest.param({"inner": 3}, False, id="as many inputs as neurons"),
        pytest.param({"inner": 3, "swapped": True}, True, id="swapped, as many inputs as neurons"),
    ],
)
def test_experts_of_transformers(arguments: dict[str, Any], swapped: bool) -> None:
    """Every expert has channels of its own; the default engine takes the groups."""
    model = nn.Sequential(SomeExperts(**arguments))
    first = "0.gate_up_proj" if arguments.get("gated", True) else "0.up_proj"
    for structure, of_usual, of_swapped in (
        ("in_channels", (0, 2), (0, 1)),
        ("out_channels", (0, 1), (0, 2)),
        ("kernels", (0, 1, 2), (0, 1, 2)),
        ("layers", (0,), (0,)),
    ):
        dim = of_swapped if swapped else of_usual
        assert dims_of(model, structure) == {first: dim, "0.down_proj": dim}
        optimizer = rk.RVSM(rk.param_groups(model, structure=structure, **SPLIT), lr=0.1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert [row.groups for row in optimizer.sparsity().rows] == [
            torch.Size([p.shape[d] for d in dim]).numel() for p in model.parameters() if p.dim() == 3
        ]
    assert [name for name, _ in rk.param_groups(model)[-1]["params"]] == ["0.gate_up_proj_bias"]


def test_only_stacks_of_transformers_are_experts() -> None:
    """Of another library's the layout is not known; a matrix in a module of experts is none of its stacks."""
    ours = type("SomeExperts", (Stack,), {})
    with pytest.raises(ValueError, match="include"):
        rk.param_groups(ours())
    with_matrix = SomeExperts()
    with_matrix.shared = nn.Parameter(torch.randn(3, 3))
    assert "shared" not in dims_of(with_matrix, "layers")
    assert "shared" in rk.describe(with_matrix) and "not included" in rk.describe(with_matrix)


def test_routers_stay_dense() -> None:
    """Those that transformers has a class for, linear or not; a plain Linear is as any other."""
    linear = of_transformers("SomeTopKRouter", nn.Linear)
    weight = of_transformers("SomeRouter", nn.Module)
    model = nn.Sequential(nn.Linear(3, 4), linear(3, 4), weight())
    model[2].weight = nn.Parameter(torch.randn(4, 3))
    assert [name for name, _ in rk.param_groups(model)[0]["params"]] == ["0.weight"]
    assert rk.describe(model).count("a router") == 2
    assert [name for name, _ in rk.param_groups(model, include=linear)[0]["params"]] == ["1.weight"]
    assert "2.weight" in [name for name, _ in rk.param_groups(model, include=(weight, nn.Linear))[0]["params"]]


# ---- heads -----------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """A module of these layers and numbers."""

    def __init__(self, /, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def linears(inputs: int, **outputs: int) -> dict[str, nn.Module]:
    return {name: nn.Linear(inputs, n) for name, n in outputs.items()}


MLP = {"up_proj": nn.Linear(12, 24), "down_proj": nn.Linear(24, 12)}

ATTENTIONS: dict[str, tuple[Callable[[], nn.Module], dict[str, tuple[int, int]]]] = {
    # name: (a model, (group_dim, group_block) of what is taken)
    "nn.MultiheadAttention": (
        lambda: nn.MultiheadAttention(12, 3),
        {"in_proj_weight": (0, 4), "out_proj.weight": (1, 4)},
    ),
    "with other inputs": (
        lambda: nn.MultiheadAttention(12, 3, kdim=5, vdim=7),
        {**{f"{x}_proj_weight": (0, 4) for x in "qkv"}, "out_proj.weight": (1, 4)},
    ),
    "grouped queries": (
        lambda: Parts(
            a=Parts(**linears(12, q_proj=12, k_proj=4, v_proj=4), o_proj=nn.Linear(12, 12), head_dim=4),
            mlp=Parts(**MLP),
        ),
        {**{f"a.{x}_proj.weight": (0, 4) for x in "qkv"}, "a.o_proj.weight": (1, 4)},
    ),
    "heads wider than the model": (
        lambda: Parts(**linears(12, q_proj=24, k_proj=24, v_proj=24), out_proj=nn.Linear(24, 12), num_heads=3),
        {**{f"{x}_proj.weight": (0, 8) for x in "qkv"}, "out_proj.weight": (1, 8)},
    ),
    "GPT-2": (
        lambda: Parts(attn=Parts(c_attn=Conv1D(36, 12), c_proj=Conv1D(12, 12), n_head=3), c_proj=Conv1D(12, 24)),
        {"attn.c_attn.weight": (1, 4), "attn.c_proj.weight": (0, 4)},
    ),
    "GPT-2, cross attention": (
        lambda: Parts(c_attn=Conv1D(24, 12), q_attn=Conv1D(12, 12), c_proj=Conv1D(12, 12), head_dim=4),
        {"c_attn.weight": (1, 4), "q_attn.weight": (1, 4), "c_proj.weight": (0, 4)},
    ),
    "Bert": (
        lambda: Parts(
            attention=Parts(
                self=Parts(**linears(12, query=12, key=12, value=12), attention_head_size=4),
                output=Parts(dense=nn.Linear(12, 12)),
            ),
            output=Parts(dense=nn.Linear(24, 12)),
        ),
        {
            **{f"attention.self.{x}.weight": (0, 4) for x in ("query", "key", "value")},
            "attention.output.dense.weight": (1, 4),
        },
    ),
    "T5": (
        lambda: Parts(**linears(12, q=8, k=8, v=8), o=nn.Linear(8, 12), key_value_proj_dim=4, n_heads=2),
        {**{f"{x}.weight": (0, 4) for x in "qkv"}, "o.weight": (1, 4)},
    ),
    "DeepSeek": (
        lambda: Parts(
            **linears(12, q_a_proj=6, kv_a_proj_with_mqa=7),
            **linears(6, q_b_proj=15, kv_b_proj=21),
            o_proj=nn.Linear(12, 12),
            num_heads=3,
        ),
        {"q_b_proj.weight": (0, 5), "kv_b_proj.weight": (0, 7), "o_proj.weight": (1, 4)},
    ),
    "one that does not fit": (
        lambda: Parts(**linears(12, q_proj=12, k_proj=6, v_proj=4), o_proj=nn.Linear(12, 12), head_dim=4),
        {"q_proj.weight": (0, 4), "v_proj.weight": (0, 4), "o_proj.weight": (1, 4)},
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads(name: str) -> None:
    build, want = ATTENTIONS[name]
    model = build()
    groups = rk.param_groups(model, structure="heads", **SPLIT)
    got = {n: (g["group_dim"], g["group_block"]) for g in groups if g["penalty"] is not None for n, _ in g["params"]}
    assert got == want
    assert len({(g["group_dim"], g["group_block"]) for g in groups}) == len(groups)
    rk.RVSM(groups, lr=0.1)
    lines = rk.describe(model, structure="heads").splitlines()
    for line in lines:
        taken = line.split()[0] in want
        assert ("group_block" in line) == taken and ("heads" in line or "fewer" in line) != taken


def test_heads_and_what_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is guessed; the groups' options are the structure's."""
    model = nn.TransformerEncoderLayer(8, 2, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = rk.param_groups(model, structure="heads", verbose=True, **SPLIT)
    assert [n for g in groups[:-1] for n, _ in g["params"]] == ["self_attn.in_proj_weight", "self_attn.out_proj.weight"]
    assert "linear1.weight" in (text := capsys.readouterr().out) and "no projection of attention heads" in text
    for no_attention in (
        nn.Linear(4, 4),
        Parts(q_proj=nn.LazyLinear(12), k_proj=nn.LazyLinear(12), v_proj=nn.LazyLinear(12), head_dim=4),
        Parts(**linears(12, q_proj=12, k_proj=12, v_proj=12)),  # how many heads?
        Parts(**linears(12, q_proj=12, v_proj=12), head_dim=4),
    ):
        with pytest.raises(ValueError, match="no projection of attention heads"):
            rk.param_groups(no_attention, structure="heads")
    for option in ({"group_dim": 0}, {"group_block": 4}):
        with pytest.raises(ValueError, match=f"structure='heads' sets {next(iter(option))}"):
            rk.param_groups(model, structure="heads", **option)
    with pytest.raises(ValueError, match="'heads'"):
        rk.param_groups(model, structure="head")
    frozen = nn.MultiheadAttention(8, 2)
    frozen.in_proj_weight.requires_grad_(False)
    (group, _) = rk.param_groups(frozen, structure="heads")
    assert [n for n, _ in group["params"]] == ["out_proj.weight"]


def test_blocks_beside_a_structure() -> None:
    """Channels in blocks of four."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    optimizer = rk.RVSM(rk.param_groups(model, structure="in_channels", group_block=4, **SPLIT), lr=0.1)
    assert [row.groups for row in optimizer.sparsity().rows] == [2, 3]
