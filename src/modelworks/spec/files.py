"""Run specs in and out of files: presets filled in, overrides applied, written back exactly.

`load_run` reads a run spec, `dumps` writes any section as TOML; reading back what was written gives an equal spec.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tomli_w

from modelworks.spec import catalog
from modelworks.spec.errors import InputError
from modelworks.spec.fields import Section, dotted_keys, nearest, validate
from modelworks.spec.hardware import ClusterSpec, DeviceSpec
from modelworks.spec.huggingface import model_from_config
from modelworks.spec.model import ModelSpec
from modelworks.spec.run import RunSpec


def load_run(path: str | Path, overrides: Iterable[str] = ()) -> RunSpec:
    """Read a run spec from a TOML file.

    Parameters
    ----------
    path
        The file.
    overrides
        ``"a.b=value"``: values as TOML writes them; a bare word is taken as a string.

    Raises
    ------
    InputError
        Naming the file, the field, the value and what is accepted.
    """
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
        raise InputError(f"the run spec {path} cannot be read: {reason}") from None
    return loads_run(text, overrides, where=str(path), folder=path.parent)


def loads_run(text: str, overrides: Iterable[str] = (), where: str = "run spec", folder: Path | None = None) -> RunSpec:
    """Read a run spec from TOML text; relative paths in it are taken from `folder`."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not TOML: {error}") from None
    for override in overrides:
        _override(values, override)
    return run_from(values, where, folder)


def run_from(values: Mapping[str, Any], where: str = "run spec", folder: Path | None = None) -> RunSpec:
    """Build a run spec from plain values, presets filled in."""
    values = dict(values)
    model = values.get("model")
    if isinstance(model, str):
        model = {"preset": model}
    if isinstance(model, Mapping):
        values["model"] = _with_preset("models", model, folder)
    cluster = values.get("cluster")
    if isinstance(cluster, str):
        cluster = {"preset": cluster}
    if isinstance(cluster, Mapping):
        values["cluster"] = _with_preset("clusters", cluster, folder)
    return validate(RunSpec, values, where)


def model_spec(name: str | Path) -> ModelSpec:
    """A model by its catalog name, by the path of a TOML file, or by that of a Hugging Face ``config.json``."""
    text = str(name)
    if text.endswith(".json"):
        return model_from_config(text)
    return validate(ModelSpec, _with_preset("models", {"preset": text}, None), where=f"model {text}")


def cluster_spec(name: str | Path, gpus: int | None = None) -> ClusterSpec:
    """A cluster by its catalog name or the path of a TOML file, with another number of devices if given."""
    given = {"preset": str(name)} | ({"gpus": gpus} if gpus is not None else {})
    return validate(ClusterSpec, _with_preset("clusters", given, None), where=f"cluster {name}")


def device_spec(name: str | Path) -> DeviceSpec:
    """A device by its catalog name or the path of a hardware file."""
    found = catalog.entry("hardware", str(name))
    return validate(DeviceSpec, {"name": found.name} | found.values, where=f"hardware {name}")


def dumps(section: Section) -> str:
    """Write a section as TOML; what is unset is left out."""
    return tomli_w.dumps(section.model_dump(mode="json", exclude_none=True))


def _with_preset(kind: catalog.Kind, given: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The preset's fields with the given ones over them."""
    given = dict(given)
    config = given.pop("hf", None) if kind == "models" else None
    preset = given.get("preset")
    base: dict[str, Any] = {}
    if config is not None:
        if preset is not None:
            raise InputError("model: give either preset or hf, not both")
        base = model_from_config(_from_folder(str(config), folder)).model_dump(exclude_none=True)
    elif isinstance(preset, str):
        found = catalog.entry(kind, _from_folder(preset, folder) if preset.endswith(".toml") else preset)
        base = {"name": found.name} | found.values
    return _merge(base, given)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _from_folder(path: str, folder: Path | None) -> str:
    expanded = Path(path).expanduser()
    return str(expanded if folder is None or expanded.is_absolute() else folder / expanded)


def _override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in plain values."""
    field, equals, text = override.partition("=")
    field = field.strip()
    known = [*dotted_keys(RunSpec), "model.hf"]
    if not equals or not field:
        raise InputError(f"--set {override!r} is not accepted: it is written field=value, such as train.seq_len=512")
    if field not in known and not field.startswith(("model.rope_scaling.",)):
        raise InputError(
            f"--set {field}: unknown field; "
            + nearest(field, known, [k for k in known if k.rsplit(".", 1)[-1] == field])
        )
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables, key = field.split(".")
    table = values
    for name in tables:
        inner = table.get(name, {})
        # A section given by its preset's name alone ("model = 'grok-tiny'") becomes a table.
        table[name] = {"preset": inner} if isinstance(inner, str) else dict(inner)
        table = table[name]
    table[key] = value
