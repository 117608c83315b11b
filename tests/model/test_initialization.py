"""A part of a parameter begins with the values that it has in the whole."""

import itertools

import pytest
import torch

from modelworks.model import initialization
from modelworks.model.decoder import Decoder
from modelworks.model.initialization import fill
from modelworks.spec.model import ModelSpec


@pytest.fixture
def spec() -> ModelSpec:
    return ModelSpec(
        name="drawn",
        layers=2,
        hidden=48,
        heads=4,
        kv_heads=2,
        head_dim=12,
        vocab=200,
        context=64,
        ffn_hidden=96,
        embedding_multiplier=4.0,
        norm_placement="sandwich",
        attention_bias=True,
    )


@pytest.mark.parametrize("block", [1, 37, 48 * 5, 1 << 20])
@pytest.mark.parametrize("shape", [(24, 48), (3, 10, 48), (48,)])
def test_every_part_of_a_parameter_has_the_values_of_the_whole(
    spec: ModelSpec, shape: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialization, "BLOCK", block)
    name = "blocks.0.attn.wq.weight" if len(shape) > 1 else "blocks.0.attn_norm.weight"
    whole = torch.empty(shape)
    fill(whole, spec, 7, name)
    cuts = [sorted({0, size // 3, size // 2 + 1, size}) for size in shape]
    for ends in itertools.product(*(list(itertools.combinations(cut, 2)) for cut in cuts)):
        where = tuple(slice(*pair) for pair in ends)
        part = torch.full_like(whole[where], float("nan"), memory_format=torch.contiguous_format)
        fill(part, spec, 7, name, shape, [begin for begin, _ in ends])
        assert torch.equal(part, whole[where]), ends


def test_matrices_are_drawn_by_the_number_of_their_inputs_and_norms_by_that_of_the_writers(spec: ModelSpec) -> None:
    decoder = Decoder(spec.model_copy(update={"hidden": 512, "vocab": 4096}))
    decoder.initialize(3)
    for name, parameter in decoder.named_parameters():
        if name.startswith("embed"):
            assert float(parameter.detach().std()) == pytest.approx(0.25, rel=0.02), name
        elif parameter.dim() > 1:
            expected = parameter.shape[-1] ** -0.5
            assert float(parameter.detach().std()) == pytest.approx(expected, rel=0.1), name
        else:
            constant = 0.0 if "bias" in name else 0.5 if "post_norm" in name else 1.0
            assert torch.equal(parameter.detach(), torch.full_like(parameter, constant)), name


def test_no_two_parameters_begin_alike_nor_two_blocks_of_rows(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "BLOCK", 96)
    decoder = Decoder(spec)
    decoder.initialize(1)
    rows = torch.cat([p.detach().flatten()[:480].view(-1, 48)[:, :20] for p in decoder.parameters() if p.dim() > 1])
    assert len(torch.unique(rows, dim=0)) == len(rows)
