"""param_groups on the models of transformers, tiny ones from configurations; docs/groups.md says what is taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rvsm_kernels as rk

tf = pytest.importorskip("transformers", minversion="5.0")

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 32, "bos_token_id": 0}
GPT |= {"eos_token_id": 0}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SIZES, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
GROUPED = {**TEXT, "num_key_value_heads": 2}
MOE = {**GROUPED, "num_experts_per_tok": 2}
QWEN = {**MOE, "num_experts": 4, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {**TEXT, **LATENT, "num_key_value_heads": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK |= {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
WHISPER: dict[str, Any] = {"vocab_size": 100, "d_model": 32, "max_source_positions": 50, "max_target_positions": 50}
for _part in ("encoder", "decoder"):
    WHISPER |= {f"{_part}_layers": 2, f"{_part}_attention_heads": 4, f"{_part}_ffn_dim": 64}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "nn.TransformerEncoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2),
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "OpenAI-GPT": lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(**GPT)),
    "GPT-NeoX": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**TEXT)),
    "Bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT)),
    "T5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, decoder_start_token_id=0)
    ),
    "ViT": lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=32, patch_size=8)),
    "Whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER)),
    "Llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GROUPED)),
    "Mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE, num_local_experts=4)),
    "Qwen2-MoE": lambda: tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=32)),
    "Qwen3-MoE": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**QWEN, head_dim=8)),
    "GPT-OSS": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**MOE, num_local_experts=4, head_dim=8)),
    "DeepSeek-V3": lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**DEEPSEEK)),
}

each = pytest.mark.parametrize("name", MODELS)


def taken(model: nn.Module, structure: str | None) -> dict[str, dict[str, Any]]:
    """The group of each weight that is penalised, by its name."""
    groups = rk.param_groups(model, structure=structure, penalty="l0", lam=1e-3, beta=0.5)
    return {name: g for g in groups if g["penalty"] is not None for name, _ in g["params"]}


def share(model: nn.Module, structure: str | None) -> float:
    """Of the weights of two dimensions and more that are no embeddings, biases aside."""
    names = taken(model, structure)
    rows = [row for row in rk.sparsity(model).rows if row.left != "an embedding"]
    return sum(row.numel for row in rows if row.name in names) / sum(row.numel for row in rows)


@each
def test_shares_are_those_of_the_docs(name: str) -> None:
    """In per cent: of the weights, then of those that are heads."""
    docs = (Path(__file__).parents[2] / "docs" / "groups.md").read_text()
    row = re.search(rf"^\| {re.escape(name)} \| ([\d.]+) \| ([\d.]+) \|", docs, re.MULTILINE)
    assert row is not None, f"docs/groups.md has no row of {name}"
    model = MODELS[name]()
    assert [f"{100 * share(model, structure):.1f}" for structure in (None, "heads")] == list(row.groups())


@each
def test_embeddings_tied_or_not_stay_dense(name: str) -> None:
    model = MODELS[name]()
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    names = taken(model, None)
    assert not any(id(p) in embedded for n, p in model.named_parameters() if n in names)


# ---- experts ---------------------------------------------------------------------------------------------------------

EXPERTS = {
    # the weights of (experts, outputs, inputs) unless they are swapped
    "Mixtral": ("layers.0.mlp.experts", False),
    "Qwen2-MoE": ("layers.0.mlp.experts", False),
    "Qwen3-MoE": ("layers.0.mlp.experts", False),
    "DeepSeek-V3": ("layers.1.mlp.experts", False),
    "GPT-OSS": ("layers.0.mlp.experts", True),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_channels_of_experts(engine: str, name: str) -> None:
    """An expert does not hear an input channel that is zero, and does not speak on an output channel that is."""
    at, swapped = EXPERTS[name]
    model = MODELS[name]()
    prefix, experts = f"model.{at}", model.model.get_submodule(at)
    rows, columns = ((0, 2), (0, 1)) if swapped else ((0, 1), (0, 2))
    for structure, dims in (("in_channels", columns), ("out_channels", rows), ("layers", (0,))):
        found = taken(model, structure)
        for weight in ("gate_up_proj", "down_proj"):
            assert found[f"{prefix}.{weight}"]["group_dim"] == dims, (structure, weight)
        optimizer = rk.RVSM(rk.param_groups(model, structure=structure, penalty="l0"), lr=0.1, engine=engine)
        counted = {row.name: row.groups for row in optimizer.sparsity().rows}
        shape = experts.gate_up_proj.shape
        assert counted[f"{prefix}.gate_up_proj"] == torch.Size([shape[d] for d in dims]).numel()

    def run(x: Tensor) -> Tensor:
        index = torch.arange(4).remainder(len(experts.gate_up_proj)).reshape(4, 1)
        return experts(x, index, torch.ones(4, 1))

    with torch.no_grad():
        for p in experts.parameters():
            nn.init.normal_(p, std=0.2)
        x = torch.randn(4, 32)
        changed = x.clone()
        changed[:, 5] += 1
        assert not torch.allclose(run(x), run(changed))
        experts.gate_up_proj.select(columns[1], 5).zero_()
        torch.testing.assert_close(run(x), run(changed))
        experts.down_proj.select(rows[1], 7).zero_()
        bias = getattr(experts, "down_proj_bias", torch.zeros(len(experts.down_proj), 32))
        torch.testing.assert_close(run(x)[:, 7], bias[:4, 7])


def test_routers_are_taken_when_included() -> None:
    model = MODELS["Mixtral"]()
    assert "model.layers.0.mlp.gate.weight" not in taken(model, None)
    assert "a router" in next(t for t in rk.describe(model).splitlines() if t.startswith("model.layers.0.mlp.gate."))
    router = type(model.model.layers[0].mlp.gate)
    (group, _) = rk.param_groups(model, include=(router,), penalty="l0")
    assert [name for name, _ in group["params"]] == [f"model.layers.{k}.mlp.gate.weight" for k in range(2)]


# ---- heads -----------------------------------------------------------------------------------------------------------

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "o")


def arguments(name: str) -> dict[str, Any]:
    ids = torch.arange(1, 13).reshape(2, 6)
    if name == "nn.TransformerEncoder":
        return {"src": torch.randn(2, 6, 32)}
    if name == "ViT":
        return {"pixel_values": torch.randn(1, 3, 32, 32)}
    if name == "Whisper":
        return {"input_features": torch.randn(1, 80, 100), "decoder_input_ids": ids[:1]}
    return {"input_ids": ids, **({"decoder_input_ids": ids} if name == "T5" else {})}


def result(model: nn.Module, given: dict[str, Any]) -> Tensor:
    out = model(**given)
    return out if isinstance(out, Tensor) else out.logits


@each
def test_a_head_is_a_group(name: str) -> None:
    """Where the columns of a head are zero in the output projections, its rows of q, k and v do not matter."""
    model, given = MODELS[name]().eval(), arguments(name)
    groups = taken(model, "heads")
    weights = {n: p for n, p in model.named_parameters() if n in groups}
    block = groups[next(n for n in groups if n.split(".")[-2] in OUTPUTS)]["group_block"]
    heads = 4
    of_head = 2 if any("k_proj" in n and p.shape[0] == 2 * block for n, p in weights.items()) else 1  # grouped queries

    def parts(n: str, p: Tensor) -> list[Tensor]:
        """The first head of q, k or v, or of all three in a stacked weight."""
        size, dim = groups[n]["group_block"], groups[n]["group_dim"]
        count = p.shape[dim] // size
        mine = of_head if count == heads else 1
        if count < 3 * heads:
            return [p.narrow(dim, 0, mine * size)]
        if "query_key_value" in n:  # q, k and v of each head together
            return [p.narrow(dim, 0, 3 * size)]
        return [p.narrow(dim, k * heads * size, size) for k in range(3)]

    def perturb() -> None:
        for n, p in weights.items():
            if n.split(".")[-2] not in OUTPUTS:
                for part in parts(n, p):
                    part.add_(torch.randn_like(part))

    with torch.no_grad():
        for p in weights.values():
            nn.init.normal_(p, std=0.3)
        before = result(model, given)
        perturb()
        assert not torch.allclose(before, result(model, given), atol=1e-4)
        for n, p in weights.items():
            if n.split(".")[-2] in OUTPUTS:
                p.narrow(groups[n]["group_dim"], 0, of_head * block).zero_()
        before = result(model, given)
        perturb()
        torch.testing.assert_close(before, result(model, given), atol=1e-5, rtol=1e-4)


@each
def test_training_removes_whole_heads(name: str) -> None:
    """A step on the groups, and each block of u is zero or has no zero."""
    model = MODELS[name]()
    groups = rk.param_groups(model, structure="heads", penalty="topk", density=0.5, lam=1.0, beta=1.0)
    optimizer = rk.RVSMAdamW(groups, lr=1e-3)
    result(model.train(), arguments(name)).square().mean().backward()
    optimizer.step()
    with optimizer.sparse_weights():
        for group in optimizer.param_groups[:-1]:
            for p in group["params"]:
                blocks = p.detach().split(group["group_block"], group["group_dim"])
                assert sum(bool(b.count_nonzero() == 0) for b in blocks) == len(blocks) // 2
                assert all(b.count_nonzero() in (0, b.numel()) for b in blocks)
    report = optimizer.sparsity()
    assert report.total.zero_groups * 2 == report.total.groups
