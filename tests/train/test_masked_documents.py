"""Runs whose packed documents don't see each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelworks.spec.errors import InputError
from modelworks.spec.run import RunSpec
from modelworks.train.loop import Trainer
from modelworks.train.session import open_run
from modelworks.train.view import NoView

MakeSpec = Callable[..., RunSpec]
SHORT = {"tokens": 3 * 4 * 32, "validate_every": 0, "validation_tokens": 64}


def test_masked_documents_change_what_is_learnt(make_spec: MakeSpec) -> None:
    losses = []
    for name, fields in (("open", {}), ("masked", {"document_mask": True}), ("restarted", {"document_mask": True,
                         "restart_positions": True})):  # fmt: skip
        with open_run(make_spec(name, **SHORT | {"seq_len": 64, "global_batch": 32} | fields)) as session:
            trainer = Trainer(session, NoView())
            losses.append(trainer.one_step()["loss"])
            trainer.close()
    assert losses[1] == pytest.approx(losses[2], abs=1e-5)  # rotary positions are relative
    assert losses[0] != pytest.approx(losses[1], abs=1e-5)


def test_positions_restart_with_a_mask_alone(make_spec: MakeSpec) -> None:
    with pytest.raises(InputError, match=r"restart_positions = true is not accepted without train.document_mask"):
        make_spec(restart_positions=True)
