"""Fields that only planning knows so far: windows of attention, and dense networks beside experts."""

from __future__ import annotations

import pytest

from modelworks.model.support import refuse_unsupported
from modelworks.spec.errors import InputError
from modelworks.spec.files import model_spec
from modelworks.spec.flops import attention_flop_per_token, forward_flop_per_token


def test_grok_2_has_its_published_size() -> None:
    # 64 layers of 8 gated experts (8192 x 16384), a residual network (8192 x 32768) and attention (64 and 8 heads of
    # 128), and two tables of 131,072: 270 billion, as its release is called.
    count = model_spec("grok-2").parameters
    by_hand = 64 * (8 * 3 * 8192 * 16384 + 3 * 8192 * 32768 + 8192 * 128 * (2 * 64 + 2 * 8)) + 2 * 131072 * 8192
    assert count.total == pytest.approx(by_hand, rel=1e-4)
    assert round(count.total / 1e9) == 270
    assert count.active == pytest.approx(by_hand - 64 * 6 * 3 * 8192 * 16384, rel=1e-3)


def test_a_window_bounds_what_attention_costs() -> None:
    llama = model_spec("llama-3.1-8b")
    windowed = llama.model_copy(update={"sliding_window": 4096})
    # Averaged over positions by counting: token i attends to min(i, window) tokens.
    counted = sum(min(i, 4096) for i in range(1, 32769)) / 32768
    assert windowed.attended(32768) == pytest.approx(counted, rel=1e-3)
    assert windowed.attended(2048) == llama.attended(2048) == 1024
    ratio = attention_flop_per_token(windowed, 32768) / attention_flop_per_token(llama, 32768)
    assert ratio == pytest.approx(counted / 16384, rel=1e-3)
    assert forward_flop_per_token(windowed, 32768) < forward_flop_per_token(llama, 32768)


@pytest.mark.parametrize("changed", [{"sliding_window": 1024}, {"moe": {"residual": True}}])
def test_the_decoder_refuses_what_it_does_not_build(changed: dict[str, object]) -> None:
    grok = model_spec("grok-tiny")
    assert grok.moe is not None
    if "moe" in changed:
        changed = {"moe": grok.moe.model_copy(update={"residual": True})}
    else:
        changed = {"sliding_window": grok.context // 2}
    with pytest.raises(InputError, match="is not implemented by the decoder"):
        refuse_unsupported(grok.model_copy(update=changed))
