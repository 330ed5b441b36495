"""A GPT-2-shaped language model, sharded by FSDP2, trained sparse with RVSMAdamW; checkpoints move between ranks.

    torchrun --standalone --nproc-per-node 2 examples/gpt2.py                   # a few minutes on two cores
    torchrun --standalone --nproc-per-node 2 examples/gpt2.py --out runs/gpt2   # checkpoints; go on with --resume
    torchrun --standalone --nproc-per-node 3 examples/gpt2.py --out runs/gpt2 --resume
    python examples/gpt2.py --smoke                                             # one process, seconds

Neurons of the MLPs go in groups, whose norms cross the ranks in one message of a step; the other weights go one by one.
The text is the reference manual that comes with Python. ``--offload`` keeps parameters and states on the CPU, where the
step is done too. At the end the shares of the time are printed, and ``sparse.pt`` holds the model with exact zeros.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deep.missing import explain

try:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch import Tensor, nn
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
    from tqdm import tqdm

    import rvsm_kernels as rk
    from bench import text
except ModuleNotFoundError as error:
    explain(error, __name__)
    raise

NEURONS: dict[str, Any] = {"penalty": "l0", "lam": 0.034, "beta": 20.0, "group_dim": 1}
"""Of the layers into the MLPs, whose weights are (inputs, neurons) in this model. lam is that of one input: the squares
of the norms, and with them those of the cut, go with their number."""
WEIGHTS: dict[str, Any] = {"penalty": "l0", "lam": 9e-3, "beta": 20.0}
"""Of all other linear layers."""


@dataclass(frozen=True)
class Settings(text.Size):
    """A model and its training: ``batch`` is of all ranks together.

    Attributes:
        every: steps between two checkpoints.
    """

    batch: int = 24
    steps: int = 400
    every: int = 100
    lr: float = 4e-3


SIZES = {
    "small": Settings(),
    "smoke": Settings(layers=2, width=48, heads=4, context=32, batch=12, steps=30, every=10),
    "gpt2": Settings(layers=12, width=768, heads=12, context=1024, batch=32, steps=20000, every=1000, lr=6e-4),
}


# ---- the model -------------------------------------------------------------------------------------------------------


def model_of(settings: Settings) -> nn.Module:
    """GPT-2 over bytes, from a configuration: the same weights on every rank."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=text.VOCABULARY,
            n_positions=settings.context,
            n_embd=settings.width,
            n_layer=settings.layers,
            n_head=settings.heads,
            initializer_range=0.05,  # of one size everywhere, so that a cut is as far from the weights of every layer
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def shard(model: nn.Module, offload: bool) -> None:
    """Divide the parameters among the ranks, block by block; the optimizer is made afterwards."""
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available())} if offload else {}
    for block in model.transformer.h:
        fully_shard(block, **options)
    fully_shard(model, **options)


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Neurons, the other weights of linear layers, and the rest, which is not penalised."""
    weights, rest = rk.param_groups(model, **WEIGHTS)
    neurons = [(name, p) for name, p in weights["params"] if name.endswith("mlp.c_fc.weight")]
    others = [(name, p) for name, p in weights["params"] if not name.endswith("mlp.c_fc.weight")]
    return [{"params": neurons, **NEURONS}, {**weights, "params": others}, rest]


def loss(model: nn.Module, samples: Tensor) -> Tensor:
    """Mean cross-entropy in nats of every byte but the first of each sample."""
    logits = model(samples[:, :-1]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: nn.Module, samples: Tensor) -> float:
    """The mean loss of the samples in bits a byte. All ranks call it with the same samples."""
    parts = samples.split(64)
    total = sum(loss(model, part).item() * len(part) for part in parts)
    return total / len(samples) / math.log(2)


# ---- the training ----------------------------------------------------------------------------------------------------


@dataclass
class Times:
    """Seconds of the steps of the optimizer and of all else."""

    step: float = 0.0
    rest: float = 0.0

    def text(self) -> str:
        return f"{self.step / max(self.step + self.rest, 1e-9):.1%} of the time is the optimizer's"


@dataclass
class Run:
    """A model, its optimizer, and how far they are."""

    settings: Settings
    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: text.Text
    device: torch.device
    done: int = 0
    times: Times = field(default_factory=Times)

    def train(self, steps: int) -> Iterator[float]:
        """Train up to a step; gives the loss of this rank after each one."""
        settings = self.settings
        ranks, rank = dist.get_world_size(), dist.get_rank()
        lams = [NEURONS["lam"] * settings.width, WEIGHTS["lam"]]
        while self.done < steps:
            start = time.perf_counter()
            # All ranks draw the batch of the step and take their share of it, so that it does not depend on them.
            generator = torch.Generator().manual_seed(self.done)
            batch = text.draw(self.data.train, settings, generator)
            mine = batch.tensor_split(ranks)[rank].to(self.device)
            self.optimizer.zero_grad()
            # The gradients of the ranks are averaged; ranks may have shares of different sizes.
            value = loss(self.model, mine) * (len(mine) * ranks / len(batch))
            value.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            for group in self.optimizer.param_groups:
                group["lr"] = settings.lr * text.lr_factor(self.done, settings.steps)
            if isinstance(self.optimizer, rk.RVSMAdamW):
                for group, lam in zip(self.optimizer.param_groups, lams, strict=False):
                    group["lam"] = lam * text.lam_factor(self.done, settings.steps)
            before = time.perf_counter()
            self.optimizer.step()
            end = time.perf_counter()
            self.times.step += end - before
            self.times.rest += before - start
            self.done += 1
            yield value.item()

    def measure(self) -> dict[str, float]:
        """Bits per byte with w and with u on text that was held out, and the zeros of u."""
        samples = text.windows(self.data.validation, self.settings.context).to(self.device)[:512]
        found = {"bits_w": bits_per_byte(self.model, samples)}
        if isinstance(self.optimizer, rk.RVSMAdamW):
            with self.optimizer.sparse_weights():
                found["bits_u"] = bits_per_byte(self.model, samples)
            rows = self.optimizer.sparsity().rows
            neurons = [row for row in rows if row.name.endswith("mlp.c_fc.weight")]
            found["zeros"] = sum(row.zeros for row in rows) / sum(row.numel for row in rows)
            found["zero_neurons"] = sum(row.zero_groups for row in neurons) / sum(row.groups for row in neurons)
        return found

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        weights, states = get_state_dict(self.model, self.optimizer)
        return {"model": weights, "optimizer": states, "done": torch.tensor(self.done)}

    def save(self, out: Path) -> None:
        """Each rank writes its shards; the newest checkpoint is named when all of it is there."""
        dcp.save(self._state(), checkpoint_id=out / f"step-{self.done}")
        if dist.get_rank() == 0:
            (out / "newest.tmp").write_text(f"step-{self.done}\n")
            (out / "newest.tmp").replace(out / "newest")

    def resume(self, out: Path) -> None:
        """Go on from the newest checkpoint, which may be of another number of ranks."""
        state = self._state()
        dcp.load(state, checkpoint_id=out / (out / "newest").read_text().strip())
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.done = int(state["done"])

    def save_sparse(self, out: Path) -> None:
        """The whole model with u in the place of w, on rank 0."""
        assert isinstance(self.optimizer, rk.RVSMAdamW)
        with self.optimizer.sparse_weights():
            whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if dist.get_rank() == 0:
                torch.save(whole, out / "sparse.pt")


def run(options: argparse.Namespace) -> dict[str, float]:
    """What the script does on each rank."""
    settings = SIZES["smoke" if options.smoke else options.size]
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    model = model_of(settings).to(device)
    shard(model, options.offload)
    assert isinstance(model, FSDPModule)
    base: dict[str, Any] = {"lr": settings.lr, "betas": (0.9, 0.99), "weight_decay": text.WEIGHT_DECAY}
    if options.optimizer == "rvsm":
        optimizer: torch.optim.Optimizer = rk.RVSMAdamW(param_groups(model), **base)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **base, fused=True)
    state = Run(settings, model, optimizer, text.load(), device)
    if options.resume:
        state.resume(options.out)
    last = min(settings.steps, options.stop_after or settings.steps)
    leads = dist.get_rank() == 0
    bar = tqdm(total=last, initial=state.done, disable=not leads, unit="step")
    for value in state.train(last):
        bar.set_postfix(loss=f"{value:.3f}", refresh=False)
        bar.update()
        if options.out and (state.done % settings.every == 0 or state.done == last):
            state.save(options.out)
    bar.close()
    found = state.measure()
    if options.out and options.optimizer == "rvsm":
        state.save_sparse(options.out)
    if leads:
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{parameters:,} parameters on {dist.get_world_size()} ranks, {state.done} steps")
        print(", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        print(state.times.text())
    return found


def main() -> None:
    """Parse the arguments and run on this rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "gpt2"), default="small", help="gpt2: 124 M, for GPUs")
    parser.add_argument("--smoke", action="store_true", help="shows that it runs")
    parser.add_argument("--optimizer", choices=("rvsm", "adamw"), default="rvsm", help="adamw: torch's, fused, dense")
    parser.add_argument("--offload", action="store_true", help="parameters, states and the step on the CPU")
    parser.add_argument("--out", type=Path, help="a folder for checkpoints and the sparse model")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="end there, as if interrupted")
    options = parser.parse_args()
    if options.resume and not (options.out and (options.out / "newest").exists()):
        parser.error("--resume needs --out with a folder that holds a checkpoint")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(name, value)  # without torchrun: one process
    os.environ.setdefault("MASTER_PORT", "0")
    # With parameters on the CPU, clipping and norms of groups send messages there too.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        run(options)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
