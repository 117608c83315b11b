"""Compiled blocks against the same blocks as they are, and when they are worth it."""

from __future__ import annotations

import shutil

import pytest
import torch

from modelworks.model.decoder import Decoder
from modelworks.spec.model import ModelSpec
from modelworks.train.compiling import THREAD_FLOPS, WORTHWHILE_S, try_compile, wanted

SIZES = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "vocab": 97, "context": 160}
EXPERTS = {"experts": 4, "top_k": 2, "expert_hidden": 48}
SHAPES = {
    "grok": SIZES
    | {
        "activation": "gelu",
        "norm_placement": "sandwich",
        "attention_softcap": 30.0,
        "embedding_multiplier": 8.0,
        "tied_embeddings": True,
        "moe": EXPERTS,
    },
    "mixtral": SIZES | {"moe": EXPERTS | {"renormalize": True}},
}
CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(("shape", "bfloat16"), [("grok", False), ("mixtral", True)], ids=["grok-fp32", "mixtral-bf16"])
def test_compiled_blocks_give_every_parameter_the_gradient_of_the_blocks_as_they_are(
    shape: str, bfloat16: bool
) -> None:
    torch.compiler.reset()
    network = Decoder(ModelSpec(**SHAPES[shape]))  # type: ignore[arg-type]
    tokens = torch.randint(0, 97, (2, 151), generator=torch.Generator().manual_seed(1))

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            losses = network(tokens[:, :-1], tokens[:, 1:])
        return losses.cross_entropy + 0.01 * losses.load_balance + 0.001 * losses.router_z

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        found = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
        network.zero_grad(set_to_none=True)
        return value.detach(), found

    expected_loss, expected = gradients()
    assert try_compile(network, lambda: loss().backward())  # type: ignore[no-untyped-call]
    got_loss, got = gradients()
    again_loss, again = gradients()
    tolerance = 0.2 if bfloat16 else 1e-4  # fused operations round to bf16 less often
    torch.testing.assert_close(got_loss, expected_loss, rtol=tolerance / 10, atol=0.0)
    for name, wanted_gradient in expected.items():
        difference = (got[name] - wanted_gradient).norm() / wanted_gradient.norm()
        assert difference < tolerance, name
        assert torch.equal(got[name], again[name]), name  # so that a resumed run can be equal to the bit
    assert torch.equal(got_loss, again_loss)


def test_a_run_compiles_by_itself_where_it_is_long_enough_to_win_the_compilation_back() -> None:
    long = 2 * WORTHWHILE_S * THREAD_FLOPS * torch.get_num_threads()
    assert wanted("auto", torch.device("cuda"), 1.0, None)
    assert not wanted(False, torch.device("cuda"), long, None)
    assert not wanted("auto", CPU, long / 3, None)
    assert not wanted("auto", CPU, long, 0.5 * WORTHWHILE_S)
    assert not wanted(False, CPU, long, None)
    assert wanted("auto", CPU, long, None) == wanted(True, CPU, 1.0, 1.0) == (shutil.which("g++") is not None)
