"""torch's attention with heads removed: nn.MultiheadAttention takes the size of a head from the width of its input."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """What :func:`rvsm_kernels.shrink` makes of an ``nn.MultiheadAttention`` that has lost heads.

    ``num_heads`` heads of ``head_dim`` each, on inputs of ``embed_dim``; parameters and calls are the original's.
    """

    @staticmethod
    def of(module: nn.MultiheadAttention, heads: int) -> None:
        """Let an attention whose projections have been cut be of this class."""
        module.__class__ = PrunedMultiheadAttention
        module.num_heads = heads
        module._qkv_same_embed_dim = False  # torch's fast path of encoder layers leaves such modules alone

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`torch.nn.MultiheadAttention.forward`; a mask for each head counts the heads that remain."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q, k)
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            attention = torch.softmax(scores if mask is None else scores + mask, -1)
            attention = F.dropout(attention, self.dropout, self.training)
            y = attention @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            out = out.squeeze(0)
        elif not self.batch_first:
            out = out.transpose(0, 1)
        if not need_weights:
            return out, None
        attention = attention.mean(1) if average_attn_weights else attention
        return out, attention if batched else attention.squeeze(0)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        """What is added to the scores (batch, heads, targets, sources), None where nothing is."""
        parts: list[Tensor] = []
        if attn_mask is not None:
            mask = _added(attn_mask, q.dtype)
            parts.append(mask.view(len(q), self.num_heads, *mask.shape[-2:]) if mask.dim() == 3 else mask)
        if padding is not None:
            parts.append(_added(padding, q.dtype).view(-1, 1, 1, padding.shape[-1]))
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return F.pad(total, (0, k.shape[-2] - total.shape[-1]))  # bias_k is seen by all


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of truth values as numbers to add."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
