"""SparseWeightsCallback in the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rvsm_kernels as rk
from runner import bits

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from rvsm_kernels.integrations.transformers import SparseWeightsCallback  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("on_cpu"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SPLIT: dict[str, Any] = {"penalty": "l0", "lam": 4e-3, "beta": 20.0}  # what is below 0.02 is zero


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def data(count: int) -> list[dict[str, Any]]:
    tokens = torch.randint(0, 32, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": int(row.sum() % 2)} for row in tokens]


def trainer_of(folder: Path, model: nn.Module, *, optimizer: Any = None, callbacks: Any = None, **options: Any) -> Any:
    """A Trainer of eight steps, with RVSMAdamW where nothing else is said."""
    of_trainer = {k: options.pop(k) for k in ("optimizer_cls_and_kwargs", "compute_metrics") if k in options}
    if optimizer is None and "optimizer_cls_and_kwargs" not in of_trainer:
        optimizer = rk.RVSMAdamW(rk.param_groups(model, **SPLIT), lr=1e-2)
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "logging_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
            "report_to": "none",
            **options,
        }
    )
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=data(64),
        eval_dataset=data(16),
        optimizers=(optimizer, None),
        callbacks=[SparseWeightsCallback()] if callbacks is None else callbacks,
        **of_trainer,
    )


def all_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: bits(p) for name, p in model.named_parameters()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def states(trainer: Any) -> dict[str, torch.Tensor]:
    """The bits of the weights and of every state of the optimizer."""
    found = all_bits(trainer.model)
    for i, of_p in trainer.optimizer.state_dict()["state"].items():
        found |= {f"{i} {name}": bits(value) for name, value in of_p.items() if isinstance(value, torch.Tensor)}
    return found


def loss_of(trainer: Any, u: bool) -> float:
    """The evaluation by hand."""
    trainer.model.eval()
    rows = trainer.eval_dataset
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in rows])}
    labels = torch.tensor([row["labels"] for row in rows])

    def run() -> float:
        with torch.no_grad():
            return float(trainer.model(**inputs, labels=labels).loss)

    if not u:
        return run()
    with rk.unwrap(trainer.optimizer).sparse_weights():
        return run()


# ---- training, stopping, resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda groups: rk.RVSMAdamW(groups, lr=1e-2), {}),
        (
            lambda groups: rk.RVSM(groups, lr=1e-2, momentum=0.9, method="admm"),
            {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "bf16": True},
        ),
        (lambda groups: rk.RVSMWrapper(torch.optim.NAdam(groups, lr=1e-2)), {"lr_scheduler_type": "cosine"}),
        (None, {"optimizer_cls_and_kwargs": (rk.RVSMAdamW, SPLIT), "learning_rate": 1e-2, "weight_decay": 0.1}),
    ],
    ids=["AdamW", "admm, accumulation, clipping, bf16", "wrapper, cosine", "optimizer_cls_and_kwargs"],
)
def test_it_resumes_bit_for_bit(tmp_path: Path, make: Any, options: dict[str, Any]) -> None:
    """A checkpoint that is written right after an evaluation of u holds w and everything else."""
    options = {**options, "save_strategy": "steps", "save_steps": 4}

    def run(folder: Path, seed: int, checkpoint: str | None) -> Any:
        model = model_of(seed)
        optimizer = None if make is None else make(rk.param_groups(model, **SPLIT))
        trainer = trainer_of(folder, model, optimizer=optimizer, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    straight = run(tmp_path / "a", 0, None)
    resumed = run(tmp_path / "b", 1, str(tmp_path / "a" / "checkpoint-4"))
    assert equal(states(straight), states(resumed))
    assert not equal(all_bits(straight.model), all_bits(model_of()))
    assert 0.2 < rk.unwrap(resumed.optimizer).sparsity().share < 1


def test_what_is_evaluated_does_not_change_the_training(tmp_path: Path) -> None:
    found = []
    for evaluate in ("u", "w", "both"):
        trainer = trainer_of(tmp_path, model_of(), callbacks=[SparseWeightsCallback(evaluate)])
        trainer.train()
        found.append(states(trainer))
    plain = trainer_of(tmp_path, model_of(), callbacks=[])
    plain.train()
    assert all(equal(f, states(plain)) for f in found)


def test_it_trains_again(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model_of())
    trainer.train()
    first = all_bits(trainer.model)
    trainer.train()
    assert not equal(first, all_bits(trainer.model)) and "eval_sparsity" in trainer.evaluate()


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluate", ["u", "w", "both"])
def test_metrics(tmp_path: Path, evaluate: str) -> None:
    trainer = trainer_of(tmp_path, model_of(), callbacks=[SparseWeightsCallback(evaluate)])
    trainer.train()
    before = all_bits(trainer.model)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss_of(trainer, evaluate != "w"), rel=1e-5)
    assert loss_of(trainer, True) != pytest.approx(loss_of(trainer, False), rel=1e-5)
    assert metrics.get("eval_w_loss", -1) == pytest.approx(loss_of(trainer, False) if evaluate == "both" else -1)
    share = rk.unwrap(trainer.optimizer).sparsity().share
    assert metrics.get("eval_sparsity") == (None if evaluate == "w" else share)
    predicted = trainer.predict(trainer.eval_dataset)
    assert predicted.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
    assert equal(before, all_bits(trainer.model))


def test_logs(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model_of())
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 4
    for row in rows:
        assert row["L_beta"] == pytest.approx(row["loss"] + row["penalty_value"]) and row["penalty_value"] > 0
    assert rows[-1]["sparsity"] == rk.unwrap(trainer.optimizer).sparsity().share > 0.2
    assert [row["eval_sparsity"] for row in trainer.state.log_history if "eval_loss" in row] == [
        row["sparsity"] for row in rows
    ]


@pytest.mark.parametrize("where", ["compute_metrics", "the model"])
def test_an_error_leaves_w(tmp_path: Path, where: str) -> None:
    """Nothing of u is in the weights afterwards, and the training can go on."""
    fails, seen = [True], []

    def metrics(_: Any) -> dict[str, float]:
        if fails and where == "compute_metrics":
            raise ArithmeticError(where)
        return {}

    def forward(module: nn.Module, arguments: Any) -> None:
        if fails and where == "the model" and not module.training:
            seen.append(int((module.classifier.weight == 0).sum()))
            raise ArithmeticError(where)

    model = model_of()
    trainer = trainer_of(tmp_path, model, compute_metrics=metrics)
    model.register_forward_pre_hook(forward)
    with pytest.raises(ArithmeticError, match=where):
        trainer.train()
    assert seen == ([] if where == "compute_metrics" else [seen[0]]) and 0 not in seen
    straight = trainer_of(tmp_path, model_of(), callbacks=[SparseWeightsCallback(), _StopAt(2)], eval_strategy="no")
    straight.train()
    assert equal(all_bits(model), all_bits(straight.model))
    fails.clear()
    trainer.train()
    assert trainer.state.global_step == 8


class _StopAt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_schedulefree(tmp_path: Path) -> None:
    """The Trainer switches modes; what is evaluated and shipped is u of the average."""
    schedulefree = pytest.importorskip("schedulefree")
    model = model_of()
    inside = schedulefree.AdamWScheduleFree(rk.param_groups(model, named=False, **SPLIT), lr=1e-2)
    optimizer = rk.RVSMWrapper(inside, decoupled=False)
    trainer = trainer_of(
        tmp_path,
        model,
        optimizer=optimizer,
        callbacks=[SparseWeightsCallback("both", sparsify_at_end=True)],
        lr_scheduler_type="constant",
    )
    trainer.train()
    assert not optimizer.param_groups[0]["train_mode"]
    assert rk.sparsity(model).share > 0.2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of(trainer, False))


# ---- statistics of batch norms ---------------------------------------------------------------------------------------


class Normed(nn.Module):
    """A classifier of tokens with a batch norm, which notes the statistics that it is evaluated with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(32, 8), nn.Linear(8, 16)
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 2)
        self.seen: Any = None

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if not self.norm.training:
            self.seen = self.norm.running_mean.clone()
        logits = self.head(torch.relu(self.norm(self.hidden(self.embedding(input_ids).mean(1)))))
        loss = {} if labels is None else {"loss": nn.functional.cross_entropy(logits, labels)}
        return {**loss, "logits": logits}


def batches_of(rows: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    batches = [rows[k : k + 4] for k in range(0, len(rows), 4)]
    return [
        {"input_ids": torch.stack([r["input_ids"] for r in b]), "labels": torch.tensor([r["labels"] for r in b])}
        for b in batches
    ]


@pytest.mark.parametrize("given", [True, False], ids=["of the training", "a loader"])
def test_statistics_of_u(tmp_path: Path, given: bool) -> None:
    """They are there in each evaluation, those of w are back afterwards, and the training is the same."""
    found = []
    for options in ({}, {"recalibrate": True if given else batches_of(data(64)), "evaluate": "both"}):
        trainer = trainer_of(tmp_path, Normed(), callbacks=[SparseWeightsCallback(**options)])
        trainer.train()
        w = trainer.model.norm.running_mean.clone()
        assert "eval_sparsity" in trainer.evaluate()
        torch.testing.assert_close(trainer.model.norm.running_mean, w, rtol=0, atol=0)
        found.append({**states(trainer), "mean": bits(w)})
    assert equal(*found)
    torch.testing.assert_close(trainer.model.seen, w)  # "both": w was evaluated last
    trainer._sparse_weights.callback.evaluate = "u"
    trainer.evaluate()
    with rk.unwrap(trainer.optimizer).sparse_weights(trainer.model, recalibrate=batches_of(data(64))):
        expected = trainer.model.norm.running_mean.clone()
    torch.testing.assert_close(trainer.model.seen, expected)
    assert not torch.allclose(expected, w)


def test_statistics_of_u_at_the_end(tmp_path: Path) -> None:
    callback = SparseWeightsCallback(sparsify_at_end=True, recalibrate=True, batches=16)
    trainer = trainer_of(tmp_path, Normed(), callbacks=[callback])
    trainer.train()
    left = trainer.model.norm.running_mean.clone()
    rk.recalibrate(trainer.model, batches_of(data(64)))
    torch.testing.assert_close(left, trainer.model.norm.running_mean)


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["w", "u", "both"])
def test_saved(tmp_path: Path, save: str) -> None:
    trainer = trainer_of(
        tmp_path, model_of(), callbacks=[SparseWeightsCallback(save=save)], save_strategy="steps", save_steps=8
    )
    trainer.train()
    w = all_bits(trainer.model)
    with rk.unwrap(trainer.optimizer).sparse_weights():
        u = all_bits(trainer.model)
    trainer.save_model(str(tmp_path / "end"))
    assert equal(w, all_bits(trainer.model)) and not equal(u, w)
    for folder in (tmp_path / "end", tmp_path / "checkpoint-8"):
        saved = all_bits(transformers.BertForSequenceClassification.from_pretrained(folder))
        assert equal(saved, u if save == "u" else w)
        assert (folder / "sparse").is_dir() == (save == "both")
        if save == "both":
            assert equal(u, all_bits(transformers.BertForSequenceClassification.from_pretrained(folder / "sparse")))


def test_sparsified_at_the_end(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, model_of(), callbacks=[SparseWeightsCallback(sparsify_at_end=True)])
    trainer.train()
    shares = [row["sparsity"] for row in trainer.state.log_history if "loss" in row]
    trainer.save_model()
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    penalised = {row.name for row in rk.unwrap(trainer.optimizer).sparsity().rows}
    zeros = sum(int((p == 0).sum()) for name, p in saved.named_parameters() if name in penalised)
    assert zeros / sum(p.numel() for name, p in saved.named_parameters() if name in penalised) == shares[-1] > 0.2


def test_the_best_model(tmp_path: Path) -> None:
    """By the loss of u; what is loaded in the end is w of that step."""
    trainer = trainer_of(
        tmp_path, model_of(), save_strategy="steps", save_steps=2, load_best_model_at_end=True, learning_rate=1.0
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


# ---- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"lam": 4e-3}, {"lam": 0.02, "structure": "in_channels"}, {"lam": 4e-3, "maximize": True}],
    ids=["elements", "channels", "maximize"],
)
def test_optimizer_cls_and_kwargs(tmp_path: Path, options: dict[str, Any]) -> None:
    """What the Trainer makes is what ``rk.param_groups`` makes."""
    given = {"penalty": "l0", "beta": 20.0, **options}
    made = trainer_of(tmp_path, model_of(), optimizer_cls_and_kwargs=(rk.RVSMAdamW, given), learning_rate=1e-2)
    made.train()
    model = model_of()
    maximize = given.pop("maximize", False)
    by_hand = rk.RVSMAdamW(rk.param_groups(model, **given), lr=1e-2, weight_decay=0.0, maximize=maximize)
    expected = trainer_of(tmp_path, model, optimizer=by_hand)
    expected.train()
    assert equal(all_bits(made.model), all_bits(model))
    assert 0 < rk.unwrap(made.optimizer).sparsity().share == by_hand.sparsity().share < 1


def test_what_decays(tmp_path: Path) -> None:
    """As in a Trainer without us; the options of the optimizer go before the arguments."""
    for options, lr, decay in (({}, 1e-2, 0.1), ({"lr": 0.02, "weight_decay": 0.2}, 0.02, 0.2)):
        trainer = trainer_of(
            tmp_path,
            model_of(),
            optimizer_cls_and_kwargs=(rk.RVSM, {**SPLIT, **options}),
            learning_rate=1e-2,
            weight_decay=0.1,
        )
        for group in trainer.create_optimizer().param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                assert (group["penalty"] is None) == (p.dim() < 2 or "embeddings" in name), name
                assert group["weight_decay"] == (decay if p.dim() > 1 else 0.0), name
                assert group["lr"] == lr


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Invalid evaluate: 'v'"):
        SparseWeightsCallback("v")
    with pytest.raises(ValueError, match="Invalid save: None"):
        SparseWeightsCallback(save=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has a SparseWeightsCallback already"):
        trainer_of(tmp_path, model_of(), callbacks=[SparseWeightsCallback(), SparseWeightsCallback()])
    model = model_of()
    with pytest.raises(TypeError, match="no optimizer of rvsm_kernels in a AcceleratedOptimizer"):
        trainer_of(tmp_path, model, optimizer=torch.optim.AdamW(model.parameters())).train()
    late = trainer_of(tmp_path, model_of(), callbacks=[], optimizer_cls_and_kwargs=(rk.RVSMAdamW, SPLIT))
    late.add_callback(SparseWeightsCallback())
    with (
        pytest.warns(UserWarning, match="penalises biases and norms"),
        pytest.raises(ValueError, match="of all parameters alike before it knew the callback"),
    ):
        late.train()
    with pytest.raises(RuntimeError, match=r"callback\.attach\(trainer\)"):
        SparseWeightsCallback().on_init_end(None, None, None)


def test_added_and_removed(tmp_path: Path) -> None:
    callback = SparseWeightsCallback()
    trainer = trainer_of(tmp_path, model_of(), callbacks=[])
    assert "eval_sparsity" not in trainer.evaluate()
    callback.attach(trainer)
    callback.attach(trainer)
    assert trainer.callback_handler.callbacks.count(callback) == 1 and "eval_sparsity" in trainer.evaluate()
    trainer.remove_callback(callback)
    assert "eval_sparsity" not in trainer.evaluate()
    trainer.add_callback(callback)
    trainer.train()
    assert "sparsity" in next(row for row in trainer.state.log_history if "loss" in row)
    added = trainer_of(tmp_path, model_of(), callbacks=[])
    added.add_callback(SparseWeightsCallback())
    added.train()
    assert "eval_sparsity" in added.evaluate()
