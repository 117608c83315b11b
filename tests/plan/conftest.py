"""Settings that plan tests share: published models on a device whose numbers are round."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from modelworks.plan.block import Setting
from modelworks.plan.planner import calibration_spec, setting_for, software_spec
from modelworks.spec.files import cluster_spec, device_spec, model_spec
from modelworks.spec.model import ModelSpec


@pytest.fixture
def setting() -> Callable[..., Setting]:
    """`setting(model, software=..., seq_len=..., gpus=...)`: what a step is evaluated on."""

    def make(
        model: ModelSpec | str = "gpt3-175b",
        software: str = "megatron-core",
        seq_len: int = 2048,
        gpus: int = 1024,
        device: str = "h100-sxm",
    ) -> Setting:
        spec = model_spec(model) if isinstance(model, str) else model
        cluster = cluster_spec("colossus-100k", gpus)
        return setting_for(spec, seq_len, cluster, device_spec(device), software_spec(software), calibration_spec())

    return make
