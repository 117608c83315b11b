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
from modelworks.spec.home import hardware_file
from modelworks.spec.huggingface import model_from_config
from modelworks.spec.model import ModelSpec
from modelworks.spec.run import RunSpec
from modelworks.spec.stages import chain, one_stage

_PRESETS: dict[str, catalog.Kind] = {"model": "models", "cluster": "clusters"}
_OPEN_TABLES = ("simulate.causes.", "launch.environment.", "launch.kubernetes.node_selector.")
"""Tables whose keys are the user's own."""
_MODEL_EXAMPLE = 'give a preset (model = "grok-tiny"), a config (model.hf = "config.json") or the fields themselves'


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
    """Build a run spec from plain values, presets filled in and paths made absolute."""
    values = dict(values)
    if "model" not in values:
        raise InputError(f"{where}: 'model' is missing: {_MODEL_EXAMPLE}")
    for section, kind in _PRESETS.items():
        given = values.get(section)
        if isinstance(given, str):
            given = {"preset": given}
        if isinstance(given, Mapping):
            values[section] = _with_preset(kind, given, folder)
    cluster, data = values.get("cluster"), values.get("data")
    if isinstance(cluster, dict) and str(cluster.get("device", "")).endswith(".toml"):
        cluster["device"] = _from_folder(cluster["device"], folder)
    if isinstance(data, Mapping):
        values["data"] = _with_paths(data, folder)
    train = values.get("train")
    if isinstance(train, Mapping) and isinstance(train.get("init_from"), str) and "/" in train["init_from"]:
        values["train"] = {**train, "init_from": _from_folder(train["init_from"], folder)}
    stages = values.get("stages")
    if isinstance(stages, list):
        values["stages"] = [_with_paths(stage, folder) if isinstance(stage, Mapping) else stage for stage in stages]
    spec = validate(RunSpec, values, where)
    if spec.stage:
        return one_stage(spec, spec.stage)
    chain(spec)
    return spec


def model_spec(name: str | Path) -> ModelSpec:
    """A model by its catalog name, by the path of a TOML file, or by that of a Hugging Face ``config.json``."""
    text = str(name)
    if text.endswith(".json"):
        return model_from_config(text, planning=True)
    return validate(ModelSpec, _with_preset("models", {"preset": text}, None), where=f"model {text}")


def cluster_spec(name: str | Path, gpus: int | None = None) -> ClusterSpec:
    """A cluster by its catalog name or the path of a TOML file, with another number of devices if given."""
    given = {"preset": str(name)} | ({"gpus": gpus} if gpus is not None else {})
    return validate(ClusterSpec, _with_preset("clusters", given, None), where=f"cluster {name}")


def device_spec(name: str | Path) -> DeviceSpec:
    """A device by its catalog name or the path of a hardware file.

    ``local`` is this machine as `modelworks bench` measured it, or the catalog's stand-in before that.
    """
    measured = hardware_file()
    found = catalog.entry("hardware", str(measured) if name == "local" and measured.is_file() else str(name))
    return validate(
        DeviceSpec, {"name": str(name) if name == "local" else found.name} | found.values, where=f"hardware {name}"
    )


def dumps(section: Section) -> str:
    """Write a section as TOML; what is unset is left out."""
    return tomli_w.dumps(section.model_dump(mode="json", exclude_none=True))


def _with_preset(kind: catalog.Kind, given: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """The preset's fields with the given ones over them.

    The name of a catalog entry stays in the result; a file's path doesn't, since the result stands without the file.
    """
    given = dict(given)
    config = given.pop("hf", None) if kind == "models" else None
    preset = given.get("preset")
    base: dict[str, Any] = {}
    if config is not None:
        if preset is not None:
            raise InputError("model: give either preset or hf, not both")
        base = model_from_config(_from_folder(str(config), folder), planning=True).model_dump(exclude_none=True)
    elif isinstance(preset, str):
        if preset.endswith(".toml"):
            preset = _from_folder(given.pop("preset"), folder)
        found = catalog.entry(kind, preset)
        base = {"name": found.name} | found.values
    scaling, over = base.get("rope_scaling"), given.get("rope_scaling")
    if isinstance(scaling, Mapping) and isinstance(over, Mapping) and over.get("rope_type", over.get("type")):
        base = base | {"rope_scaling": {}}  # another kind has other fields
    return _merge(base, given)


def _with_paths(data: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """A data section whose files are absolute paths, so that a run finds them from anywhere."""
    data = dict(data)
    files, tokenizer = data.get("files"), data.get("tokenizer")
    if isinstance(files, list):
        data["files"] = [_from_folder(file, folder) if _is_path(file) else file for file in files]
    if isinstance(tokenizer, str) and tokenizer != "bpe":
        data["tokenizer"] = _from_folder(tokenizer, folder)
    template = data.get("chat_template")
    if isinstance(template, str) and template != "auto":
        data["chat_template"] = _from_folder(template, folder)
    return data


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged


def _is_path(file: Any) -> bool:
    """Whether an entry of `data.files` is a path, and not a URL."""
    return isinstance(file, str) and "://" not in file


def _from_folder(path: str, folder: Path | None) -> str:
    return str((folder or Path()).absolute() / Path(path).expanduser())


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Plain values of a run spec with ``"a.b=value"`` set in them."""
    changed = dict(values)
    for override in overrides:
        _override(changed, override)
    return changed


def _override(values: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in plain values."""
    field, equals, text = override.partition("=")
    field = field.strip()
    known = [*dotted_keys(RunSpec), "model.hf"]
    if not equals or not field:
        raise InputError(f"--set {override!r} is not accepted: it is written field=value, such as train.seq_len=512")
    if field not in known and not field.startswith(_OPEN_TABLES):
        raise InputError(
            f"--set {field}: unknown field; "
            + nearest(field, known, [k for k in known if k.rsplit(".", 1)[-1] == field])
        )
    *tables, key = field.split(".")
    table = values
    for name in tables:
        # A run's cluster is this machine unless the file says otherwise; what isn't overridden stays that machine's.
        inner = table.get(name, {"preset": "local"} if name == "cluster" and table is values else {})
        # A section given by its preset's name alone ("model = 'grok-tiny'") becomes a table.
        if isinstance(inner, str) and name in _PRESETS:
            inner = {"preset": inner}
        if not isinstance(inner, dict):
            raise InputError(f"--set {field}: {name} = {inner!r} in the file is not a table")
        table[name] = dict(inner)
        table = table[name]
    table[key] = _value(text.strip())


def _value(text: str) -> Any:
    """A value as TOML writes it; what TOML can't read is taken as text."""
    try:
        read = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return read["value"] if len(read) == 1 else text
