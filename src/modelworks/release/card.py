"""The model card: what a run's own records say, put into a template. What a run didn't record is said to be so."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from modelworks import __version__
from modelworks.release.agreement import Agreement
from modelworks.release.runs import RunContent
from modelworks.spec.huggingface import layout_of

_UNKNOWN = "not recorded"
_PLANNED = (
    ("step time, s", ("step_time_s", "step_s"), "step_time_s"),
    ("tokens per second", ("tokens_per_s",), "tokens_per_s"),
    ("MFU", ("mfu",), "mfu"),
)


def model_card(
    run: RunContent, agreements: Mapping[str, Agreement], evaluations: Iterable[Mapping[str, Any]] = ()
) -> str:
    """The text of ``README.md``, with the front matter that the Hugging Face hub reads."""
    model = run.spec.model
    template = Template(files("modelworks.release").joinpath("model_card.md").read_text(encoding="utf-8"))
    return template.substitute(
        name=run.spec.name,
        license=run.spec.release.license,
        license_id=run.spec.release.license.lower(),
        layout=layout_of(model),
        summary=f"A decoder-only transformer of {model.parameters.total:,} parameters, of which a token uses "
        f"{model.parameters.active:,}, trained on {_number(_tokens(run))} tokens.",
        architecture=_table(("", ""), _architecture(run)),
        data=_table(("", ""), _data(run)),
        training=_table(("", ""), _training(run)),
        plan=_plan(run),
        verification=_verification(agreements),
        evaluations=_evaluations(evaluations),
        origin=_origin(run),
        seq_len=run.spec.train.seq_len,
        version=__version__,
    )


def _origin(run: RunContent) -> str:
    """What the weights come from."""
    if run.spec.train.init_from is None:
        return "This model was trained from scratch on the data above"
    how = "with an adapter " if run.spec.adapter is not None else ""
    base = Path(run.spec.train.init_from).name
    return f"This model began with the weights of {base} and was trained {how}on the data above"


def _architecture(run: RunContent) -> list[tuple[str, str]]:
    model = run.spec.model
    rows = [
        ("layers", model.layers),
        ("width", model.hidden),
        ("attention heads", f"{model.heads} ({model.kv_heads} for keys and values) of {model.head_dim}"),
        ("feed-forward width", model.ffn_hidden),
        ("vocabulary", model.vocab),
        ("context", model.context),
        ("parameters", f"{model.parameters.total:,} ({model.parameters.active:,} active)"),
    ]
    if model.moe is not None:
        rows.insert(
            4, ("experts", f"{model.moe.experts} of width {model.moe.expert_hidden}, {model.moe.top_k} per token")
        )
    return [(name, str(value)) for name, value in rows]


def _data(run: RunContent) -> list[tuple[str, str]]:
    manifest = run.data_manifest
    return [
        ("source", str(manifest.get("source", run.spec.data.source))),
        ("documents", _number(manifest.get("documents"))),
        ("bytes of text", _number(manifest.get("bytes"))),
        ("tokens", _number(manifest.get("tokens"))),
        ("records that couldn't be read", _number(manifest.get("bad_records", {}).get("count"))),
    ]


def _training(run: RunContent) -> list[tuple[str, str]]:
    train, last = run.spec.train, run.metrics[-1] if run.metrics else {}
    validated = [row["validation_bpb"] for row in run.metrics if isinstance(row.get("validation_bpb"), (int, float))]
    bpb = validated[-1] if validated else run.status.get("validation_bpb")
    return [
        ("steps", _number(run.status.get("step") or last.get("step"))),
        ("tokens", _number(_tokens(run))),
        ("sequence length", str(train.seq_len)),
        ("global batch", f"{train.global_batch} sequences"),
        ("optimizer", train.optimizer),
        ("final training loss (cross-entropy, nats per token)", _number(last.get("cross_entropy", last.get("loss")))),
        ("validation bits per byte", _number(bpb)),
        ("checkpoint", run.checkpoint.name),
    ]


def _plan(run: RunContent) -> str:
    """What was predicted before the run, beside the median of what was measured."""
    rows = []
    for name, planned_keys, measured_key in _PLANNED:
        planned = next((run.plan[key] for key in planned_keys if isinstance(run.plan.get(key), (int, float))), None)
        measured = _median(row.get(measured_key) for row in run.metrics)
        if planned is not None or measured is not None:
            rows.append((name, _number(planned), _number(measured)))
    return _table(("", "planned", "measured (median)"), rows) if rows else "Nothing of this was recorded."


def _verification(agreements: Mapping[str, Agreement]) -> str:
    if not agreements:
        return "No GGUF file was made."
    rows = [
        (
            file,
            str(found.prompts),
            f"{found.largest_difference:.2g}",
            f"{found.mean_difference:.2g}",
            f"{found.same_first_choice:.0%}",
        )
        for file, found in agreements.items()
    ]
    header = ("file", "prompts", "largest difference", "mean total variation", "same first choice")
    return _table(header, rows)


def _evaluations(reports: Iterable[Mapping[str, Any]]) -> str:
    """The scores that were kept of these weights, the newest of each task and metric."""
    newest: dict[tuple[str, str], tuple[str, str, str, str]] = {}
    for report in reports:
        for task, metrics in report["scores"].items():
            samples = str(report["tasks"].get(task, {}).get("samples", ""))
            for metric, score in metrics.items():
                row = (report["date"], _number(score["value"]), _number(score["standard_error"]), samples)
                newest[task, metric] = max(newest.get((task, metric), row), row)
    rows = [
        (task, metric.removesuffix(",none"), value, error, samples, date[:10])
        for (task, metric), (date, value, error, samples) in sorted(newest.items())
    ]
    header = ("task", "metric", "score", "standard error", "samples", "date")
    return _table(header, rows) if rows else "None was kept."


def _tokens(run: RunContent) -> Any:
    return run.status.get("tokens") or (run.metrics[-1].get("tokens") if run.metrics else None)


def _median(values: Iterable[Any]) -> float | None:
    known = sorted(value for value in values if isinstance(value, (int, float)))
    return known[len(known) // 2] if known else None


def _number(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return _UNKNOWN
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write_verification(path: Path, agreements: Mapping[str, Agreement]) -> Path:
    """The same figures for programs."""
    path.write_text(json.dumps({file: found.as_dict() for file, found in agreements.items()}, indent=2) + "\n")
    return path
