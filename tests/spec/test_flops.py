"""The FLOPs of a network against PyTorch's own counter and against what was published."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modelworks.model.decoder import Decoder
from modelworks.spec.files import model_spec
from modelworks.spec.flops import attention_flop_per_token, forward_flop_per_token, training_flop_per_token
from modelworks.spec.model import ModelSpec


def test_a_dense_networks_matrix_products_are_those_that_pytorch_counts_forward_and_backward() -> None:
    spec = ModelSpec(layers=2, hidden=64, ffn_hidden=160, heads=4, vocab=512, context=128)
    decoder, tokens = Decoder(spec), torch.randint(512, (3, 32))
    with FlopCounterMode(display=False) as counter:
        decoder(tokens).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if str(operation) in {"aten.mm", "aten.addmm"})
    attention = spec.layers * attention_flop_per_token(spec, 32)
    assert products == 3 * (forward_flop_per_token(spec, 32) - attention) * tokens.numel()


def test_grok_1_takes_six_flops_per_active_weight_and_token() -> None:
    # xAI states that a quarter of the 314 B weights are active for a token; at short sequences attention adds little.
    assert training_flop_per_token(model_spec("grok-1"), 1) == pytest.approx(6 * 314e9 / 4, rel=0.1)
