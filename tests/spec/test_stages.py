"""A run spec in stages as the runs that it stands for."""

from __future__ import annotations

import pytest

from modelworks.spec import InputError, dumps, loads_run
from modelworks.spec.stages import chain

STAGED = """
name = "needle"
[model]
layers = 1
hidden = 64
ffn_hidden = 64
heads = 2
vocab = 300
context = 2048
[data]
source = "files"
files = ["/text/short.txt"]
[train]
tokens = 1_000_000
seq_len = 2048
global_batch = 8
[[stages]]
name = "8k"
seq_len = 8192
tokens = 65536
global_batch = 2
rope_base = 100_000
files = ["/text/long.txt"]
[[stages]]
name = "16k"
seq_len = 16384
rope_scaling = {rope_type = "linear", factor = 2}
"""


def test_stages_are_runs_that_begin_where_the_last_one_ended() -> None:
    base, second, third = chain(loads_run(STAGED))
    assert [run.name for run in (base, second, third)] == ["needle", "needle-8k", "needle-16k"]
    assert [run.train.init_from for run in (base, second, third)] == [None, "needle", "needle-8k"]
    assert [run.model.context for run in (base, second, third)] == [2048, 8192, 16384]
    assert [run.model.rope_base for run in (base, second, third)] == [10_000, 100_000, 100_000]
    assert (second.train.steps, third.train.steps) == (4, 2)  # what a stage doesn't say stays as it was
    assert third.data.files == ["/text/long.txt"]
    assert third.model.rope_scaling is not None
    assert second.model.rope_scaling is None
    assert all(run == loads_run(dumps(run)) and not run.stages for run in (base, second, third))


def test_one_stage_is_taken_by_its_name() -> None:
    assert loads_run(STAGED, ["stage=16k"]) == chain(loads_run(STAGED))[2]
    with pytest.raises(InputError, match=r"stage = '61k' is not accepted; did you mean '16k'\?"):
        loads_run(STAGED, ["stage=61k"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("seq_len = 16384", "seq_len = 0"), "stages.1.seq_len = 0 is not accepted"),
        (('name = "16k"', 'name = "8k"'), "stages: each needs a name of its own"),
        (("seq_len = 16384", "sequence = 16384"), "unknown key 'stages.1.sequence'"),
        (('rope_type = "linear"', 'rope_type = "yarn"'), "original_max_position_embeddings is missing"),
        (('name = "16k"', 'name = "1/6"'), "stages.1.name = '1/6' is not accepted"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused(change: tuple[str, str], sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        loads_run(STAGED.replace(*change))
    assert sentence in str(refused.value)
