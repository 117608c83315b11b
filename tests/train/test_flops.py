"""FLOPs per token against PyTorch's own counter, and against the planner's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modelworks.model.decoder import Decoder
from modelworks.plan import step as planner
from modelworks.spec.files import model_spec
from modelworks.spec.model import ModelSpec
from modelworks.train.flops import flop_per_token, matmul_parameters


def test_a_dense_networks_matrix_products_are_those_that_pytorch_counts() -> None:
    spec = ModelSpec(layers=2, hidden=64, ffn_hidden=160, heads=4, vocab=512, context=128)
    decoder = Decoder(spec)
    tokens = torch.randint(512, (3, 32))
    with FlopCounterMode(display=False) as counter:
        logits = decoder(tokens)
        logits.sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "attention" not in str(operation))
    attention_as_products = sum(count for operation, count in counts.items() if "bmm" in str(operation))
    assert products - attention_as_products == 6 * matmul_parameters(spec) * tokens.numel()


@pytest.mark.parametrize("name", ["grok-tiny", "grok-1", "smollm2-135m"])
def test_the_loop_and_the_planner_count_alike(name: str) -> None:
    spec = model_spec(name)
    assert flop_per_token(spec, 512) == pytest.approx(3 * planner.flop_per_token(spec, 512), rel=2e-3)


def test_grok_1_passes_a_token_through_about_86_billion_parameters() -> None:
    # xAI states that a quarter of the 314 B weights are active for a token.
    assert matmul_parameters(model_spec("grok-1")) == pytest.approx(314e9 / 4, rel=0.1)
