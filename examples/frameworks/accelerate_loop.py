"""Sparse training in a loop of Accelerate: no module of ours is needed, ``rk.unwrap`` finds the optimizer.

python examples/frameworks/accelerate_loop.py          # half a minute on two cores
python examples/frameworks/accelerate_loop.py --smoke  # seconds
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

import rvsm_kernels as rk
from digits import digits


def accuracy(model: nn.Module, batches: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float() for x, y in batches]
    model.train()
    return float(torch.cat(right).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few epochs")
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    # lr * beta is the share of the gap between w and u that a step closes; what is below sqrt(2 * lam / beta) = 0.04
    # is zero in u.
    optimizer = rk.RVSMAdamW(rk.param_groups(model, penalty="l0", lam=8e-3, beta=10.0), lr=2e-3)
    train, test = digits()
    model, optimizer, batches, held_out = accelerator.prepare(
        model, optimizer, DataLoader(train, 32, shuffle=True), DataLoader(test, 512)
    )
    ours = rk.unwrap(optimizer)  # what accelerator.prepare returns has no sparse_weights()
    with tempfile.TemporaryDirectory() as folder:
        for epoch in range(3 if options.smoke else 40):
            for x, y in batches:
                with accelerator.accumulate(model):
                    loss = functional.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
            of_w = accuracy(model, held_out)
            with ours.sparse_weights(model):  # the parameters hold u, with exact zeros
                of_u = accuracy(model, held_out)
            share = ours.sparsity().share
            print(
                f"epoch {epoch}: loss {loss.item():.3f}, L_beta {loss.item() + float(ours.penalty_value()):.3f},"
                f" sparsity {share:.1%}, accuracy of u {of_u:.1%}, of w {of_w:.1%}"
            )
            accelerator.save_state(f"{folder}/state")  # w and the optimizer: load_state() resumes bit for bit
        with ours.sparse_weights(model):
            accelerator.save_model(model, f"{folder}/sparse")  # u, to ship
        saved = load_file(Path(folder, "sparse", "model.safetensors"))
    zeros = sum(int((t == 0).sum()) for t in saved.values())
    print(f"saved: {zeros:,} zeros among {sum(t.numel() for t in saved.values()):,} numbers")


if __name__ == "__main__":
    main()
