"""Networks of many kinds, small, for coupled channels and their removal; no layer's size is written into a forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvsm_kernels.model.coupled import as_arguments, outputs_of


class Chain(nn.Module):
    """Convolution, norm and two linear layers behind a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 16, 10)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.tanh(self.norm(self.conv(x))), 2)
        return self.head(F.gelu(self.hidden(x.flatten(1))))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, by a convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        y += self.short(x)
        return F.relu(y)


class ResNet(nn.Module):
    """Residual sums: the channels of a stage are those of all its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 12, 2), BasicBlock(12, 12, 1))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.adaptive_avg_pool2d(self.blocks(self.stem(x)), 1).flatten(1))


class ResNeXt(nn.Module):
    """A grouped convolution within a bottleneck."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.reduce, self.bn1 = nn.Conv2d(10, 12, 1), nn.BatchNorm2d(12)
        self.grouped, self.bn2 = nn.Conv2d(12, 18, 3, padding=1, groups=3), nn.BatchNorm2d(18)
        self.expand, self.bn3 = nn.Conv2d(18, 10, 1), nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.bn2(self.grouped(F.relu(self.bn1(self.reduce(x))))))
        return self.head(F.relu(x + self.bn3(self.expand(y))).mean((2, 3)))


class DenseNet(nn.Module):
    """Concatenations: a layer reads parts of many."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * k) for k in range(3))
        self.layers = nn.ModuleList(nn.Conv2d(6 + 4 * k, 4, 3, padding=1) for k in range(3))
        self.transition = nn.Conv2d(18, 8, 1)
        self.head = nn.Linear(8 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(F.relu(norm(torch.cat(features, 1)))))
        x = F.avg_pool2d(F.silu(self.transition(torch.cat(features, 1))), 3)
        return self.head(x.flatten(1))


class Inverted(nn.Module):
    """MobileNet's block: pointwise, depthwise and pointwise convolutions, with a gate from the pooled channels."""

    def __init__(self, channels: int, inner: int, gated: bool) -> None:
        super().__init__()
        self.up, self.bn1 = nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.bn2 = nn.BatchNorm2d(inner)
        self.squeeze, self.excite = (nn.Conv2d(inner, 5, 1), nn.Conv2d(5, inner, 1)) if gated else (None, None)
        self.down, self.bn3 = nn.Conv2d(inner, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn2(self.depthwise(F.relu6(self.bn1(self.up(x))))))
        if self.squeeze is not None and self.excite is not None:
            y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return x + self.bn3(self.down(y))


class MobileNet(nn.Module):
    """Depthwise convolutions, one of them with a multiplier, and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Inverted(6, 10, False), Inverted(6, 12, True))
        self.twice = nn.Conv2d(6, 12, 3, groups=6)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.prelu(self.twice(self.blocks(self.stem(x))), torch.tensor(0.1)).amax((2, 3)))


class UNet(nn.Module):
    """Transposed convolutions and skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, stride=2, padding=1)
        self.middle, self.norm = nn.Conv2d(10, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.up = nn.ConvTranspose2d(12, 7, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=2)
        self.merge = nn.Conv2d(21, 6, 3, padding=1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.down1(x))
        b = F.relu(self.norm(self.middle(F.relu(self.down2(a)))))
        return self.out(F.relu(self.merge(torch.cat([self.up(b), a, self.grouped(b)], 1))))


class VGG(nn.Module):
    """Plain convolutions, pooling, and a flattening of blocks of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.PReLU(6), nn.MaxPool2d(2), nn.Conv2d(6, 9, 3, padding=1), nn.ELU(),
            nn.AdaptiveAvgPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(nn.Linear(36, 14), nn.ReLU(), nn.Dropout(), nn.Linear(14, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


class ConvNeXt(nn.Module):
    """LayerNorm over the channels of the residual stream: only the neurons of its blocks can leave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.full((8,), 0.5))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


class Shuffle(nn.Module):
    """ShuffleNet's unit: half of the channels pass, and the halves are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branch = nn.Sequential(
            nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1), nn.ReLU()
        )
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = x.shape
        return self.last(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)).mean((2, 3))


class Attention(nn.Module):
    """Heads by views of fused projections, with a norm within each head, and scaled_dot_product_attention."""

    def __init__(self, width: int, heads: int, kv_heads: int, size: int, norm: bool = True) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(width, heads * size), nn.Linear(width, 2 * kv_heads * size)
        self.q_norm = nn.RMSNorm(size) if norm else nn.Identity()
        self.out = nn.Linear(heads * size, width)
        self.size, self.fold = size, heads // kv_heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q_norm(self.q(x).view(b, t, -1, self.size)).transpose(1, 2)
        k, v = (y.view(b, t, -1, self.size).transpose(1, 2) for y in self.kv(x).chunk(2, -1))
        k, v = (y.repeat_interleave(self.fold, 1) for y in (k, v))
        angle = torch.arange(t)[:, None] / torch.arange(1, self.size + 1)
        k = k * angle.cos() + torch.cat([-k[..., self.size // 2 :], k[..., : self.size // 2]], -1) * angle.sin()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class Transformer(nn.Module):
    """Grouped queries, rotated keys, a gated MLP whose two halves are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.place = nn.Parameter(torch.randn(1, 9, 12))
        self.attention = Attention(12, 6, 3, 4)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.RMSNorm(12)
        self.up, self.down = nn.Linear(12, 2 * 10), nn.Linear(10, 12)
        self.head = nn.Linear(12, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place[:, : ids.shape[1]]
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.glu(self.up(self.norm2(x)), -1))
        return self.head(x)


class Architecture(NamedTuple):
    """A network and inputs for it."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def images() -> Tensor:
    """Four small images."""
    return torch.randn(4, 3, 8, 8)


def ids() -> Tensor:
    """Two sentences of seven words."""
    return torch.randint(11, (2, 7))


SMALL = [
    Architecture("chain", Chain, images),
    Architecture("resnet", ResNet, images),
    Architecture("resnext", ResNeXt, images),
    Architecture("densenet", DenseNet, lambda: torch.randn(4, 3, 9, 9)),
    Architecture("mobilenet", MobileNet, images),
    Architecture("unet", UNet, images),
    Architecture("vgg", VGG, images),
    Architecture("convnext", ConvNeXt, images),
    Architecture("shuffle", Shuffle, images),
    Architecture("transformer", Transformer, ids),
]


def _of_transformers(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        transformers = __import__("transformers")
        return getattr(transformers, model)(getattr(transformers, config)(**sizes))

    return build


_TEXT = {"vocab_size": 17, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}

TRANSFORMERS = [
    Architecture("bert", _of_transformers("BertForSequenceClassification", "BertConfig", **_TEXT), ids),
    Architecture(
        "gpt2", _of_transformers("GPT2LMHeadModel", "GPT2Config", vocab_size=17, n_embd=24, n_layer=2, n_head=4), ids
    ),
    Architecture("llama", _of_transformers("LlamaForCausalLM", "LlamaConfig", num_key_value_heads=2, **_TEXT), ids),
    Architecture(
        "qwen3",
        _of_transformers("Qwen3ForCausalLM", "Qwen3Config", num_key_value_heads=2, head_dim=8, **_TEXT),
        ids,
    ),
    Architecture("distilbert", _of_transformers(
        "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=17, dim=24, n_layers=2, n_heads=4,
        hidden_dim=20), ids),
    Architecture("phi3", _of_transformers(
        "Phi3ForCausalLM", "Phi3Config", num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        **_TEXT), ids),
    Architecture("t5", _of_transformers(
        "T5ForConditionalGeneration", "T5Config", vocab_size=17, d_model=24, d_kv=6, d_ff=20, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu"),
        lambda: {"input_ids": ids(), "decoder_input_ids": ids()}),
    Architecture("vit", _of_transformers(
        "ViTForImageClassification", "ViTConfig", hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=20, image_size=8, patch_size=4), images),
    Architecture("swin", _of_transformers(
        "SwinForImageClassification", "SwinConfig", image_size=16, patch_size=2, embed_dim=8, depths=[1, 2],
        num_heads=[2, 4], window_size=4), lambda: torch.randn(2, 3, 16, 16)),
    Architecture("resnet-hf", _of_transformers(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2],
        layer_type="bottleneck"), lambda: torch.randn(2, 3, 32, 32)),
    Architecture("mobilenet-v2", _of_transformers(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.25, min_depth=4, image_size=32),
        lambda: torch.randn(2, 3, 32, 32)),
    Architecture("convnext-hf", _of_transformers(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 12], depths=[1, 1], num_stages=2),
        lambda: torch.randn(2, 3, 32, 32)),
]  # fmt: skip
"""Architectures of transformers, from configurations; none was written for coupled channels."""


def randomise(model: nn.Module) -> nn.Module:
    """Let biases, norms' shifts and scales, and running statistics be nothing like what they begin as."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() <= 1:
                p.add_(torch.randn_like(p) * 0.3)
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.normal_()
            elif name.endswith("running_var"):
                b.uniform_(0.5, 2.0)
    return model


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """In eval mode."""
    args, kwargs = as_arguments(inputs)
    mode = model.training
    with torch.no_grad():
        found = [t.clone() for t in outputs_of(model.eval()(*args, **kwargs))]
    model.train(mode)
    return found


def close(a: list[Tensor], b: list[Tensor]) -> None:
    """Assert that outputs are the same but for rounding."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
