"""Smaller networks elsewhere: ONNX in onnxruntime, torch.export, int8 of torchao, fresh processes that load them."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import SMALL, TRANSFORMERS, Architecture, ResNet, images, outputs, randomise
from test_shrink import Attended, zero_groups
from test_sparse_copies import trained
from torch import Tensor, nn

import rvsm_kernels as rk
from models import batch, run_afresh
from rvsm_kernels.model.coupled import as_arguments, coupled_channels

pytestmark = pytest.mark.usefixtures("on_cpu")

EVERY = {arch.name: arch for arch in (*SMALL, *TRANSFORMERS)}
QUICK = ("resnet",)
"""What `make test` exports; all others are slow."""
NOT_ONNX = {"t5"}
"""What torch's exporter to ONNX does not take, shrunk or not."""
BATCH = {0: torch.export.Dim.DYNAMIC}


def marked(names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what exporters say of packages that they do not need."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def shrunk(name: str) -> tuple[nn.Module, Any]:
    """An architecture without half of its channels, in eval mode, and inputs for it."""
    arch: Architecture = EVERY[name]
    if arch in TRANSFORMERS:
        pytest.importorskip("transformers")
    torch.manual_seed(3)
    model, x = randomise(arch.build()), arch.inputs()
    zero_groups(model, x)
    assert rk.shrink(model, example_inputs=x).groups > 0
    if hasattr(model, "config"):  # a cache is no tensor that a program could return
        for config in (model.config, getattr(model, "decoder", model).config):
            config.use_cache = False
    return model.eval(), x


def larger(x: Any) -> Any:
    """The same inputs in a batch of three times the size."""
    if isinstance(x, dict):
        return {name: larger(t) for name, t in x.items()}
    return tuple(larger(t) for t in x) if isinstance(x, tuple) else torch.cat([x, x.flip(0), x])


def shapes_of(x: Any) -> Any:
    """``dynamic_shapes`` for inputs whose batch may be of any size."""
    args, kwargs = as_arguments(x)
    return dict.fromkeys(kwargs, BATCH) if kwargs else tuple(BATCH for _ in args)


def assert_near(found: list[Tensor], wanted: list[Tensor], within: float = 1e-4) -> None:
    """Relative to the largest."""
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = a.detach(), b.detach()
        assert float((a - b).abs().max()) <= within * float(b.abs().max())


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def to_onnx(model: nn.Module, x: Any, path: Path, dynamic: bool = True) -> Callable[[Any], list[Tensor]]:
    """Export to a file; returns what runs it."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    args, kwargs = as_arguments(x)
    with silent():
        torch.onnx.export(
            model,
            tuple(args),
            path,
            kwargs=kwargs or None,
            dynamo=True,
            dynamic_shapes=shapes_of(x) if dynamic else None,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(x: Any) -> list[Tensor]:
        args, kwargs = as_arguments(x)
        values = (t.numpy() for t in (*args, *kwargs.values()))
        names = (entry.name for entry in session.get_inputs())
        return [torch.from_numpy(t) for t in session.run(None, dict(zip(names, values, strict=True)))]

    return run


def check_onnx(model: nn.Module, x: Any, path: Path, dynamic: bool = True) -> None:
    run = to_onnx(model, x, path, dynamic)
    for inputs in (x, larger(x)) if dynamic else (x,):
        assert_near(run(inputs), outputs(model, inputs))


@pytest.mark.parametrize("name", marked(name for name in EVERY if name not in NOT_ONNX))
def test_onnx_of_a_shrunk_network(name: str, tmp_path: Path) -> None:
    """With a batch of any size."""
    model, x = shrunk(name)
    check_onnx(model, x, tmp_path / "net.onnx")


@pytest.mark.slow
def test_onnx_of_a_fixed_batch(tmp_path: Path) -> None:
    model, x = shrunk("unet")
    check_onnx(model, x, tmp_path / "net.onnx", dynamic=False)


@pytest.mark.slow
def test_onnx_of_attention_that_has_lost_heads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(Attended(batch_first=True)).eval()
    with torch.no_grad():
        model.attention.out_proj.weight[:, 4:8] = 0
    x = tuple(torch.randn(2, 5, 12) for _ in range(3))
    assert rk.shrink(model, example_inputs=x).groups > 0
    check_onnx(model, x, tmp_path / "attended.onnx")
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 16, batch_first=True), 2).eval()
    with torch.no_grad():
        encoder.layers[0].self_attn.out_proj.weight[:, :6] = 0
        encoder.layers[1].linear2.weight[:, ::2] = 0
    assert rk.shrink(encoder, example_inputs=x[0]).groups > 0
    check_onnx(encoder, x[0], tmp_path / "encoder.onnx")


@pytest.mark.slow
def test_onnx_of_u_while_w_is_trained(tmp_path: Path) -> None:
    """A copy that holds u, and a network that was shrunk with its optimizer; zeros come out as zeros."""
    onnx = pytest.importorskip("onnx")
    model, optimizer = trained()
    x = batch(0)[0]
    model.eval()
    with optimizer.sparse_weights():
        wanted = outputs(model, x)
    run = to_onnx(rk.sparse_copy(model, optimizer).eval(), x, tmp_path / "u.onnx")
    assert_near(run(x), wanted)
    stored = {
        t.name: onnx.numpy_helper.to_array(t, str(tmp_path)) for t in onnx.load(tmp_path / "u.onnx").graph.initializer
    }
    zeros = {row.name: row.zeros for row in optimizer.sparsity().rows if row.zeros}
    assert zeros and all(int((stored[name] == 0).sum()) == zeros[name] for name in zeros if name in stored)
    rk.shrink(model, optimizer, example_inputs=x)
    check_onnx(rk.sparse_copy(model, optimizer).eval(), x, tmp_path / "shrunk.onnx")


# ---- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", marked(EVERY))
def test_torch_export_of_a_shrunk_network(name: str) -> None:
    model, x = shrunk(name)
    args, kwargs = as_arguments(x)
    file = io.BytesIO()
    with silent():
        program = torch.export.export(model, tuple(args), kwargs, dynamic_shapes=shapes_of(x))
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file).module()
    for inputs in (x, larger(x)):
        args, kwargs = as_arguments(inputs)
        assert_near(flat(again(*args, **kwargs)), outputs(model, inputs))


def flat(found: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(found) if isinstance(t, Tensor)]


# ---- int8 of torchao -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("name", ["chain", "vgg", "resnet", "transformer", "bert", "llama"])
def test_int8_of_a_shrunk_network(name: str, config: str) -> None:
    """The linear layers become int8 and answer nearly the same; ``rk.sparsity`` counts their zeros."""
    quantization = pytest.importorskip("torchao.quantization")
    model, x = shrunk(name)
    wanted = outputs(model, x)
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    small = copy.deepcopy(model)
    with silent():
        quantization.quantize_(small, getattr(quantization, config)())
    assert_near(outputs(small, x), wanted, within=0.03)
    kinds = {name: type(p).__name__ for name, p in small.named_parameters()}
    assert linear and {name.removesuffix(".weight") for name, kind in kinds.items() if "Int8" in kind} == linear
    before, report = rk.sparsity(model), rk.sparsity(small)
    assert not report.uncounted
    zeros = {row.name: row.zeros for row in report.rows}
    assert set(zeros) == {row.name for row in before.rows}
    assert all(zeros[row.name] >= row.zeros for row in before.rows)
    with torch.no_grad():
        layer = small.get_submodule(next(iter(linear)))
        assert zeros[f"{next(iter(linear))}.weight"] == int((layer.weight.dequantize() == 0).sum())


@pytest.mark.slow
def test_zeros_of_int8_weights_stay() -> None:
    """Zeros of u are zeros of the int8 weights, and whole channels of zeros too."""
    quantization = pytest.importorskip("torchao.quantization")
    model, optimizer = trained()
    net = rk.sparse_copy(model, optimizer).eval()
    zero = {name: p == 0 for name, p in net.named_parameters()}
    x = batch(0)[0]
    wanted = outputs(net, x)
    with silent():
        quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    assert_near(outputs(net, x), wanted, within=0.03)
    for name in ("hidden.weight", "head.weight"):
        assert bool((net.get_parameter(name).dequantize()[zero[name]] == 0).all())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg", "transformer"])
def test_int8_weights_are_exported(name: str, tmp_path: Path) -> None:
    """Weights of int8 alone: the exporter to ONNX has no product of int8 matrices."""
    quantization = pytest.importorskip("torchao.quantization")
    model, x = shrunk(name)
    with silent():
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        program = torch.export.export(model, (x,))
        torch.export.save(program, tmp_path / "net.pt2")
        again = torch.export.load(tmp_path / "net.pt2").module()
    assert_near(flat(again(x)), outputs(model, x))
    check_onnx(model, x, tmp_path / "net.onnx", dynamic=False)


# ---- fresh processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fresh_processes_predict_the_same(tmp_path: Path) -> None:
    """What was exported needs neither this library nor the code of the model; a file of save_sparse needs both."""
    pytest.importorskip("safetensors")
    model, x = shrunk("resnet")
    to_onnx(model, x, tmp_path / "net.onnx")
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=shapes_of(x)), tmp_path / "net.pt2")
    rk.save_sparse(model, tmp_path / "net.safetensors")
    (tmp_path / "net.pickle").write_bytes(pickle.dumps(model))
    (tmp_path / "shapes.pickle").write_bytes(pickle.dumps(copy.deepcopy(model).to("meta")))
    torch.save({"x": larger(x), "wanted": outputs(model, larger(x))[0]}, tmp_path / "data.pt")
    start = """
import sys, torch
data = torch.load("data.pt")
x, wanted = data["x"], data["wanted"]
def check(found):
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    print("same")
"""
    loads = {
        "onnxruntime": """
import onnxruntime
session = onnxruntime.InferenceSession("net.onnx", providers=["CPUExecutionProvider"])
check(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]))
assert "rvsm_kernels" not in sys.modules and "architectures" not in sys.modules
""",
        "torch.export": """
check(torch.export.load("net.pt2").module()(x))
assert "rvsm_kernels" not in sys.modules and "architectures" not in sys.modules
""",
        "pickle": """
import pickle
check(pickle.load(open("net.pickle", "rb"))(x).detach())
""",
        "load_sparse": """
import pickle
import rvsm_kernels as rk
net = pickle.load(open("shapes.pickle", "rb")).to_empty(device="cpu")
check(rk.load_sparse(net, "net.safetensors").eval()(x).detach())
""",
    }
    for name, code in loads.items():
        done = run_afresh(start + code, tmp_path)
        assert done.returncode == 0 and done.stdout.strip().endswith("same"), f"{name}: {done.stderr}"


def test_a_file_of_a_shrunk_network_needs_its_shapes(tmp_path: Path) -> None:
    """load_sparse fills a network of the same shapes: the dense one is refused, one that is shrunk alike is filled."""
    pytest.importorskip("safetensors")
    model, x = shrunk("resnet")
    rk.save_sparse(model, tmp_path / "x")
    with pytest.raises(ValueError, match="is of another model"):
        rk.load_sparse(ResNet(), tmp_path / "x")
    other = randomise(ResNet())
    groups = coupled_channels(other, images()).groups
    torch.manual_seed(3)
    zero_groups(other, x)
    assert len(groups) > 0
    rk.shrink(other, example_inputs=x)
    assert_near(outputs(rk.load_sparse(other, tmp_path / "x"), x), outputs(model, x))
