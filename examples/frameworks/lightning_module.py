"""Sparse training in Lightning: a small convolutional network on digits.

    python examples/frameworks/lightning_module.py          # half a minute on two cores
    python examples/frameworks/lightning_module.py --smoke  # seconds

Validation sees u; the checkpoints hold w, from which a training resumes bit for bit.
"""

from __future__ import annotations

import argparse
import tempfile

import lightning
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import rvsm_kernels as rk
from digits import digits
from rvsm_kernels.integrations.lightning import SparseWeightsCallback


class Digits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> rk.RVSM:
        # lr * beta is the share of the gap between w and u that a step closes; what is below
        # sqrt(2 * lam / beta) = 0.05 is zero in u. With precision="16-mixed" and gradient_clip_val, Lightning needs
        # amp_scaling=False here.
        groups = rk.param_groups(self.net, penalty="l0", lam=2.5e-4, beta=0.2)
        return rk.RVSM(groups, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few epochs")
    options = parser.parse_args()
    lightning.seed_everything(0, verbose=False)
    train, test = digits()
    module = Digits()
    callback = SparseWeightsCallback(evaluate="u")
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=3 if options.smoke else 12,
            callbacks=[callback],
            default_root_dir=folder,
            log_every_n_steps=45,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        held_out = DataLoader(test, 512)
        trainer.fit(module, DataLoader(train, 32, shuffle=True), held_out)
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        of_u = trainer.validate(module, held_out, verbose=False)[0]["accuracy"]
        callback.evaluate = "w"
        of_w = trainer.validate(module, held_out, verbose=False)[0]["accuracy"]
        trainer.save_checkpoint(f"{folder}/last.ckpt")
    print(rk.unwrap(trainer.optimizers[0]).sparsity())
    print(
        f"L_beta {logged['L_beta']:.3f}, sparsity {logged['sparsity']:.1%}, accuracy of u {of_u:.1%}, of w {of_w:.1%}"
    )


if __name__ == "__main__":
    main()
