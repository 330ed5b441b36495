"""ResNet-20 as a module, and what pruning makes of it: fewer channels, or zeros in the same tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rvsm_kernels as rk

CHANNELS = 3
SIZE = 32
CLASSES = 10


class Block(nn.Module):
    """Two 3x3 convolutions; a 1x1 convolution on the shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.short.extend([nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)])

    def forward(self, x: Tensor) -> Tensor:
        """N x inputs x H x W to N x outputs x H/stride x W/stride."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class ResNet20(nn.Module):
    """The CIFAR-10 ResNet-20 with convolutions on its two changing shortcuts: the 65 tensors of ``cases.resnet20``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(CHANNELS, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for outputs, stride in ((16, 1), (32, 2), (64, 2)):
            for k in range(3):
                blocks.append(Block(inputs, outputs, stride if k == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images, N x 3 x 32 x 32, to logits, N x 10."""
        return self.linear(self.blocks(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def images(batch: int) -> Tensor:
    """Random images, the same each time."""
    return torch.randn(batch, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def dense() -> ResNet20:
    """The network in eval mode with random weights, scaled as He et al. do, the same each time.

    Where zeros lie decides about bytes, and shapes about times, not what the elements were trained for.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ResNet20()
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.kaiming_normal_(p)
    return model.eval()


def shrink(model: nn.Module, share: float) -> nn.Module:
    """A share of the channels of each coupled set removed, in place: those whose readers have the smallest norms."""
    x = images(1)
    groups = rk.param_groups(model, structure="coupled", example_inputs=x, penalty="l0", beta=1.0)
    optimizer = rk.RVSM(groups, lr=0.1)
    rk.SparsitySchedule(optimizer, share, of="groups", scope="tensor", end=1).step()
    rk.shrink(model, optimizer, example_inputs=x)
    return model


def zero(model: nn.Module, share: float) -> nn.Module:
    """Zeros in the place of the smallest weights of the convolutions and the linear layer, by one cut, in place."""
    groups = rk.param_groups(model, penalty="topk", budget="global", density=1 - share, beta=1.0)
    rk.RVSM(groups, lr=0.1).sparsify_()
    return model


def macs(model: nn.Module) -> int:
    """Multiplications with additions for one image."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images(1))
    return counter.get_total_flops() // 2
