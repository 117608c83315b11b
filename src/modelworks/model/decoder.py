"""The decoder: one transformer whose fields make it Grok-1 or 2, Llama, SmolLM2 or 3, Mistral, Mixtral, Qwen2 or 3.

What is notable in it:
- RMSNorm before attention and feed-forward, and in the Grok family after them too ("sandwich");
- grouped-query attention with rotary positions, soft-capped in the Grok family (`attention`);
- a mixture of experts, a dense gated feed-forward network, or both side by side, per layer (`experts`, `layers`);
- embedding and output multipliers, tied or untied embeddings;
- with targets the forward pass returns losses, and the logits never stand in memory whole (`loss`).

The module knows nothing of parallelism, has no buffers and builds on the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modelworks.model.attention import Attention, KeyValueCache
from modelworks.model.experts import MixtureOfExperts, RouterReport
from modelworks.model.generation import generate
from modelworks.model.initialization import fill
from modelworks.model.layers import Embedding, GatedMLP, Linear, RMSNorm, to_compute_dtype
from modelworks.model.loss import IGNORED, chunked_cross_entropy, chunked_log_probabilities, head_logits
from modelworks.model.rotary import Documents, Rotary, packed_tables, rotary_tables
from modelworks.model.support import refuse_unsupported
from modelworks.spec.errors import InputError
from modelworks.spec.model import ModelSpec


class Losses(NamedTuple):
    """The parts of the training loss; scalars in fp32, to be weighted and added by the loop."""

    cross_entropy: Tensor
    """Mean over the targets that count, in nats."""
    load_balance: Tensor
    """Mean over the layers with experts; 1 when balanced, 0 without experts."""
    router_z: Tensor
    """Mean over the layers with experts; 0 without experts."""
    expert_load: Tensor
    """(moe_layers, experts): the share of a layer's (token, expert) pairs that each expert took."""


class Block(nn.Module):
    """One layer: attention and a feed-forward network, each added to the residual stream."""

    def __init__(self, spec: ModelSpec, layer: int) -> None:
        super().__init__()
        sandwich = spec.norm_placement == "sandwich"
        self.attn_norm = RMSNorm(spec.hidden, spec.norm_eps)
        self.attn = Attention(spec, layer)
        self.attn_post_norm = RMSNorm(spec.hidden, spec.norm_eps) if sandwich else None
        self.ffn_norm = RMSNorm(spec.hidden, spec.norm_eps)
        if spec.moe is not None and layer >= spec.moe.dense_layers:
            self.moe = MixtureOfExperts(spec)
        if not hasattr(self, "moe") or (spec.moe is not None and spec.moe.residual):
            self.mlp = GatedMLP(spec)
        self.ffn_post_norm = RMSNorm(spec.hidden, spec.norm_eps) if sandwich else None

    def forward(
        self, x: Tensor, rotary: Rotary, cache: KeyValueCache | None = None
    ) -> tuple[Tensor, RouterReport | None]:
        """(B, T, H) in and out, with the router's report where the layer has experts."""
        attended = self.attn(self.attn_norm(x), rotary, cache)
        x = x + (attended if self.attn_post_norm is None else self.attn_post_norm(attended))
        normed, report = self.ffn_norm(x), None
        if hasattr(self, "moe"):
            mixed, report = self.moe(normed)
            if hasattr(self, "mlp"):
                mixed = (mixed + self.mlp(normed)) * math.sqrt(0.5)
        else:
            mixed = self.mlp(normed)
        return x + (mixed if self.ffn_post_norm is None else self.ffn_post_norm(mixed)), report


class Decoder(nn.Module):
    """The network of a `ModelSpec`.

    Parameters
    ----------
    spec
        The network. Under ``torch.device("meta")`` it is built without memory.

    Raises
    ------
    InputError
        If a field of the spec is not implemented; the sentence names it.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        refuse_unsupported(spec)
        self.spec = spec
        self.documents: Documents | None = None
        """How the documents of packed sequences are told apart, which then don't attend to each other."""
        self.embed = Embedding(spec.vocab, spec.hidden)
        self.blocks = nn.ModuleList(Block(spec, layer) for layer in range(spec.layers))
        self.final_norm = RMSNorm(spec.hidden, spec.norm_eps)
        self.head = None if spec.tied_embeddings else Linear(spec.hidden, spec.vocab, bias=False)
        self.initialize(0)

    def initialize(self, seed: int) -> None:
        """Draw every parameter anew, the same for the same seed on every device: see `initialization`."""
        for name, parameter in self.named_parameters():
            fill(parameter, self.spec, seed, name)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KeyValueCache | None = None,
        embedded: Tensor | None = None,
    ) -> Tensor | Losses:
        """Run the network.

        Parameters
        ----------
        tokens
            (B, T) int64.
        targets
            (B, T) int64, the token that follows each; -1 doesn't count.
        cache
            Keys and values of the positions before `tokens`; it is filled and moved on.
        embedded
            (B, T, H), what enters the first block in place of the tokens' embeddings.

        Returns
        -------
        Tensor or Losses
            Logits (B, T, V) in fp32, or with `targets` the losses.

        Raises
        ------
        InputError
            If the sequence is longer than the spec's context.
        """
        if targets is None:
            return self.logits(tokens, cache, embedded)
        hidden, reports = self.hidden_states(tokens, cache, embedded)
        cross_entropy = chunked_cross_entropy(
            to_compute_dtype(hidden.flatten(0, 1)),
            to_compute_dtype(self.output_weight),
            targets.flatten(),
            self.spec.output_multiplier,
            self.spec.output_softcap,
        )
        return Losses(cross_entropy, *_mean_reports(reports, hidden))

    def logits(self, tokens: Tensor, cache: KeyValueCache | None = None, embedded: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) in fp32 of tokens (B, T) that stand after those of the cache."""
        hidden, _ = self.hidden_states(tokens, cache, embedded)
        weight = to_compute_dtype(self.output_weight)
        return head_logits(to_compute_dtype(hidden), weight, self.spec.output_multiplier, self.spec.output_softcap)

    def log_probabilities(self, tokens: Tensor, targets: Tensor, temperature: float = 1.0) -> tuple[Tensor, Losses]:
        """The log-probability (N), in nats, of each target (B, T) that counts, in order; and the losses."""
        hidden, reports = self.hidden_states(tokens)
        counts = targets != IGNORED
        found = chunked_log_probabilities(
            to_compute_dtype(hidden[counts]),
            to_compute_dtype(self.output_weight),
            targets[counts],
            self.spec.output_multiplier,
            self.spec.output_softcap,
            temperature,
        )
        return found, Losses(-found.mean(), *_mean_reports(reports, hidden))

    def hidden_states(
        self, tokens: Tensor, cache: KeyValueCache | None = None, embedded: Tensor | None = None
    ) -> tuple[Tensor, list[RouterReport]]:
        """The normalised states (B, T, H) that the head multiplies, and each router's report."""
        start = 0 if cache is None else cache.position
        end = start + tokens.shape[1]
        if end > self.spec.context:
            raise InputError(
                f"tokens: a sequence of {end} is too long: at most model.context = {self.spec.context} is accepted"
            )
        x = self.embed(tokens) * self.spec.embedding_multiplier if embedded is None else embedded  # (B, T, H)
        rotary = (
            packed_tables(self.spec, tokens, self.documents)
            if cache is None
            else rotary_tables(self.spec, start, tokens.shape[1], tokens.device)
        )
        reports = []
        for block in self.blocks:
            x, report = block(x, rotary, cache)
            if report is not None:
                reports.append(report)
        if cache is not None:
            cache.position = end
        return self.final_norm(x), reports

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[int] = (),
        seed: int | None = None,
    ) -> Tensor:
        """Continue each sequence of (B, T) by at most `max_new_tokens`; see `generation.generate`."""
        return generate(self.logits, self.spec, tokens, max_new_tokens, temperature, top_p, stop, seed)

    @property
    def output_weight(self) -> Tensor:
        """The head's matrix (V, H): the embedding's where they are tied."""
        return self.embed.weight if self.head is None else self.head.weight


def _mean_reports(reports: list[RouterReport], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The losses of all routers, averaged, and their loads (moe_layers, experts)."""
    if not reports:
        zero = like.new_zeros((), dtype=torch.float32)
        return zero, zero, like.new_zeros((0, 0), dtype=torch.float32)
    load_balance, router_z, load = (torch.stack(part) for part in zip(*reports, strict=True))
    return load_balance.mean(), router_z.mean(), load
