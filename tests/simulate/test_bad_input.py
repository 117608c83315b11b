"""What can't be simulated is refused in a sentence that names the field and what is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelworks.simulate.answers import answer
from modelworks.simulate.scenario import scenario
from modelworks.spec import InputError, loads_run

RUN = """
model = "grok-1"
[train]
tokens = "9000T"
seq_len = 8192
global_batch = 2048
[cluster]
preset = "colossus-100k"
gpus = 8192
[simulate]
days = 12
"""


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("simulate.rate=0", r"simulate\.rate = 0 is not accepted: it should be greater than 0"),
        ("simulate.rate=inf", r"simulate\.rate = inf is not accepted: it should be a finite number"),
        ("simulate.rate=-1", r"simulate\.rate = -1 is not accepted"),
        ("simulate.spares.hot=2000", r"simulate\.spares: hot = 2000 and pool = 0 are more than the job's 1024 nodes"),
        ("simulate.spares.hot=-1", r"simulate\.spares\.hot = -1 is not accepted"),
        ("simulate.state.storage_bytes=1TB", r"simulate\.state\.storage_bytes = 1_000_000_000_000 is not accepted"),
        ("simulate.restart.scheduler=-5", r"simulate\.restart\.scheduler = -5 is not accepted"),
        ("simulate.days=-1", r"simulate\.days = -1 is not accepted"),
        ("simulate.days=1e6", r"simulate\.days = 1e\+06 is not accepted: up to 3650 are"),
        ("cluster.gpus=10_000_000", r"cluster\.gpus = 10_000_000 is not accepted: up to 2_000_000 are"),
        ("checkpoint.every=0", r"checkpoint\.every = 0 is not accepted: a time above zero is"),
        ("checkpoint.every=1s", r"checkpoint\.every = 1 s is not accepted: writing one takes 6\.74 s"),
        ("simulate.causes.gpus.rate=2", r"simulate\.causes\.gpus: no such cause in llama3-h100; known are gpu, nvlink"),
        ("simulate.causes.gpu.rat=2", r"unknown key 'simulate\.causes\.gpu\.rat'; did you mean 'rate'"),
        ("simulate.failures=llama", r"no preset 'llama' in failures; did you mean 'llama3-h100'"),
        ("simulate.elastic.group_gpus=9000", None),
        ("simulate.state.peer_every=0", r"simulate\.state\.peer_every = 0 is not accepted"),
        ("simulate.start=yesterday", r"simulate\.start = 'yesterday' is not accepted: a date such as 2024-07-22 is"),
        ("simulate.batches=[{day=3, gpus=8}]", r"simulate\.batches: no GPUs arrive at day 0"),
        ("simulate.power=[{day=0, megawatts=0}]", r"nothing can run on day 0: no whole node has power"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(override: str, sentence: str | None) -> None:
    if sentence is None:
        with pytest.raises(InputError, match="group_gpus = 9000 is not accepted"):
            scenario(loads_run(RUN, [override, "simulate.elastic.enabled=true"]))
        return
    with pytest.raises(InputError, match=sentence):
        scenario(loads_run(RUN, [override]))


def test_a_run_that_can_never_progress_says_so_and_does_not_loop() -> None:
    with pytest.raises(InputError, match=r"the run can never progress: it fails every .* s on average, and a restart"):
        scenario(loads_run(RUN, ["simulate.rate=3000"]))


def test_a_run_without_end_asks_for_days() -> None:
    endless = RUN.replace("days = 12\n", "").replace("9000T", "9000000T")
    with pytest.raises(InputError, match=r"train\.tokens = .* days on this cluster without a failure; give --days"):
        scenario(loads_run(endless))


@pytest.mark.parametrize(("samples", "seed"), [(0, 0), (-3, 0), (1, -1)])
def test_no_samples_and_negative_seeds_are_refused(samples: int, seed: int) -> None:
    with pytest.raises(InputError, match=r"--samples .* and --seed .* are not accepted"):
        answer(loads_run(RUN), samples, seed)


def test_a_file_of_failures_with_two_rates_for_a_cause_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        '[observation]\ngpus = 8\ndays = 1.0\n[causes.gpu]\ncomponent = "gpu"\nmtbf_hours = 5.0\ninterruptions = 3.0\n'
    )
    with pytest.raises(InputError, match=r"causes\.gpu: either interruptions or mtbf_hours is needed, and not both"):
        scenario(loads_run(RUN, [f"simulate.failures={file}"]))


def test_a_file_of_failures_that_counts_what_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('[observation]\ngpus = 8\ndays = 1.0\n[causes.gpu]\ncomponent = "wheel"\nmtbf_hours = 5.0\n')
    with pytest.raises(InputError, match=r"causes\.gpu\.component = 'wheel' is not accepted: one of job, gpu, "):
        scenario(loads_run(RUN, [f"simulate.failures={file}"]))
