"""How settings are declared, merged, compared and printed. Knows no schema by name; no torch here.

A schema is a frozen dataclass with a default for every setting, or MISSING where one is required. Read next: models.py,
data.py, drawing.py, training.py, measuring.py, jobs.py for the schemas, each beside its concern.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from omegaconf import DictConfig, ListConfig, OmegaConf, read_write
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from flowar.base.errors import UserError

Schema = TypeVar("Schema")
FREE = "free"  # key of a field's metadata


class Dataclass(Protocol):
    """Any instance of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def free(default: Any = dataclasses.MISSING, *, factory: Callable[[], Any] | None = None) -> Any:
    """Declare a setting that may differ when a command is run again on the same folder.

    It doesn't change what is in the folder (how many processes read, where a file lies that its hash identifies), or
    it is meant to be changed on the way (the learning rate of an unstable run). All other settings decide what is in
    the folder, and a call with another value is refused.

    Args:
        default: of the setting.
        factory: makes the default, where it must be made anew each time.
    """
    if factory is not None:
        return dataclasses.field(default_factory=factory, metadata={FREE: True})
    return dataclasses.field(default=default, metadata={FREE: True})


def is_free(schema: type[Any], key: str) -> bool:
    """Return whether a setting, named as `section.name`, or the section that it is in, was declared with `free`."""
    first, _, rest = key.partition(".")
    field = schema.__dataclass_fields__.get(first)
    if field is None:
        return False
    if field.metadata.get(FREE):
        return True
    inner = _dataclass_in(typing.get_type_hints(schema)[first])
    return bool(rest) and inner is not None and is_free(inner, rest)


def decisive_settings(config: Dataclass) -> dict[str, Any]:
    """Return those settings that decide what is in a folder: all that were not declared with `free`."""
    decisive = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.metadata.get(FREE):
            decisive[field.name] = decisive_settings(value) if dataclasses.is_dataclass(type(value)) else value
    return decisive


def extend(schema: type[Schema], config: Dataclass, **more: object) -> Schema:
    """Return a `schema` with the settings of `config`, an instance of one of its base classes, and `more`."""
    return schema(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)} | more)


def load_config(schema: type[Schema], path: str | Path | None = None, overrides: tuple[str, ...] = ()) -> Schema:
    """Return `schema` filled from its defaults, then the YAML at `path`, then `key=value` overrides.

    A section whose class has `start_from` (a model) starts from what that returns for what was given, for example from
    the row that `model.variant=flowar-s` names.

    Raises:
        UserError: if the file can't be read, a key is unknown (names the nearest), a value has the wrong type, or a
            required one is missing.
    """
    given = OmegaConf.merge(_load_yaml(path) if path else {}, _parse_overrides(overrides))
    defaults: Any = OmegaConf.structured(schema)
    try:
        for section, kind in _sections(schema):
            chosen = OmegaConf.select(given, section) if section else given
            if not isinstance(chosen, DictConfig):
                continue
            start = kind.start_from(chosen) if hasattr(kind, "start_from") else None
            if start is not None and not section:
                defaults = OmegaConf.structured(start)
            elif start is not None or (section and OmegaConf.select(defaults, section) is None):
                parent, _, name = section.rpartition(".")
                holder = OmegaConf.select(defaults, parent) if parent else defaults
                with read_write(holder):  # frozen dataclasses make read-only nodes
                    holder[name] = OmegaConf.structured(kind if start is None else start)
        return typing.cast(Schema, OmegaConf.to_object(OmegaConf.merge(defaults, given)))
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UserError(f"{key} is not a setting{did_you_mean(key, _keys(defaults))}") from error
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise UserError(f"{key} is required; give it in the YAML or as {key}=...") from error
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        expected = f" (setting {error.full_key})" if error.full_key else ""
        raise UserError(f"{str(error.msg or error).splitlines()[0]}{expected}") from error


def _sections(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Yield the dotted name and the class of a schema and of all sections below it."""
    yield prefix, schema
    for name, hint in typing.get_type_hints(schema).items():
        inner = _dataclass_in(hint)
        if name in schema.__dataclass_fields__ and inner is not None:
            yield from _sections(inner, f"{prefix}.{name}" if prefix else name)


def _dataclass_in(hint: Any) -> type[Any] | None:
    """Return the dataclass that a type hint names, alone or as `... | None`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((option for option in options if isinstance(option, type) and dataclasses.is_dataclass(option)), None)


def describe_config(config: Dataclass | type[Any]) -> str:
    """Return the resolved config as YAML text, which `load_config` reads back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def describe_changes(before: Dataclass, after: Dataclass) -> str:
    """Return as YAML text in what `after` differs from `before`, both of one schema; `free` settings are left out."""
    changed = OmegaConf.create({})
    for key, (_, value) in changed_settings(before, after).items():
        if not is_free(type(after), key):
            OmegaConf.update(changed, key, value)
    return OmegaConf.to_yaml(changed) if changed else ""


def changed_settings(before: Dataclass, after: Dataclass) -> dict[str, tuple[object, object]]:
    """Return {key: (before, after)} of the settings that differ between two configs of one schema."""
    old, new = (OmegaConf.structured(config) for config in (before, after))
    values = {key: (OmegaConf.select(old, key), OmegaConf.select(new, key)) for key in _keys(old)}
    return {key: pair for key, pair in values.items() if pair[0] != pair[1] and not _is_section(pair[0])}


def _is_section(value: object) -> bool:
    return isinstance(value, DictConfig)


def _load_yaml(path: str | Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"there is no config file {path}") from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{path} is not a YAML config: {' '.join(str(error).split())}") from error
    if isinstance(loaded, ListConfig):
        raise UserError(f"{path} holds a list, but a config is `key: value` lines")
    return loaded


def _parse_overrides(overrides: tuple[str, ...]) -> DictConfig:
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r} is neither a file nor a setting; settings are written key=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except YAMLError as error:
        raise UserError(f"can't read the overrides {list(overrides)}: {' '.join(str(error).split())}") from error


def _keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys = []
    for key in map(str, config):
        keys.append(f"{prefix}{key}")
        if not OmegaConf.is_missing(config, key) and isinstance(config[key], DictConfig):
            keys += _keys(config[key], f"{prefix}{key}.")
    return keys


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return "; did you mean ...?" for the nearest known name, compared whole and by the last part."""
    known = list(known)
    by_last_part = {key.rsplit(".", 1)[-1]: key for key in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    near = near or [by_last_part[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], by_last_part, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(known)}"
