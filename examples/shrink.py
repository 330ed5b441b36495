"""A network loses half of its channels while it is trained, and goes on as the smaller network that it is.

    python examples/shrink.py                       # digits, two minutes on two cores
    python examples/shrink.py --data fashion-mnist  # needs its files, see examples/README.md
    python examples/shrink.py --net transformer     # neurons and attention heads, half a minute
    python examples/shrink.py --smoke               # seconds

In the same number of epochs: the dense network; RVSM with coupled l0 groups, led to half of the channels of each
layer by a schedule, removed by ``rk.shrink`` at mid-training; Torch-Pruning's group-norm pruner, whose regularisation
runs for the same steps before it removes as many; and filters with the smallest l1 norms, removed at mid-training at
once. The table has the accuracy on the test images, parameters, multiplications, bytes of the file (dense, and as
int8), and how long a batch takes: in torch, by torch.compile, and exported to ONNX in onnxruntime. The transformer
reads patches of the images; it is trained dense by AdamW, and by RVSMAdamW led to half of the neurons of each MLP and
half of the heads of each attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deep.missing import explain

try:
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    import rvsm_kernels as rk
    from deep.data import Dataset, Images, load
    from deep.models import BasicBlock
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

RATIO = 0.5
"""The share of the channels that go."""
BATCH = 64


class ResNet(nn.Module):
    """The form of He et al. for CIFAR: three stages of n blocks, with width, 2 width and 4 width channels."""

    def __init__(self, channels: int, classes: int, blocks: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
            for k in range(blocks):
                stages.append(BasicBlock(inputs, outputs, stride if k == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images, N x channels x H x W, to logits, N x classes."""
        x = self.blocks(torch.relu(self.norm(self.conv(x))))
        return self.linear(x.mean((2, 3)))


class Transformer(nn.Module):
    """Patches of images as tokens, an encoder, and the mean of its tokens."""

    def __init__(self, channels: int, size: int, classes: int, blocks: int, width: int) -> None:
        super().__init__()
        patch = size // 4
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.places = nn.Parameter(torch.zeros(1, (size // patch) ** 2, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, blocks, nn.LayerNorm(width), enable_nested_tensor=False)
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images, N x channels x H x W, to logits, N x classes."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.linear(self.encoder(tokens).mean(1))


@dataclass(frozen=True)
class Settings:
    """What is trained, and for how long."""

    net: str = "resnet"
    data: str = "digits"
    images: int | None = None
    blocks: int = 2
    width: int = 16
    epochs: int = 20
    lr: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One network at the end of its training; times in milliseconds for a batch of 64, medians."""

    method: str
    accuracy: float
    parameters: int
    macs: int
    bytes: int
    bytes_int8: int
    eager_ms: float
    compiled_ms: float | None
    onnxruntime_ms: float | None


class Training:
    """One network, its optimizer and its learning rate, a cosine over all epochs."""

    def __init__(self, data: Dataset, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.train, self.test = data.train.first(settings.images), data.test
        size = data.test.x.shape[-1]
        if settings.net == "resnet":
            self.model: nn.Module = ResNet(data.channels, data.classes, settings.blocks, settings.width)
        else:
            self.model = Transformer(data.channels, size, data.classes, settings.blocks, settings.width)
        mean, std = data.statistics()
        self._shift, self._scale = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.steps = settings.epochs * -(-len(self.train) // BATCH)
        self.step = 0
        self._order = torch.Generator().manual_seed(settings.seed)
        self.example = self.inputs(data.test.x[:2])

    def inputs(self, x: Tensor) -> Tensor:
        """Images as the network takes them."""
        return (x.float() / 255 - self._shift) / self._scale

    def run(self, optimizer: Any, steps: range, after: Callable[[], None], bar: Any, penalty: Any = None) -> None:
        """The steps of this range; ``penalty`` adds to the gradients before a step, ``after`` runs behind it."""
        self.model.train()
        while self.step < steps.stop:
            for x, y in self.train.batches(BATCH, self._order):
                if self.step >= steps.stop:
                    return
                lr = self.settings.lr * (1 + torch.tensor(torch.pi * self.step / self.steps).cos().item()) / 2
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.zero_grad()
                cross_entropy(self.model(self.inputs(x)), y).backward()
                if penalty is not None:
                    penalty()
                optimizer.step()
                after()
                self.step += 1
                bar.update()

    def recalibrate(self) -> None:
        """Statistics of batch norms of the weights as they are now."""
        rk.recalibrate(self.model, (self.inputs(x) for x, _ in self.train.batches(BATCH)))

    def accuracy(self) -> float:
        """On the test images, in percent."""
        self.model.eval()
        with torch.no_grad():
            right = sum(int((self.model(self.inputs(x)).argmax(1) == y).sum()) for x, y in self.test.batches(500))
        return 100 * right / len(self.test)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


def dense(training: Training, bar: Any) -> None:
    """No channel goes."""
    params = training.model.parameters()
    of_transformer = torch.optim.AdamW(params, weight_decay=0.05)
    optimizer = _sgd(training.model) if training.settings.net == "resnet" else of_transformer
    training.run(optimizer, range(training.steps), lambda: None, bar)


def coupled(training: Training, bar: Any) -> None:
    """RVSM with coupled l0 groups and a schedule; shrunk at mid-training, with the optimizer, which goes on.

    The schedule ends there too: what is removed is all that it asks for, so that nothing is pulled afterwards.
    """
    groups = rk.param_groups(
        training.model, structure="coupled", example_inputs=training.example, penalty="l0", lam=0.0, beta=1.0
    )
    lr = training.settings.lr
    if training.settings.net == "resnet":
        optimizer: Any = rk.RVSM(groups, lr=lr, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = rk.RVSMAdamW(groups, lr=lr, weight_decay=0.05)
    half = training.steps // 2
    schedule = rk.SparsitySchedule(
        optimizer, RATIO, of="groups", scope="tensor", begin=half // 5, end=half, every=4, pull_rate=0.2
    )
    training.run(optimizer, range(half), schedule.step, bar)
    rk.shrink(training.model, optimizer, example_inputs=training.example)
    training.run(optimizer, range(half, training.steps), schedule.step, bar)


def _pruned(training: Training, bar: Any, norm: int, regularised: bool) -> None:
    import torch_pruning as tp

    half = training.steps // 2
    importance = tp.importance.GroupMagnitudeImportance(p=norm)
    kind = tp.pruner.GroupNormPruner if regularised else tp.pruner.BasePruner
    pruner = kind(
        training.model,
        training.example,
        importance=importance,
        pruning_ratio=RATIO,
        ignored_layers=[training.model.linear],
    )
    optimizer = _sgd(training.model)
    penalty = None
    if regularised:
        pruner.update_regularizer()
        penalty = lambda: pruner.regularize(training.model)  # noqa: E731
    training.run(optimizer, range(half), lambda: None, bar, penalty)
    training.model.eval()
    pruner.step()
    # The pruner makes new parameters, of which an optimizer knows nothing: momentum begins anew.
    training.run(_sgd(training.model), range(half, training.steps), lambda: None, bar)


def group_norm(training: Training, bar: Any) -> None:
    """Torch-Pruning's group-norm pruner (DepGraph)."""
    _pruned(training, bar, 2, regularised=True)


def l1_filters(training: Training, bar: Any) -> None:
    """Filters with the smallest l1 norms (Li et al., 2017), on Torch-Pruning's graph."""
    _pruned(training, bar, 1, regularised=False)


METHODS: dict[str, Callable[[Training, Any], None]] = {
    "dense": dense,
    "RVSM, coupled l0": coupled,
    "Torch-Pruning, group norm": group_norm,
    "l1 norms of filters": l1_filters,
}


# ---- what comes out --------------------------------------------------------------------------------------------------


def _milliseconds(run: Callable[[], Any]) -> float:
    samples = []
    with torch.no_grad():
        run()
        end = time.perf_counter() + 1.0
        while len(samples) < 5 or time.perf_counter() < end:
            begin = time.perf_counter()
            run()
            samples.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(samples)


def _in_onnxruntime(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any] | None:
    """The network exported to ONNX, run with as many threads; None where its packages are not there."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  # which torch.onnx needs
    except ModuleNotFoundError:
        return None
    torch.onnx.export(model, (x,), folder / "net.onnx", dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "net.onnx", options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def measured(method: str, training: Training, compiled: bool) -> Row:
    """The row of a network that has been trained."""
    from torch.utils.flop_counter import FlopCounterMode

    training.recalibrate()
    model, x = training.model.eval(), training.inputs(training.test.x[:BATCH])
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its one call of a whole layer is not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x[:1])
    torch.backends.mha.set_fastpath_enabled(fast)
    with tempfile.TemporaryDirectory() as folder:
        sizes = [rk.save_sparse(model, Path(folder) / "net", int8=int8).file_bytes for int8 in (False, True)]
        exported = _in_onnxruntime(model, x, Path(folder)) if compiled else None
    by_inductor = torch.compile(model) if compiled else None
    return Row(
        method=method,
        accuracy=training.accuracy(),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        bytes=sizes[0],
        bytes_int8=sizes[1],
        eager_ms=_milliseconds(lambda: model(x)),
        compiled_ms=None if by_inductor is None else _milliseconds(lambda: by_inductor(x)),
        onnxruntime_ms=None if exported is None else _milliseconds(exported),
    )


def as_table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| method | accuracy | parameters | MACs | file | file, int8 | batch, eager | compiled | onnxruntime |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        others = ["" if ms is None else f"{ms:.1f} ms" for ms in (r.compiled_ms, r.onnxruntime_ms)]
        lines.append(
            f"| {r.method} | {r.accuracy:.2f} % | {r.parameters:,} | {r.macs / 1e6:.2f} M | {r.bytes / 1e3:.0f} KB |"
            f" {r.bytes_int8 / 1e3:.0f} KB | {r.eager_ms:.1f} ms | {others[0]} | {others[1]} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy over multiplications, one mark a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for marker, row in zip("osD^", rows, strict=False):
        axes.plot(row.macs / 1e6, row.accuracy, marker, label=row.method, markersize=9)
    axes.set_xlabel("multiplications of an image, millions")
    axes.set_ylabel("test accuracy, %")
    axes.set_xlim(left=0)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def record(rows: list[Row], settings: Settings, head: dict[str, Any]) -> None:
    """Fill the table of examples/README.md."""
    from bench.markdown import stamp
    from bench.report import fill

    readme = Path(__file__).parent / "README.md"
    images = "all images" if settings.images is None else f"{settings.images:,} images"
    note = f"{settings.data}, {images}, {settings.epochs} epochs, seed {settings.seed}."
    text = f"{as_table(rows)}\n\n{note} {stamp(head)}"
    before = readme.read_text(encoding="utf-8")
    readme.write_text(fill(before, f"shrink-{settings.net}", lambda name: text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("resnet", "transformer"), default="resnet")
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--images", type=int, help="train with so many images; all by default")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--blocks", type=int, default=2, help="of each of the three stages, or of the encoder")
    parser.add_argument("--width", type=int, help="channels of the first stage (16), or of the transformer (64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="without the times of torch.compile and onnxruntime")
    parser.add_argument("--smoke", action="store_true", help="one block, few channels, two epochs of 256 images")
    parser.add_argument("--out", type=Path, help="a folder for the table (JSON) and the picture")
    parser.add_argument("--record", action="store_true", help="write examples/results and the README's table")
    options = parser.parse_args()
    head: dict[str, Any] = {}
    if options.record:
        from bench.results import environment

        options.out = Path(__file__).parent / "results"
        head = environment("cpu", " ".join(["python", "examples/shrink.py", *sys.argv[1:]]))
    is_resnet = options.net == "resnet"
    settings = Settings(
        net=options.net,
        data=options.data,
        images=options.images,
        blocks=options.blocks,
        width=options.width or (16 if is_resnet else 64),
        epochs=options.epochs or (20 if options.data == "digits" else 12),
        lr=0.1 if is_resnet else 2e-3,
        seed=options.seed,
    )
    if options.smoke:
        smaller = {"data": "digits", "images": 256, "blocks": 1, "width": 8 if is_resnet else 32, "epochs": 2}
        settings = replace(settings, **smaller)
    data = load(settings.data)
    if options.smoke:
        data = Dataset(data.name, data.classes, data.train, Images(data.test.x[:128], data.test.y[:128]), data.augment)
    rows = []
    for method, train in METHODS.items():
        if not is_resnet and train not in (dense, coupled):
            continue
        training = Training(data, settings)
        with tqdm(total=training.steps, desc=method, disable=None) as bar:
            train(training, bar)
        rows.append(measured(method, training, compiled=not (options.no_compile or options.smoke)))
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            found = {**head, "settings": asdict(settings), "rows": [asdict(row) for row in rows]}
            (options.out / f"shrink-{options.net}.json").write_text(json.dumps(found, indent=1) + "\n")
    if options.out is not None:
        draw(rows, options.out / f"shrink-{options.net}.png")
    if options.record:
        record(rows, settings, head)
    print(as_table(rows))


if __name__ == "__main__":
    main()
