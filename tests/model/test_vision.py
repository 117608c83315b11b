"""Eyes put what they saw in the places of the image's token, and have as many parameters as is planned."""

from __future__ import annotations

import pytest
import torch

from modelworks.model.vision import SeeingDecoder, Tower, network_of
from modelworks.spec import InputError, ModelSpec
from modelworks.spec.files import model_spec
from modelworks.spec.model import VisionSpec

SIZES = {"layers": 2, "hidden": 48, "ffn_hidden": 80, "heads": 4, "kv_heads": 2, "vocab": 96, "context": 128}
EYES = {
    "image_size": 40, "patch_size": 10, "layers": 2, "hidden": 32, "heads": 2, "ffn_hidden": 56, "pixel_shuffle": 2,
    "image_token": 90,
}  # fmt: skip


def seeing(**eyes: int) -> SeeingDecoder:
    return SeeingDecoder(ModelSpec.model_validate(SIZES | {"vision": EYES | eyes})).eval()


@pytest.mark.parametrize("eyes", [{}, {"connector_hidden": 24}], ids=["one map", "two maps"])
def test_a_network_has_the_parameters_that_are_counted(eyes: dict[str, int]) -> None:
    network = seeing(**eyes)
    assert sum(parameter.numel() for parameter in network.parameters()) == network.spec.parameters.total


def test_smolvlms_network_has_its_published_size() -> None:
    spec = model_spec("smolvlm-256m")
    assert spec.vision is not None
    with torch.device("meta"):
        network = network_of(spec.model_copy(update={"vision": spec.vision.model_copy(update={"image_token": 49190})}))
    assert sum(parameter.numel() for parameter in network.parameters()) == spec.parameters.total


def test_an_answer_depends_on_the_picture_and_a_gradient_reaches_every_parameter_of_the_eyes() -> None:
    network = seeing(connector_hidden=24)
    tokens = torch.tensor([[1, 2, 90, 90, 90, 90, 3, 4]])
    tiles = torch.randn(2, 1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    first, second = (network(tokens, tiles=picture) for picture in tiles)
    assert torch.equal(first[:, :2], second[:, :2])
    assert not torch.allclose(first[:, 2:], second[:, 2:])
    losses = network(tokens, targets=torch.tensor([[-1] * 6 + [4, 5]]), tiles=tiles[0])
    losses.cross_entropy.backward()
    for name, parameter in network.eyes.named_parameters():
        # A key's bias moves all of a query's logits alike, and changes nothing.
        assert parameter.grad is not None, name
        assert "wk.bias" in name or parameter.grad.abs().max() > 0, name


def test_an_answer_over_a_cache_is_the_one_without() -> None:
    network = seeing()
    tokens = torch.tensor([[1, 90, 90, 90, 90, 3, 90, 90, 90, 90, 4]])
    tiles = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    answer = network.generate(tokens, 6, tiles=tiles)
    for length in range(tokens.shape[1], answer.shape[1]):
        assert network(answer[:, :length], tiles=tiles)[0, -1].argmax() == answer[0, length]


def test_places_lie_at_the_same_fractions_of_a_tile_of_another_aspect_ratio() -> None:
    tower = Tower(VisionSpec.model_validate({**EYES, "pixel_shuffle": 1, "image_token": None}))
    assert tower.places(4, 4).tolist() == list(range(16))
    assert tower.places(2, 4).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert tower(torch.zeros(2, 3, 25, 47)).shape == (2, 2, 4, 32)


def test_pictures_that_do_not_fit_the_tokens_and_eyes_without_a_token_are_refused() -> None:
    network = seeing()
    with pytest.raises(InputError, match="3 places for images, and 1 tiles make 4 tokens"):
        network(torch.tensor([[1, 90, 90, 90]]), tiles=torch.zeros(1, 3, 40, 40))
    with pytest.raises(InputError, match=r"model.vision.image_token is missing"):
        SeeingDecoder(ModelSpec.model_validate(SIZES | {"vision": EYES | {"image_token": None}}))
    with pytest.raises(ValueError, match=r"vision.image_token = 96 is not below vocab = 96"):
        seeing(image_token=96)
