"""The networks of the papers' deep experiments.

LeNet-5, VGG-16 with batch norm, ResNet-18 in its CIFAR form, pre-activation ResNets of depth 6n + 2 with and without
skip connections, and EnResNet: several such nets with Gaussian noise after each residual add, trained jointly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

NOISE = 0.1
"""EnResNet's noise in units of the standard deviation of what it is added to."""


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max pooling: two 5x5 convolutions (6, 16 channels), then 400-120-84-classes.

    Its convolutions have channels + 6 input channels: 7 on grey images, the "7 channels" of the papers.

    Args:
        size: height and width of the images, 28 (padded by 2 in the first convolution, as in the original) or 32.
    """

    def __init__(self, channels: int = 1, classes: int = 10, size: int = 28) -> None:
        super().__init__()
        if size not in (28, 32):
            raise ValueError(f"LeNet-5 takes images of 28x28 or 32x32, not {size}x{size}")
        self.conv1 = nn.Conv2d(channels, 6, 5, padding=2 if size == 28 else 0)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(400, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images, N x channels x size x size, to logits, N x classes."""
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.relu(self.fc1(x.flatten(1)))
        return self.fc3(torch.relu(self.fc2(x)))


class VGG16(nn.Sequential):
    """VGG-16 for 32x32 images: 13 3x3 convolutions, each with batch norm and ReLU, five poolings, one linear layer."""

    WIDTHS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)  # 0: max pooling

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        layers: list[nn.Module] = []
        for width in self.WIDTHS:
            if width:
                # The norm takes off the mean: a bias would do nothing.
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        # Adaptive, so that images of more than 32x32 work too.
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """conv-norm-relu-conv-norm, the shortcut added, relu (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = (
            nn.Identity() if same else nn.Sequential(_shortcut(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps to feature maps."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images: a 3x3 convolution, then four stages of two blocks with 64, 128, 256, 512 channels."""

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks, inputs = [], 64
        for outputs, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            blocks += [BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images, N x channels x H x W, to logits, N x classes."""
        x = self.blocks(torch.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


class Noise(nn.Module):
    """x + coefficient * std(x) * N(0, 1), the standard deviation over the whole batch; in evaluation too.

    It is what the Feynman-Kac formula asks for: the diffusion term of the convection-diffusion equation (002, (5)).
    The noise comes from torch's own generator of x's device.
    """

    def __init__(self, coefficient: float = NOISE) -> None:
        super().__init__()
        if not coefficient >= 0:
            raise ValueError(f"noise coefficient must be at least 0, not {coefficient}")
        self.coefficient = coefficient

    def forward(self, x: Tensor) -> Tensor:
        """Any tensor of two elements or more to one of its shape."""
        return x + self.coefficient * x.std() * torch.randn_like(x)

    def extra_repr(self) -> str:
        """The coefficient."""
        return f"coefficient={self.coefficient}"


class PreActBlock(nn.Module):
    """norm-relu-conv twice, the shortcut added, noise or none after (He et al., 2016).

    A shortcut that changes the shape is a 1x1 convolution of the activated input, as in the released code.

    Args:
        skip: False leaves the shortcut out; the block is then no residual block any more.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, skip: bool, noise: float | None) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.skip = skip
        reshapes = skip and (stride != 1 or inputs != outputs)
        self.shortcut = _shortcut(inputs, outputs, stride) if reshapes else None
        self.noise: nn.Module = nn.Identity() if noise is None else Noise(noise)

    def forward(self, x: Tensor) -> Tensor:
        """Feature maps to feature maps."""
        activated = torch.relu(self.bn1(x))
        out = self.conv2(torch.relu(self.bn2(self.conv1(activated))))
        if self.skip:
            out = out + (x if self.shortcut is None else self.shortcut(activated))
        return self.noise(out)


class PreActResNet(nn.Module):
    """A pre-activation ResNet of depth 6n + 2: three stages of n blocks with width, 2 and 4 times width channels.

    Depth 20 at width 16 on colour images has 272,282 parameters, 270,256 of them in convolutions of 675 input channels.

    Args:
        depth: 8, 14, 20, 26, ...
        noise: the coefficient of :class:`Noise` after each residual add; None for no noise.
    """

    def __init__(
        self,
        depth: int = 20,
        channels: int = 3,
        classes: int = 10,
        *,
        width: int = 16,
        skip: bool = True,
        noise: float | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"a pre-activation ResNet has depth 6n + 2: 8, 14, 20, ..., not {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, not {width}")
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        blocks, inputs = [], width
        for stage in range(3):
            outputs = width << stage
            for block in range((depth - 2) // 6):
                stride = 2 if stage and not block else 1
                blocks.append(PreActBlock(inputs, outputs, stride, skip, noise))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(inputs)
        self.linear = nn.Linear(inputs, classes)
        self.reset_convolutions()

    def reset_convolutions(self) -> None:
        """First weights as in the released code: thresholds are absolute, so their size matters."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images, N x channels x H x W, to logits, N x classes."""
        x = torch.relu(self.bn(self.blocks(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


class Ensemble(nn.Module):
    """The mean of the members' logits: one model, one loss, so that the members are trained jointly."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor:
        """Images, N x channels x H x W, to logits, N x classes."""
        return torch.stack([member(x) for member in self.members]).mean(0)


class Normalized(nn.Module):
    """A net behind the normalisation of its images, so that an attack works on images in [0, 1].

    Args:
        mean, std: one number per channel.
    """

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.net = net
        # Not part of a checkpoint: they belong to the data.
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Images in [0, 1], N x channels x H x W, to logits, N x classes."""
        return self.net((x - self.mean) / self.std)


NAMES = "lenet5, vgg16, resnet18, resnetD, enNresnetD (D = 8, 14, 20, 26, ...; both also with -noskip)"
_PREACT = re.compile(r"(?:en([1-9][0-9]?))?resnet([0-9]{1,3})(-noskip)?")


def build(
    name: str, channels: int = 3, classes: int = 10, size: int = 32, *, width: int = 16, noise: float = NOISE
) -> nn.Module:
    """The model of a name.

    Args:
        name: one of :data:`NAMES`.
        size: height and width of the images.
        width: channels of the first stage of a pre-activation ResNet.
        noise: EnResNet's coefficient.

    Raises:
        ValueError: an unknown name, a depth that is not 6n + 2, images that the model cannot take.
    """
    if name == "lenet5":
        return LeNet5(channels, classes, size)
    if name == "vgg16":
        if size < 32:
            raise ValueError(
                f"vgg16 halves its images five times and needs 32x32, not {size}x{size}: pad them (--pad 32)"
            )
        return VGG16(channels, classes)
    if name == "resnet18":
        return ResNet18(channels, classes)
    found = _PREACT.fullmatch(name)
    if not found:
        raise ValueError(f"unknown model {name!r}; there are {NAMES}")
    members, depth, noskip = found.groups()

    def member() -> PreActResNet:
        coefficient = None if members is None else noise
        return PreActResNet(int(depth), channels, classes, width=width, skip=noskip is None, noise=coefficient)

    return member() if members is None else Ensemble([member() for _ in range(int(members))])
