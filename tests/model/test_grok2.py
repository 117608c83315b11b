"""Grok-2's network against a second one, written after its published inference code by itself.

The second one is for this test alone: everything in fp64, every expert run on every token, every logit in memory. It
has what Grok-2's network has beyond Grok-1's as SGLang computes it (``srt/models/grok.py`` with its router and Triton
attention kernels): a dense network beside the experts, the sum of both over the square root of two; router, attention
and output logits capped; gates that are not rescaled; attention warmer from a position on.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from modelworks.model.decoder import Decoder, Losses
from modelworks.spec.model import ModelSpec

SIZES: dict[str, Any] = {
    "layers": 2,
    "hidden": 64,
    "ffn_hidden": 96,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "vocab": 80,
    "context": 64,
    "activation": "gelu",
    "norm_placement": "sandwich",
    "rope_base": 208_533_496.0,
    "attention_softcap": 3.0,
    "attention_temperature_length": 12,
    "output_softcap": 5.0,
    "embedding_multiplier": 8.0,
    "output_multiplier": 0.5,
    "moe": {"experts": 4, "top_k": 2, "expert_hidden": 48, "residual": True, "router_softcap": 1.0},
}


def network(**changed: Any) -> Decoder:
    decoder = Decoder(ModelSpec.model_validate(SIZES | changed))
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif "router" in name or "wq" in name or "wk" in name or "head" in name:
                parameter.mul_(4.0)  # So that the caps matter.
    return decoder


def reference(decoder: Decoder, tokens: Tensor) -> Tensor:
    """The logits (T, V) of one sequence (T)."""
    spec, weights = decoder.spec, {name: value.detach().double() for name, value in decoder.state_dict().items()}
    moe = spec.moe
    assert moe is not None
    assert moe.router_softcap is not None
    positions = torch.arange(len(tokens), dtype=torch.float64)
    angles = positions[:, None] / spec.rope_base ** (torch.arange(0, spec.head_dim, 2).double() / spec.head_dim)
    turn = torch.polar(torch.ones_like(angles), angles)  # (T, D / 2)
    warmth = [math.log2(p) / math.log2(12) if p > 12 else 1.0 for p in range(len(tokens))]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt() * weights[name]

    def capped(x: Tensor, cap: float) -> Tensor:
        return cap * torch.tanh(x / cap)

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def heads(x: Tensor, name: str, count: int, turned: bool) -> Tensor:
        split = (x @ weights[name].T).view(len(tokens), count, 2, spec.head_dim // 2)
        if not turned:
            return split.flatten(2)
        complex_heads = torch.complex(split[:, :, 0], split[:, :, 1]) * turn[:, None]
        return torch.cat((complex_heads.real, complex_heads.imag), -1)  # (T, heads, D)

    x = weights["embed.weight"][tokens] * spec.embedding_multiplier
    for layer in range(spec.layers):
        block = f"blocks.{layer}."
        normed = norm(x, block + "attn_norm.weight")
        queries = heads(normed, block + "attn.wq.weight", spec.heads, True)
        keys = heads(normed, block + "attn.wk.weight", spec.kv_heads, True)
        values = heads(normed, block + "attn.wv.weight", spec.kv_heads, False)
        attended = []
        for place in range(len(tokens)):
            for head in range(spec.heads):
                group = head // (spec.heads // spec.kv_heads)
                logits = keys[: place + 1, group] @ queries[place, head] * spec.head_dim**-0.5
                shares = (capped(logits, spec.attention_softcap or 0.0) * warmth[place]).softmax(0)
                attended.append(shares @ values[: place + 1, group])
        mixed = torch.stack(attended).view(len(tokens), -1) @ weights[block + "attn.wo.weight"].T
        x = x + norm(mixed, block + "attn_post_norm.weight")
        normed = norm(x, block + "ffn_norm.weight")
        gates = capped(normed @ weights[block + "moe.router.weight"].T, moe.router_softcap).softmax(-1)
        chosen = gates >= gates.topk(moe.top_k).values[:, -1:]
        out = torch.zeros_like(x)
        for expert in range(moe.experts):
            gate, up, down = (weights[f"{block}moe.{part}"][expert] for part in ("gate", "up", "down"))
            out += (gates * chosen)[:, expert, None] * ((gelu(normed @ gate.T) * (normed @ up.T)) @ down.T)
        gate, up, down = (weights[f"{block}mlp.{part}.weight"] for part in ("gate", "up", "down"))
        out = (out + (gelu(normed @ gate.T) * (normed @ up.T)) @ down.T) / 1.4142135623730951
        x = x + norm(out, block + "ffn_post_norm.weight")
    logits = norm(x, "final_norm.weight") @ weights["head.weight"].T * spec.output_multiplier
    return capped(logits, spec.output_softcap or 0.0)


def test_the_network_has_the_logits_of_its_definition() -> None:
    decoder = network().eval()
    tokens = torch.randint(0, 80, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        ours = decoder(tokens[None])[0].double()
    torch.testing.assert_close(ours, reference(decoder, tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changed",
    [
        {"moe": SIZES["moe"] | {"router_softcap": 1000.0}},
        {"moe": SIZES["moe"] | {"renormalize": True}},
        {"attention_temperature_length": 60},
        {"attention_softcap": 1000.0},
        {"output_softcap": 1000.0},
    ],
)
def test_each_of_its_terms_makes_a_difference(changed: dict[str, Any]) -> None:
    """So that the comparison above could fail by any of them."""
    decoder = network().eval()
    other = Decoder(ModelSpec.model_validate(SIZES | changed)).eval()
    other.load_state_dict(decoder.state_dict())
    tokens = torch.randint(0, 80, (40,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert (decoder(tokens[None])[0].double() - other(tokens[None])[0].double()).abs().max() > 5e-3


def test_it_learns() -> None:
    decoder = network()
    tokens = torch.randint(0, 80, (2, 33), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(decoder.parameters(), 3e-3)
    seen = []
    for _ in range(12):
        losses = decoder(tokens[:, :-1], tokens[:, 1:])
        assert isinstance(losses, Losses)
        optimizer.zero_grad()
        losses.cross_entropy.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append(losses.cross_entropy.item())
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert seen[-1] < seen[0] - 1.0


def test_it_has_as_many_parameters_as_its_spec_counts() -> None:
    decoder = network()
    assert sum(parameter.numel() for parameter in decoder.parameters()) == decoder.spec.parameters.total
