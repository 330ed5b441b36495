"""SparseWeightsCallback in Lightning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rvsm_kernels as rk
from runner import bits

pl = pytest.importorskip("lightning.pytorch")
from rvsm_kernels.integrations.lightning import SparseWeightsCallback  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning's use of torch's pytree
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
]
SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 1.25e-3, "beta": 1.0}  # what is below 0.05 is zero
Make = Callable[[Any], Any]


def sgd(groups: Any, **options: Any) -> rk.RVSM:
    return rk.RVSM(groups, lr=0.1, momentum=0.9, **options)


class Module(pl.LightningModule):
    """Two batches of training and one of validation an epoch."""

    def __init__(self, make: Make = sgd, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
        self.make = make
        self.zeros: dict[str, int] = {}  # of the first layer, when it was last seen in each stage
        self.fails_in = ""

    def see(self, stage: str) -> None:
        self.zeros[stage] = int((self.net[0].weight == 0).sum())

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.see("training")
        return self.loss(batch)

    def _evaluate(self, stage: str, batch: list[Tensor]) -> None:
        self.see("sanity" if self.trainer.sanity_checking else stage)
        self.log(f"{stage}_loss", self.loss(batch))
        if self.fails_in == stage and not self.trainer.sanity_checking:
            raise ArithmeticError(stage)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self._evaluate("validation", batch)

    def test_step(self, batch: list[Tensor], index: int) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.see("prediction")
        return self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return self.make(rk.param_groups(self.net, **SPLIT))


class ManualModule(Module):
    """An optimizer a layer, of which ``make`` makes the second too."""

    def __init__(self, make: Make = sgd, seed: int = 0) -> None:
        super().__init__(make, seed)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        self.see("training")
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, second = self.net[:2], self.net[3]
        return [sgd(rk.param_groups(first, **SPLIT)), self.make(rk.param_groups(second, **SPLIT))]


def loader(count: int = 16) -> DataLoader:
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 8)


def trainer_of(folder: Path, *callbacks: Any, **options: Any) -> Any:
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 6,
            "callbacks": list(callbacks),
            "default_root_dir": str(folder),
            "logger": False,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        }
    )


def all_bits(module: Any) -> dict[str, Tensor]:
    return {name: bits(p) for name, p in module.state_dict().items() if p.is_floating_point()}


def states(trainer: Any) -> dict[str, Tensor]:
    """The bits of the weights, statistics and states of the optimizers."""
    found = all_bits(trainer.lightning_module)
    for k, optimizer in enumerate(trainer.optimizers):
        for i, of_p in optimizer.state_dict()["state"].items():
            found |= {f"{k} {i} {name}": bits(v) for name, v in of_p.items() if isinstance(v, Tensor)}
    return found


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def u_of(trainer: Any) -> dict[str, Tensor]:
    optimizer = rk.unwrap(trainer.optimizers[0])
    with optimizer.sparse_weights(trainer.lightning_module):
        return all_bits(trainer.lightning_module)


def saved_bits(path: Path) -> dict[str, Tensor]:
    weights = torch.load(path, weights_only=True)["state_dict"]
    return {name: bits(p) for name, p in weights.items() if p.is_floating_point()}


def fp16_on_cpu() -> Any:
    return pl.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))


# ---- training, stopping, resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "make", "options"),
    [
        (Module, sgd, lambda: {}),
        (
            Module,
            lambda groups: rk.RVSMAdamW(groups, lr=0.05, amp_scaling=False),
            lambda: {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
        ),
        (
            Module,
            lambda groups: sgd(groups, amp_scaling=False, method="admm"),
            lambda: {"plugins": [fp16_on_cpu()], "gradient_clip_val": 0.5},
        ),
        (Module, sgd, lambda: {"plugins": [fp16_on_cpu()]}),
        (ManualModule, lambda groups: torch.optim.Adam([p for g in groups for _, p in g["params"]]), lambda: {}),
        (ManualModule, sgd, lambda: {"plugins": [fp16_on_cpu()]}),
    ],
    ids=["SGD", "AdamW, bf16, accumulation, clipping", "fp16, clipping", "fp16", "manual, with Adam", "manual, fp16"],
)
def test_it_resumes_bit_for_bit(tmp_path: Path, kind: Any, make: Make, options: Callable[[], Any]) -> None:
    """A checkpoint that is written right after a validation of u holds w and everything else."""
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    straight = trainer_of(tmp_path, SparseWeightsCallback(), saver, **options())
    module = kind(make)
    straight.fit(module, loader(), loader())
    assert module.zeros["validation"] > module.zeros["training"] == 0
    resumed = trainer_of(tmp_path, SparseWeightsCallback(), **options())
    resumed.fit(kind(make, seed=1), loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert equal(states(straight), states(resumed))


@pytest.mark.parametrize("kind", [Module, ManualModule])
def test_what_is_validated_does_not_change_the_training(tmp_path: Path, kind: Any) -> None:
    found = []
    for callbacks in ([SparseWeightsCallback()], [SparseWeightsCallback("w")], []):
        trainer = trainer_of(tmp_path, *callbacks)
        trainer.fit(kind(), loader(), loader())
        found.append(states(trainer))
    assert equal(found[0], found[1]) and equal(found[0], found[2])


# ---- validation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", ["u", "w"])
def test_u_is_held(tmp_path: Path, evaluate: str) -> None:
    trainer, module = trainer_of(tmp_path, SparseWeightsCallback(evaluate), num_sanity_val_steps=1), Module()
    trainer.fit(module, loader(), loader())
    w = all_bits(module)
    trainer.validate(module, loader(), verbose=False)
    trainer.test(module, loader(), verbose=False)
    trainer.predict(module, loader(), return_predictions=False)
    assert equal(w, all_bits(module))
    zeros = rk.unwrap(trainer.optimizers[0]).sparsity().rows[0].zeros
    assert 0 < zeros < 128 and module.zeros["training"] == module.zeros["sanity"] == 0
    expected = zeros if evaluate == "u" else 0
    assert [module.zeros[stage] for stage in ("validation", "test", "prediction")] == [expected] * 3


def test_all_optimizers_are_held(tmp_path: Path) -> None:
    trainer, module = trainer_of(tmp_path, SparseWeightsCallback()), ManualModule()
    module.on_validation_epoch_start = lambda: shares.append(rk.sparsity(module).share)
    shares: list[float] = []
    trainer.fit(module, loader(), loader())
    totals = [optimizer.sparsity().total for optimizer in trainer.optimizers]
    assert shares[-1] == sum(t.zeros for t in totals) / sum(t.numel for t in totals) and totals[1].zeros > 0


@pytest.mark.parametrize("stage", ["validation", "test"])
@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_an_error_leaves_w(tmp_path: Path, stage: str, error: type[BaseException]) -> None:
    """Nothing of u is in the weights afterwards, and the training can go on."""
    trainer, module = trainer_of(tmp_path, SparseWeightsCallback(), max_epochs=1), Module()
    w: list[dict[str, Tensor]] = []
    module.on_train_batch_end = lambda *_: w.append(all_bits(module))

    def fail(*_: Any) -> None:
        raise error

    if stage == "test":
        trainer.fit(module, loader(), loader())
    setattr(module, f"on_{stage}_epoch_end", fail)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer.fit(module, loader(), loader()) if stage == "validation" else trainer.test(module, loader())
    assert module.zeros[stage] > 0
    assert equal(w[-1], all_bits(module))
    delattr(module, f"on_{stage}_epoch_end")
    module.train()
    trainer_of(tmp_path, SparseWeightsCallback(), max_epochs=1).fit(module, loader(), loader())


def test_schedulefree(tmp_path: Path) -> None:
    """What is validated is u of the average, whether the module switches modes or not."""
    schedulefree = pytest.importorskip("schedulefree")

    def make(groups: Any) -> rk.RVSMWrapper:
        plain = [{**g, "params": [p for _, p in g["params"]]} for g in groups]
        return rk.RVSMWrapper(schedulefree.SGDScheduleFree(plain, lr=0.5), decoupled=False)

    found = []
    for switches in (False, True):
        module = Module(make)
        trainer = trainer_of(tmp_path, SparseWeightsCallback(sparsify_at_end=True), max_epochs=3)
        module.on_train_epoch_start = lambda module=module: module.optimizers().train()
        if switches:
            module.on_validation_epoch_start = lambda module=module: module.optimizers().eval()
        trainer.fit(module, loader(), loader())
        found.append(module.zeros["validation"])
        assert int((module.net[0].weight == 0).sum()) == found[-1]
    assert found[0] == found[1] > 0


# ---- statistics of batch norms ---------------------------------------------------------------------------------------


class Called(Module):
    """It can be called, and notes the statistics that are there in each stage."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def see(self, stage: str) -> None:
        super().see(stage)
        self.means = {**getattr(self, "means", {}), stage: self.net[1].running_mean.clone()}


@pytest.mark.parametrize("given", [True, False], ids=["of the training", "a loader"])
def test_statistics_of_u(tmp_path: Path, given: bool) -> None:
    """They are there in each evaluation, those of w are back afterwards, and the training is the same."""
    found, shuffled = [], lambda: DataLoader(loader().dataset, 8, shuffle=True)
    for options in ({}, {"recalibrate": True if given else loader(), "batches": 2}):
        trainer, module = trainer_of(tmp_path, SparseWeightsCallback(**options)), Called()
        torch.manual_seed(1)
        trainer.fit(module, shuffled(), loader())
        trainer.validate(module, loader(), verbose=False)
        found.append(states(trainer))
    assert equal(*found)
    with rk.unwrap(trainer.optimizers[0]).sparse_weights(module, recalibrate=loader()):
        expected = module.net[1].running_mean.clone()
    torch.testing.assert_close(module.means["validation"], expected)
    assert not torch.allclose(module.means["validation"], module.net[1].running_mean)


def test_statistics_of_u_at_the_end(tmp_path: Path) -> None:
    callback = SparseWeightsCallback(sparsify_at_end=True, recalibrate=True)
    trainer, module = trainer_of(tmp_path, callback), Called()
    trainer.fit(module, loader(), loader())
    left = module.net[1].running_mean.clone()
    rk.recalibrate(module, loader())
    torch.testing.assert_close(left, module.net[1].running_mean)
    assert int((module.net[0].weight == 0).sum()) > 0


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_statistics_of_u_in_half_types(tmp_path: Path, precision: str) -> None:
    """The batches of the statistics get the types that the batches of the training get."""
    seen: list[torch.dtype] = []

    class Seen(Called):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            seen.extend((x.dtype, out.dtype))
            return out

    trainer = trainer_of(
        tmp_path, SparseWeightsCallback(recalibrate=True, batches=2), max_epochs=1, precision=precision
    )
    trainer.fit(Seen(), loader(), loader())
    assert seen and set(seen[1::2]) == {torch.bfloat16}
    assert set(seen[::2]) == {torch.bfloat16 if precision == "bf16-true" else torch.float32}


def test_what_recalibrate_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batches must be"):
        SparseWeightsCallback(recalibrate=True, batches=0)
    with pytest.raises(ValueError, match="give that too"):
        SparseWeightsCallback(batches=3)
    with pytest.raises(ValueError, match="not an iterator"):
        SparseWeightsCallback(recalibrate=iter(loader()))
    with pytest.raises(TypeError, match="takes True or batches"):
        SparseWeightsCallback(recalibrate=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Module has no forward"):
        trainer_of(tmp_path, SparseWeightsCallback(recalibrate=True)).fit(Module(), loader(), loader())


# ---- checkpoints and logs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["w", "u"])
@pytest.mark.parametrize("only", [False, True], ids=["all", "weights only"])
def test_checkpoints(tmp_path: Path, save: str, only: bool) -> None:
    """Written by ModelCheckpoint, by hand inside a validation, and by hand after the training."""
    saver = pl.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_weights_only=only)
    trainer, module = trainer_of(tmp_path, saver, SparseWeightsCallback(save=save)), Module()
    module.on_validation_epoch_end = lambda: trainer.save_checkpoint(tmp_path / "inside.ckpt", only)
    trainer.fit(module, loader(), loader())
    trainer.save_checkpoint(tmp_path / "after.ckpt", only)
    w, u = all_bits(module), u_of(trainer)
    assert not equal(w, u) and module.zeros["validation"] > 0
    for name in ("epoch=5", "inside", "after"):
        assert equal(saved_bits(tmp_path / f"{name}.ckpt"), u if save == "u" else w), name


def test_sparsified_at_the_end(tmp_path: Path) -> None:
    trainer, module = trainer_of(tmp_path, SparseWeightsCallback(sparsify_at_end=True)), Module()
    trainer.fit(module, loader(), loader())
    assert int((module.net[0].weight == 0).sum()) == module.zeros["validation"] > 0


class Logger(pl.loggers.Logger):
    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": -1 if step is None else step})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_logs(tmp_path: Path, accumulate: int) -> None:
    logger, module = Logger(), Module()
    trainer = trainer_of(
        tmp_path,
        SparseWeightsCallback(),
        logger=logger,
        log_every_n_steps=2,
        accumulate_grad_batches=accumulate,
        max_epochs=4,
    )
    losses: list[float] = []
    module.on_train_batch_end = lambda outputs, *_: losses.append(float(outputs["loss"]) * accumulate)
    trainer.fit(module, loader(), loader())
    rows = [row for row in logger.rows if "sparsity" in row]
    assert len(rows) == 4 // accumulate
    assert rows[-1]["L_beta"] == pytest.approx(losses[-1] + rows[-1]["penalty_value"], rel=1e-5)
    assert rows[-1]["sparsity"] == pytest.approx(rk.unwrap(trainer.optimizers[0]).sparsity().share)


@pytest.mark.parametrize("save", ["w", "u"])
def test_the_tuner_gives_w_back(tmp_path: Path, save: str) -> None:
    """It saves the weights, trains with many rates, and loads the weights again."""
    trainer, module = trainer_of(tmp_path, SparseWeightsCallback(save=save)), Module()
    module.lr = 0.1
    before = all_bits(module)
    pl.tuner.Tuner(trainer).lr_find(module, loader(), loader(), num_training=4, update_attr=False)
    assert equal(before, all_bits(module))


# ---- Fabric ----------------------------------------------------------------------------------------------------------


def test_fabric() -> None:
    """It needs nothing but ``rk.unwrap``."""
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", precision="bf16-mixed")
    torch.manual_seed(0)
    net = nn.Linear(8, 2)
    model, optimizer = fabric.setup(net, sgd(rk.param_groups(net, **SPLIT)))
    for x, y in loader():
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()
    ours, w = rk.unwrap(optimizer), bits(net.weight)
    with ours.sparse_weights(model):
        assert int((net.weight == 0).sum()) == ours.sparsity().total.zeros > 0
    assert torch.equal(w, bits(net.weight))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Invalid evaluate: 'both'"):
        SparseWeightsCallback("both")
    with pytest.raises(ValueError, match="Invalid save: None"):
        SparseWeightsCallback(save=None)  # type: ignore[arg-type]
    foreign = Module(lambda groups: torch.optim.SGD([p for g in groups for _, p in g["params"]]))
    with pytest.raises(TypeError, match="no optimizer of rvsm_kernels in a SGD"):
        trainer_of(tmp_path, SparseWeightsCallback()).fit(foreign, loader(), loader())
    for options in ({"plugins": [fp16_on_cpu()]}, {"precision": "bf16-mixed"}):
        trainer = trainer_of(tmp_path, SparseWeightsCallback(), gradient_clip_val=0.5, **options)
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            trainer.fit(Module(), loader(), loader())


def test_without_an_optimizer(tmp_path: Path) -> None:
    """A trainer that has trained nothing measures the weights as they are."""
    module = Module()
    trainer_of(tmp_path, SparseWeightsCallback()).validate(module, loader(), verbose=False)
    assert module.zeros["validation"] == 0
