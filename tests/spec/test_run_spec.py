"""A run spec survives being written and read, and what it can't mean is refused in one sentence."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelworks.spec import InputError, ModelSpec, RunSpec, dumps, load_run, loads_run, model_spec, run_from
from modelworks.spec.catalog import names

GROK_TINY = 'model = "grok-tiny"\n'

counts = st.integers(1, 2**40)
sizes = st.integers(1, 256)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
fractions = st.floats(0, 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def models(draw: st.DrawFn) -> dict[str, Any]:
    """Fields of models of all shapes, as a TOML file would hold them."""
    kv_heads = draw(sizes)
    values: dict[str, Any] = {
        "name": draw(words),
        "layers": draw(sizes),
        "hidden": draw(counts),
        "ffn_hidden": draw(counts),
        "heads": kv_heads * draw(st.integers(1, 16)),
        "kv_heads": kv_heads,
        "head_dim": 2 * draw(sizes),
        "vocab": draw(counts),
        "context": draw(st.integers(2**20, 2**30)),
        "norm_eps": draw(positive),
        "embedding_multiplier": draw(positive),
        "activation": draw(st.sampled_from(["silu", "gelu"])),
        "norm": draw(st.sampled_from(["rms", "layer"])),
        "tied_embeddings": draw(st.booleans()),
    }
    if draw(st.booleans()):
        values["attention_softcap"] = draw(positive)
        values["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": draw(st.floats(1.0, 1e6)),
            "original_max_position_embeddings": draw(counts),
            "extrapolation_factor": draw(st.floats(0.0, 1.0)),
        }
    if draw(st.booleans()):
        experts = draw(sizes)
        values["moe"] = {
            "experts": experts,
            "top_k": draw(st.integers(1, experts)),
            "expert_hidden": draw(counts),
            "routed_multiplier": draw(positive),
        }
    return values


@st.composite
def runs(draw: st.DrawFn) -> RunSpec:
    """Run specs of one process."""
    micro_batch = draw(st.one_of(st.just("auto"), sizes))
    global_batch = draw(sizes) * (1 if micro_batch == "auto" else micro_batch)
    return run_from(
        {
            "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)),
            "model": draw(models()),
            "data": {"text_field": draw(words), "max_bytes": draw(counts), "validation_fraction": draw(fractions)},
            "train": {
                "tokens": draw(counts),
                "seq_len": draw(sizes),
                "global_batch": global_batch,
                "micro_batch": micro_batch,
                "compile": draw(st.sampled_from([True, False, "auto"])),
                "learning_rate": draw(positive),
                "max_time": draw(positive),
            },
            "checkpoint": {"every": draw(st.floats(0, 1e9))},
            "release": {"to": draw(st.lists(st.sampled_from(["safetensors", "gguf"])))},
        }
    )


@given(runs())
def test_a_run_spec_that_is_written_reads_back_equal(run: RunSpec) -> None:
    assert loads_run(dumps(run)) == run


@given(runs())
def test_writing_a_run_spec_twice_gives_the_same_text(run: RunSpec) -> None:
    assert dumps(loads_run(dumps(run))) == dumps(run)


@pytest.mark.parametrize("name", names("models"))
def test_a_preset_reads_back_equal(name: str) -> None:
    # A sequence holds the images of a model that sees.
    run = loads_run(f'model = "{name}"\n[train]\nseq_len = {min(model_spec(name).context, 2048)}\n')
    assert loads_run(dumps(run)) == run
    assert run.model == model_spec(name)


@pytest.mark.parametrize("cluster", names("clusters"))
def test_a_run_on_a_cluster_reads_back_equal(cluster: str) -> None:
    run = loads_run(f'model = "grok-1"\ncluster = "{cluster}"\n[train]\nseq_len = 8192\nglobal_batch = 100\n')
    assert run.cluster.preset == cluster
    assert loads_run(dumps(run)) == run


def test_fields_beside_a_preset_win_over_it() -> None:
    run = loads_run('[model]\npreset = "grok-tiny"\nlayers = 2\n[model.moe]\nexperts = 4\n')
    preset = model_spec("grok-tiny")
    assert run.model.moe is not None
    assert preset.moe is not None
    assert (run.model.layers, run.model.hidden) == (2, preset.hidden)
    assert (run.model.moe.experts, run.model.moe.expert_hidden) == (4, preset.moe.expert_hidden)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [('"5min"', 300), ('"90s"', 90), ('"250ms"', 0.25), ('"1.1h"', 3960), ('"2d"', 172_800), ("12", 12)],
)
def test_durations_carry_units(written: str, seconds: float) -> None:
    assert loads_run(f"{GROK_TINY}[checkpoint]\nevery = {written}\n").checkpoint.every == seconds


@pytest.mark.parametrize(
    ("written", "tokens"), [('"2B"', 2 * 10**9), ('"1.5T"', 15 * 10**11), ('"300K"', 300_000), ("2_000_000", 2 * 10**6)]
)
def test_counts_carry_units(written: str, tokens: int) -> None:
    assert loads_run(f"{GROK_TINY}[train]\ntokens = {written}\n").train.tokens == tokens


@given(st.integers(1, 10**6), st.integers(0, 3))
def test_a_size_with_a_decimal_unit_is_exact(thousandths: int, power: int) -> None:
    """2.3 * 10**12 isn't a whole number in floating point."""
    prefix = ["K", "M", "G", "T"][power]
    written = f"{thousandths // 1000}.{thousandths % 1000:03d}{prefix}B"
    run = loads_run(f'{GROK_TINY}[data]\nmax_bytes = "{written}"\n')
    assert run.data.max_bytes == thousandths * 1000**power


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (GROK_TINY + "[train]\nseq_length = 8\n", "unknown key 'train.seq_length'; did you mean 'seq_len'?"),
        (GROK_TINY + "seq_len = 8\n", "unknown key 'seq_len'; did you mean 'train.seq_len'?"),
        (GROK_TINY + "[Train]\nseq_len = 8\n", "unknown key 'Train'; did you mean 'train'?"),
        ('[model]\npreset = "grok-tiny"\n[model.moe]\ntop_q = 1\n', "unknown key 'model.moe.top_q'; did you mean 'to"),
        (GROK_TINY + '[checkpoint]\nevery = "5 parsecs"\n', "checkpoint.every = '5 parsecs' is not accepted: a number"),
        (
            GROK_TINY + '[checkpoint]\nevery = "-5min"\n',
            "every = '-5min' is not accepted: it should be greater than or",
        ),
        (GROK_TINY + '[train]\ntokens = "2GiB"\n', "train.tokens = '2GiB' is not accepted: a number with one of the"),
        (GROK_TINY + "[train]\ntokens = 1.5\n", "train.tokens = 1.5 is not accepted: it should be a whole number"),
        (GROK_TINY + "[train]\nseq_len = true\n", "train.seq_len = True is not accepted: it should be a whole number"),
        (
            GROK_TINY + '[train]\nseq_len = "512"\n',
            "train.seq_len = '512' is not accepted: it should be a whole number",
        ),
        (GROK_TINY + "[train]\nseq_len = 0\n", "train.seq_len = 0 is not accepted: it should be greater than 0"),
        (GROK_TINY + "[train]\nlearning_rate = nan\n", "train.learning_rate = nan is not accepted: it should be"),
        (GROK_TINY + "[train]\nlearning_rate = inf\n", "train.learning_rate = inf is not accepted: it should be"),
        (GROK_TINY + '[train]\nmicro_batch = "some"\n', "it should be a whole number or 'auto'"),
        (GROK_TINY + "[train]\nmicro_batch = 0\n", "it should be greater than 0 or 'auto'"),
        (GROK_TINY + '[train]\nschedule = "linear"\n', "it should be 'wsd', 'cosine' or 'constant'"),
        (GROK_TINY + "train = 3\n", "train = 3 is not accepted: it should be a table"),
        (GROK_TINY + '[release]\nto = "gguf"\n', "release.to = 'gguf' is not accepted: it should be a list"),
        (
            GROK_TINY + '[data]\nsource = "web"\n',
            "data.source = 'web' is not accepted: stdlib, files, dialogues, pairs, tasks, pictures or hf:DATASET is",
        ),
        (GROK_TINY + '[data]\nsource = "files"\n', "data.files is missing"),
        (GROK_TINY + 'name = "../x"\n', "name = '../x' is not accepted: up to 64 letters"),
        ("[train]\ntokens = 1\n", "'model' is missing: give a preset"),
        ("[model]\nlayers = 1\n", "'model.hidden' is missing"),
        ("model = 5\n", "model = 5 is not accepted: it should be a table"),
        ("model = \n", "not TOML"),
        ('[model]\npreset = "grok-tiny"\nhf = "config.json"\n', "give either preset or hf, not both"),
    ],
)
def test_bad_input_is_refused_in_a_sentence_that_names_the_field(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        loads_run(text)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Input should" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[model]\nhidden = 385\nheads = 6\nlayers = 1\nvocab = 9\ncontext = 9\n",
            "hidden = 385 doesn't divide by heads",
        ),
        ('[model]\npreset = "grok-tiny"\nkv_heads = 4\n', "model: heads = 6 doesn't divide by kv_heads = 4"),
        ('[model]\npreset = "grok-tiny"\nhead_dim = 33\n', "head_dim = 33 must be even"),
        ('[model]\npreset = "grok-tiny"\n[model.moe]\ntop_k = 9\n', "moe.top_k = 9 needs at least as many experts"),
        (GROK_TINY + "[train]\nseq_len = 4096\n", "train.seq_len = 4096 is longer than model.context = 1024"),
        (GROK_TINY + "[train]\nmicro_batch = 5\n", "micro_batch = 5 doesn't divide train.global_batch = 32"),
        (GROK_TINY + "[parallel]\ntensor = 4\n", "parallel.tensor = 4 doesn't divide model.heads = 6"),
        (GROK_TINY + "[parallel]\ntensor = 3\n", "parallel.tensor = 3 doesn't divide model.kv_heads = 2"),
        (GROK_TINY + "[parallel]\nexpert = 3\n", "parallel.expert = 3 doesn't divide model.moe.experts = 8"),
        (GROK_TINY + "[parallel]\npipeline = 7\n", "needs more layers than model.layers = 6"),
        (
            GROK_TINY + "[parallel]\ntensor = 2\n",
            "parallel: tensor 2 doesn't divide into cluster.gpus = 1",
        ),
        (
            GROK_TINY + "[parallel]\ntensor = 2\ndata = 2\npipeline = 1\n",
            "parallel: tensor 2 x pipeline 1 x data 2 = 4 doesn't divide into cluster.gpus = 1",
        ),
        (
            GROK_TINY + "[parallel]\ncontext = 512\n",
            "parallel.context = 512 doesn't divide train.seq_len = 512 into two parts for each rank",
        ),
        (
            GROK_TINY + "[parallel]\nvirtual_stages = 2\nschedule = '1f1b'\n",
            "parallel.schedule = '1f1b' takes virtual_stages = 1, not 2",
        ),
        (
            GROK_TINY + "[parallel]\nvirtual_stages = 1\nschedule = 'interleaved'\n",
            "'interleaved' needs virtual_stages of 2 or more",
        ),
        (
            GROK_TINY + "[parallel]\nvirtual_stages = 2\npipeline = 1\n",
            "parallel.virtual_stages = 2 needs a pipeline of 2 stages or more",
        ),
        ('model = "smollm2-135m"\n[parallel]\nexpert = 2\n', "parallel.expert = 2 needs model.moe.experts, and this"),
        (
            GROK_TINY + '[cluster]\npreset = "h100-superpod"\ngpus = 12\n',
            "gpus = 12 doesn't fill nodes of gpus_per_node = 8",
        ),
    ],
)
def test_degrees_and_sizes_that_do_not_divide_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        loads_run(text)
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.seq_len=128", ("train", "seq_len"), 128),
        ("train.tokens = 2B", ("train", "tokens"), 2 * 10**9),
        ("checkpoint.every=1h", ("checkpoint", "every"), 3600),
        ("train.optimizer=muon", ("train", "optimizer"), "muon"),
        ("train.compile=false", ("train", "compile"), False),
        ('release.to=["gguf"]', ("release", "to"), ["gguf"]),
        ("model.layers=3", ("model", "layers"), 3),
        ("model.moe.experts=16", ("model", "moe", "experts"), 16),
        ("data.text_field=a\nb = 3", ("data", "text_field"), "a\nb = 3"),
    ],
)
def test_an_override_sets_one_field(override: str, field: tuple[str, ...], value: object) -> None:
    found: Any = loads_run(GROK_TINY, [override])
    for name in field:
        found = getattr(found, name)
    assert found == value


def test_later_overrides_win() -> None:
    assert loads_run(GROK_TINY, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_an_override_may_choose_another_model() -> None:
    assert loads_run(GROK_TINY, ["model=smollm2-135m"]).model == model_spec("smollm2-135m")


@pytest.mark.parametrize(
    ("text", "override", "sentence"),
    [
        (GROK_TINY, "train.seqlen=3", "--set train.seqlen: unknown field; did you mean 'train.seq_len'?"),
        (GROK_TINY, "seq_len=3", "did you mean 'train.seq_len'?"),
        (GROK_TINY, "train.seq_len", "it is written field=value"),
        (GROK_TINY, "=3", "it is written field=value"),
        (GROK_TINY, "name=a=b", "name = 'a=b' is not accepted"),
        (GROK_TINY, "train.seq_len=many", "train.seq_len = 'many' is not accepted: it should be a whole number"),
        ("train = 3\n" + GROK_TINY, "train.seq_len=3", "train = 3 in the file is not a table"),
    ],
)
def test_an_override_that_cannot_be_is_refused(text: str, override: str, sentence: str) -> None:
    with pytest.raises(InputError) as refused:
        loads_run(text, [override])
    assert sentence in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run\.toml cannot be read: No such file"):
        load_run(tmp_path / "run.toml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        load_run(tmp_path)
    (tmp_path / "run.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(InputError, match="it isn't UTF-8 text"):
        load_run(tmp_path / "run.toml")


def test_paths_in_a_run_spec_are_taken_from_its_folder_and_stay_valid_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "shape.toml").write_text(
        "layers = 2\nhidden = 64\nheads = 4\nffn_hidden = 8\nvocab = 9\ncontext = 512\n"
    )
    (tmp_path / "run.toml").write_text(
        'model.preset = "shape.toml"\n[data]\nsource = "files"\nfiles = ["text/*.txt", "/elsewhere/a.txt"]\n'
        'tokenizer = "tokenizer.json"\n'
    )
    run = load_run(tmp_path / "run.toml")
    assert (run.model.name, run.model.layers) == ("shape", 2)
    assert run.data.files == [str(tmp_path / "text/*.txt"), "/elsewhere/a.txt"]
    assert run.data.tokenizer == str(tmp_path / "tokenizer.json")
    assert loads_run(dumps(run), folder=Path("/")) == run


def test_ranks_beyond_the_key_value_heads_are_legal_where_they_are_a_multiple_of_them() -> None:
    run = loads_run('model = "grok-1"\n[cluster]\npreset = "h100-superpod"\ngpus = 16\n[parallel]\ntensor = 16\n')
    assert (run.parallel.tensor, run.model.kv_heads) == (16, 8)


def test_every_choice_of_a_layout_may_be_left_to_the_planner() -> None:
    left = loads_run(GROK_TINY).parallel
    assert set(left.model_dump().values()) == {"auto"}
    stated = loads_run(GROK_TINY + '[parallel]\nrecompute = "full"\nrecompute_share = 0.5\nzero_stage = 3\n').parallel
    assert (stated.recompute, stated.recompute_share, stated.zero_stage) == ("full", 0.5, 3)


def test_a_run_spec_is_frozen() -> None:
    run = loads_run(GROK_TINY)
    with pytest.raises(ValueError, match="frozen"):
        run.train.tokens = 3  # type: ignore[misc]


def test_what_is_written_is_toml_that_says_everything() -> None:
    values = tomllib.loads(dumps(loads_run(GROK_TINY)))
    assert set(values) == set(RunSpec.model_fields) - {"adapter"}
    unset = {name for name, field in ModelSpec.model_fields.items() if field.default is None}
    assert set(ModelSpec.model_fields) - set(values["model"]) <= unset


@pytest.mark.parametrize(("tokens", "steps"), [(16_384, 1), (16_385, 2), (1, 1)])
def test_the_last_step_may_be_only_partly_needed(tokens: int, steps: int) -> None:
    run = loads_run(f"{GROK_TINY}[train]\ntokens = {tokens}\nseq_len = 512\nglobal_batch = 32\n")
    assert run.train.steps == steps
