"""Eyes in front of the decoder: a vision transformer over an image's tiles, and a connector to the decoder's width.

What is notable in it:
- the tower is SigLIP's (Zhai et al. 2023, arXiv:2303.15343) without its pooling head: patches, learned positions,
  LayerNorm before each half of a block, attention in both directions, biases everywhere;
- a tile that has fewer patches than the tower's own, or another aspect ratio, takes the positions that lie at the same
  fractions of its height and width (Idefics2, Laurencon et al. 2024, arXiv:2405.02246);
- the connector joins squares of patches into one token (pixel shuffle) and maps it to the decoder's width, by one map
  without bias (Idefics3, arXiv:2408.12637) or by two with a GELU between them;
- the decoder knows nothing of images: where the image's token stands, what the eyes saw stands in place of its
  embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelworks.model.attention import KeyValueCache
from modelworks.model.decoder import Decoder, Losses
from modelworks.model.generation import generate
from modelworks.model.layers import Embedding, Linear, to_compute_dtype
from modelworks.model.loss import IGNORED, head_logits
from modelworks.spec.errors import InputError
from modelworks.spec.model import ModelSpec, VisionSpec


class TowerAttention(nn.Module):
    """Attention from each patch of a tile to all of them: (N, P, D) in and out."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.wq = Linear(spec.hidden, spec.hidden)
        self.wk = Linear(spec.hidden, spec.hidden)
        self.wv = Linear(spec.hidden, spec.hidden)
        self.wo = Linear(spec.hidden, spec.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        queries, keys, values = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.wq, self.wk, self.wv)
        )  # (N, heads, P, D / heads)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        output: Tensor = self.wo(attended.transpose(1, 2).flatten(2))
        return output


class TowerMLP(nn.Module):
    """The feed-forward network `down(gelu(up(x)))`, with the tanh approximation of the GELU."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.up = Linear(spec.hidden, spec.ffn_hidden)
        self.down = Linear(spec.ffn_hidden, spec.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(N, P, D) in and out."""
        lowered: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return lowered


class TowerBlock(nn.Module):
    """One layer of the tower."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(spec.hidden, spec.norm_eps)
        self.attn = TowerAttention(spec)
        self.mlp_norm = nn.LayerNorm(spec.hidden, spec.norm_eps)
        self.mlp = TowerMLP(spec)

    def forward(self, x: Tensor) -> Tensor:
        """(N, P, D) in and out."""
        x = x + self.attn(self.attn_norm(x))
        added: Tensor = x + self.mlp(self.mlp_norm(x))
        return added


class Tower(nn.Module):
    """The vision transformer of a `VisionSpec`."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patches = Linear(spec.patch_width, spec.hidden)
        self.positions = Embedding(spec.patches, spec.hidden)
        self.blocks = nn.ModuleList(TowerBlock(spec) for _ in range(spec.layers))
        self.final_norm = nn.LayerNorm(spec.hidden, spec.norm_eps)

    def forward(self, tiles: Tensor) -> Tensor:
        """What the tower sees of tiles.

        Parameters
        ----------
        tiles
            (N, 3, height, width), normalised; what does not fill a patch at the right and below is cut off.

        Returns
        -------
        Tensor
            (N, rows of patches, columns of patches, D)
        """
        size = self.spec.patch_size
        rows, columns = tiles.shape[2] // size, tiles.shape[3] // size
        pixels = F.unfold(tiles[:, :, : rows * size, : columns * size], size, stride=size).transpose(1, 2)
        x = self.patches(pixels) + self.positions(self.places(rows, columns))  # (N, rows * columns, D)
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.final_norm(x)
        return normed.view(len(tiles), rows, columns, -1)

    def places(self, rows: int, columns: int) -> Tensor:
        """Which learned position each patch of a tile takes: (rows * columns), row by row."""
        side = self.spec.image_size // self.spec.patch_size
        device = self.positions.weight.device
        down = torch.arange(rows, device=device) * side // rows
        across = torch.arange(columns, device=device) * side // columns
        return (down[:, None] * side + across).flatten()


class Connector(nn.Module):
    """Squares of patches joined into tokens, and mapped to the decoder's width."""

    def __init__(self, spec: VisionSpec, width: int) -> None:
        super().__init__()
        self.shuffle = spec.pixel_shuffle
        biased = spec.connector_hidden is not None
        self.maps = nn.ModuleList(Linear(of, out, bias=biased) for out, of in spec.connector_maps(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, rows, columns, D) to (N, rows * columns / shuffle^2, H)."""
        s = self.shuffle
        number, rows, columns, width = x.shape
        squares = x.view(number, rows // s, s, columns // s, s, width)
        x = squares.transpose(2, 3).flatten(3).flatten(1, 2)
        for place, linear in enumerate(self.maps):
            x = linear(F.gelu(x, approximate="tanh") if place else x)
        return x


class Eyes(nn.Module):
    """Tower and connector: tiles (N, 3, height, width) in, tokens of the decoder (N, T, H) out."""

    def __init__(self, spec: VisionSpec, width: int) -> None:
        super().__init__()
        self.tower = Tower(spec)
        self.connector = Connector(spec, width)

    def forward(self, tiles: Tensor) -> Tensor:
        """Look."""
        seen: Tensor = self.connector(self.tower(tiles))
        return seen


class SeeingDecoder(Decoder):
    """The network of a `ModelSpec` with a vision section: the decoder, and eyes in front of it.

    Raises
    ------
    InputError
        If the decoder doesn't implement a field, or `vision.image_token` is not given.
    """

    def __init__(self, spec: ModelSpec) -> None:
        if spec.vision is None or spec.vision.image_token is None:
            raise InputError("model.vision.image_token is missing: the id of the token in whose place images stand")
        super().__init__(spec.model_copy(update={"vision": None}))
        self.spec = spec
        self.image_token = spec.vision.image_token
        self.eyes = Eyes(spec.vision, spec.hidden)
        self.initialize(0)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KeyValueCache | None = None,
        embedded: Tensor | None = None,
        tiles: Tensor | None = None,
    ) -> Tensor | Losses:
        """Run the network; as `Decoder.forward`, with the tiles (N, 3, height, width) of all images in their order."""
        if tiles is not None:
            embedded = self.embedded(tokens, self.eyes(tiles))
        return super().forward(tokens, targets, cache, embedded)

    def embedded(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """The embeddings (B, T, H) of tokens, with what the eyes saw (N, T', H) in the places of the image's token.

        Raises
        ------
        InputError
            If there are more or fewer such places than tokens were seen.
        """
        places = tokens == self.image_token
        tiles, seen = len(seen), seen.flatten(0, 1)
        if int(places.sum()) != len(seen):
            raise InputError(
                f"tokens: {int(places.sum())} places for images, and {tiles} tiles make {len(seen)} tokens: "
                "as many are accepted"
            )
        words: Tensor = self.embed(tokens) * self.spec.embedding_multiplier
        return words.masked_scatter(places[..., None], seen.to(words.dtype))

    def sign_logits(self, seen: Tensor) -> Tensor:
        """What the eyes saw (..., H) read sign by sign: logits (..., V) of the decoder's own head, in fp32.

        An image token that is near to the embedding of the sign in its square is one that the decoder reads like text.
        """
        weight = to_compute_dtype(self.output_weight)
        hidden = to_compute_dtype(self.final_norm(seen))
        return head_logits(hidden, weight, self.spec.output_multiplier, self.spec.output_softcap)

    def sign_loss(self, seen: Tensor, signs: Tensor) -> Tensor:
        """The mean cross-entropy, in nats, of the signs (N, T) in the squares of what the eyes saw (N, T, H).

        The image's own token stands for no sign; -1 doesn't count.
        """
        return F.cross_entropy(self.sign_logits(seen).flatten(0, 1), signs.flatten(), ignore_index=IGNORED)

    def size_beside_words(self, seen: Tensor) -> Tensor:
        """The logarithm of how many times as large as the embeddings of words what the eyes saw (N, T, H) is.

        Signs are read after a normalisation, so that nothing else keeps the two alike; and what blocks add to a token
        that is many times as large as they are is lost on those that follow.
        """
        words = self.embed.weight.detach().square().mean() * self.spec.embedding_multiplier**2
        return (seen.float().square().mean() / words).log() / 2

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[int] = (),
        seed: int | None = None,
        tiles: Tensor | None = None,
    ) -> Tensor:
        """Continue each sequence of (B, T) by at most `max_new_tokens`; see `generation.generate`."""

        def forward(fresh: Tensor, cache: KeyValueCache) -> Tensor:
            if tiles is None or cache.position:
                return self.logits(fresh, cache)
            return self.logits(fresh, cache, self.embedded(fresh, self.eyes(tiles)))

        return generate(forward, self.spec, tokens, max_new_tokens, temperature, top_p, stop, seed)


def network_of(spec: ModelSpec) -> Decoder:
    """The network of a spec, with eyes where it has a vision section."""
    return Decoder(spec) if spec.vision is None else SeeingDecoder(spec)
