"""One training run of the benchmark on text: a small causal transformer learns the reference manual of Python.

The text is ``pydoc_data.topics``, what ``help("assignment")`` prints: 465,000 bytes of English and code that come with
every Python. Topics overlap, so each paragraph is taken once, where it comes first; about 374,000 bytes are left. A
token is a byte. The text depends on the version of Python: a result names the version and a digest of the bytes.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rvsm_kernels as rk

from .config import MissingPackage
from .training import Method, Run, Stopwatch

VOCABULARY = 256
BLOCKS = 40
"""The text is cut into so many blocks of the same length, each without a gap."""
HELD_OUT = 10
"""Every tenth block is for validation: the subject changes from block to block, so that several are needed."""
WEIGHT_DECAY = 0.1
WARM_UP = 0.05
LEAST_LR = 0.05
"""The learning rate rises over the first share of the steps, then falls along a cosine to a share of the highest."""
RAMP = 0.5
"""The share of the steps over which lam rises."""


def topics() -> dict[str, str]:
    """The reference manual, topic by topic.

    Raises:
        MissingPackage: this Python came without it.
    """
    try:
        from pydoc_data.topics import topics as found
    except ImportError as error:
        raise MissingPackage("pydoc_data cannot be imported: this Python came without its manual") from error
    return found


def manual() -> bytes:
    """The text: every paragraph of the manual once, topics in the order of their names, in UTF-8."""
    found = topics()
    paragraphs = dict.fromkeys(
        text for name in sorted(found) for text in (part.strip("\n") for part in found[name].split("\n\n")) if text
    )
    return "\n\n".join(paragraphs).encode()


@dataclass(frozen=True)
class Text:
    """Bytes to train and to validate with, as integers of 0 to 255.

    Attributes:
        train, validation: blocks x bytes; no block continues another.
        source: what the text is, in words; ``size`` in bytes, ``digest`` of the bytes.
    """

    train: Tensor
    validation: Tensor
    source: str
    size: int
    digest: str


def load() -> Text:
    """The manual, divided: every tenth of forty consecutive blocks is held out."""
    raw = manual()
    length = len(raw) // BLOCKS
    blocks = torch.frombuffer(bytearray(raw[: BLOCKS * length]), dtype=torch.uint8).long().view(BLOCKS, length)
    held_out = torch.arange(BLOCKS) % HELD_OUT == HELD_OUT // 2
    source = f"pydoc_data.topics of Python {platform.python_version()}, each paragraph once"
    return Text(blocks[~held_out], blocks[held_out], source, len(raw), hashlib.sha256(raw).hexdigest()[:16])


@dataclass(frozen=True)
class Size:
    """A model and its training.

    Attributes:
        context: bytes that a sample has, and the most that a prediction can see.
        batch: samples of a step.
        measured: how often the validation text is read on the way.
    """

    layers: int = 2
    width: int = 128
    heads: int = 4
    context: int = 64
    batch: int = 16
    steps: int = 800
    measured: int = 8


SMOKE_SIZE = Size(layers=2, width=32, heads=2, context=32, batch=4, steps=6, measured=2)


# ---- the model -------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm block: attention over what came before, then an MLP of four times the width, each added to x.

    No linear layer has a bias, so that a neuron whose row of ``mlp_in`` is zero puts out zero and can be taken out.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(samples, bytes, width) to the same."""
        samples, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(samples, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(read.transpose(1, 2).reshape(samples, length, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))


class Transformer(nn.Module):
    """A causal language model over bytes; the output layer is the embedding of the bytes, transposed.

    At the full size 435,456 parameters, of which 393,216 are weights of linear layers; 1,024 neurons.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, size.width)
        self.place = nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for p in self.blocks.parameters():
            if p.dim() == 2:  # of one size everywhere, so that a cut is as far from the weights of every layer
                nn.init.normal_(p, std=0.05)
        for embedding in (self.byte, self.place):
            nn.init.normal_(embedding.weight, std=0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes (samples, bytes) to the logits of the next ones (samples, bytes, 256)."""
        x = self.byte(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.byte.weight)


def loss(model: nn.Module, samples: Tensor) -> Tensor:
    """Mean cross-entropy in nats of every byte but the first of each sample (samples, context + 1)."""
    return F.cross_entropy(model(samples[:, :-1]).flatten(0, 1), samples[:, 1:].flatten())


# ---- a training ------------------------------------------------------------------------------------------------------


def windows(blocks: Tensor, context: int) -> Tensor:
    """Every block in samples of context + 1 bytes; the last byte of a sample is the first of the next."""
    return blocks.unfold(1, context + 1, context).flatten(0, 1)


def draw(blocks: Tensor, size: Size, generator: torch.Generator) -> Tensor:
    """A batch of samples of context + 1 bytes, from places that the generator chooses."""
    rows = torch.randint(len(blocks), (size.batch, 1), generator=generator)
    starts = torch.randint(blocks.shape[1] - size.context, (size.batch, 1), generator=generator)
    return blocks[rows, starts + torch.arange(size.context + 1)]


@torch.no_grad()
def bits_per_byte(model: nn.Module, samples: Tensor) -> float:
    """The mean loss of the samples in bits a byte."""
    parts = samples.split(64)
    total = sum(loss(model, part).item() * len(part) for part in parts)
    return total / len(samples) / math.log(2)


def param_groups(model: nn.Module, method: Method) -> list[dict[str, Any]]:
    """The penalised weights and the rest: embeddings, norms, linear layers that the method does not name."""
    if not method.layers:
        return rk.param_groups(model, **method.options)
    named = list(model.named_parameters())
    chosen = [(name, p) for name, p in named if name.endswith(method.layers)]
    rest = [(name, p) for name, p in named if not name.endswith(method.layers)]
    return [{"params": chosen, **method.options}, {"params": rest, "penalty": None}]


def optimizer_for(method: Method, model: nn.Module, engine: str) -> torch.optim.Optimizer:
    """The optimizer of a run; dense AdamW's two "engines" are torch's own two ways to step."""
    base: dict[str, Any] = {"lr": method.lr, "betas": (0.9, 0.99), "weight_decay": WEIGHT_DECAY}
    if method.dense:
        way = "fused" if engine == "native" else "foreach"
        return torch.optim.AdamW(model.parameters(), **base, **{way: True})
    return rk.RVSMAdamW(param_groups(model, method), **base, engine=engine)


def lr_factor(step: int, steps: int) -> float:
    """What the learning rate is multiplied by before step 0, 1, ..."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return LEAST_LR + (1 - LEAST_LR) * 0.5 * (1 + math.cos(math.pi * done))


def lam_factor(step: int, steps: int) -> float:
    """What lam is multiplied by before step 0, 1, ...: the cut of l0, which goes with its root, rises evenly.

    Weights that matter have grown above the cut before it reaches them; a full cut from the first step on would hold
    down all that begin below it.
    """
    return min(1.0, step / (RAMP * steps)) ** 2


def zero_neurons(model: nn.Module) -> float:
    """The share of zero rows of the layers into the MLPs."""
    rows = [row for row in rk.sparsity(model, group_dim=0).rows if row.name.endswith("mlp_in.weight")]
    return sum(row.zero_groups for row in rows) / sum(row.groups for row in rows)


def zero_weights(model: nn.Module) -> float:
    """The share of zeros among the weights of the linear layers; embeddings do not count."""
    rows = [row for row in rk.sparsity(model).rows if row.left is None]
    return sum(row.zeros for row in rows) / sum(row.numel for row in rows)


def measure(model: nn.Module, optimizer: torch.optim.Optimizer, samples: Tensor) -> dict[str, float]:
    """Bits per byte with w and with u, and the zeros of u."""
    bits_w = bits_per_byte(model, samples)
    if not isinstance(optimizer, rk.RVSMAdamW):
        return {"bits_w": bits_w, "bits_u": bits_w, "zeros": zero_weights(model), "zero_neurons": zero_neurons(model)}
    with optimizer.sparse_weights():
        return {
            "bits_w": bits_w,
            "bits_u": bits_per_byte(model, samples),
            "zeros": zero_weights(model),
            "zero_neurons": zero_neurons(model),
        }


def train(method: Method, engine: str, seed: int, text: Text, size: Size) -> Run:
    """Train from scratch; measure on the validation blocks on the way and at the end.

    ``train_s`` of the answer is the time of all steps with their gradients, without the measuring.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(size)
    places = torch.Generator().manual_seed(seed)
    optimizer = optimizer_for(method, model, engine)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, size.steps))
    held_out = windows(text.validation, size.context)
    every = max(1, size.steps // size.measured)
    watch, seconds, curve = Stopwatch(), 0.0, []
    for step in range(1, size.steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(model, draw(text.train, size, places)).backward()
        if not method.dense:
            optimizer.param_groups[0]["lam"] = method.options["lam"] * lam_factor(step - 1, size.steps)
        watch.step(optimizer)
        scheduler.step()
        seconds += time.perf_counter() - start
        if step % every == 0 or step == size.steps:
            curve.append({"step": step, **measure(model, optimizer, held_out)})
    times = {**watch.times(), "train_s": seconds}
    return {"method": method.name, "engine": engine, "seed": seed, **times, "curve": curve}
