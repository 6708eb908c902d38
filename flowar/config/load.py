"""How settings are declared, merged, compared and printed. Knows no schema by name; no torch here.

A schema is a frozen dataclass with a default for every setting, or MISSING where one is required. Read next: models.py,
data.py, drawing.py, training.py, measuring.py, jobs.py for the schemas, each beside its concern.
"""

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import xxhash
from omegaconf import DictConfig, ListConfig, OmegaConf, ValueNode, read_write
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from flowar.base.errors import UserError
from flowar.base.files import write_text
from flowar.config.kinds import describe_kind, example_of, section_class, shorten

Schema = TypeVar("Schema")
HEAD_COMMENT = "# Written by flowar; the last line has the hash of all others.\n"
HASH_COMMENT = "# xxh3 of the lines above: "
FREE = "free"  # key of a field's metadata
PRESET_KEY = "preset"  # the setting that stands for others
INTERPOLATION = re.compile(r"(\\*)\$\{")  # its beginning, with the backslashes that take its meaning away

ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:")


class FromEnvironment(str):
    """A text that came from an environment variable, by `${oc.env:NAME}`. It may be a secret."""

    source = ""  # what was written instead of it


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
    inner = section_class(typing.get_type_hints(schema)[first])
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
    the row that `model.variant=flowar-s` names. One whose class has `preset_settings` (how images are drawn) gets the
    settings that `preset=` stands for: over the YAML if it is an override, under what is given beside it. One whose
    class has a `plain_setting` (`init.model`) takes a text given for the section itself as that setting: `init=MODEL`.
    A class with `start_parts` says, from what was given, what sections below it start from.

    Raises:
        UserError: if the file can't be read, a key is unknown (names the nearest), a value has the wrong type, or a
            required one is missing.
    """
    words = OmegaConf.merge({}, *(_write_out(schema, _parse_override(override)) for override in overrides))
    layers = [*([_write_out(schema, _load_yaml(path))] if path else []), typing.cast(DictConfig, words)]
    return _fill(schema, typing.cast(DictConfig, OmegaConf.merge(*_resolve_presets(schema, layers))))


def _write_out(schema: type[Any], layer: DictConfig) -> DictConfig:
    """Return a layer of settings with what is given for a whole section at the setting of it that this is short for."""
    for section, kind in _sections(schema):
        if not hasattr(kind, "plain_setting"):
            continue
        *parents, name = section.split(".")
        holder: Any = layer
        for parent in parents:
            holder = holder._get_node(parent) if isinstance(holder, DictConfig) else None
        node: Any = holder._get_node(name) if isinstance(holder, DictConfig) else None
        if isinstance(node, ValueNode):
            holder[name] = {kind.plain_setting: node._value()}
    return layer


def _resolve_presets(schema: type[Any], layers: list[DictConfig]) -> list[DictConfig]:
    """Return layers of settings, each over those before it, with those that the last given presets stand for.

    Raises:
        UserError: if a preset refers to something that isn't in its own layer.
    """
    layers = list(layers)
    for section, kind in _sections(schema):
        if not hasattr(kind, "preset_settings"):
            continue
        key = f"{section}.{PRESET_KEY}" if section else PRESET_KEY
        for number in reversed(range(len(layers))):
            holder = OmegaConf.select(layers[number], section) if section else layers[number]
            if not isinstance(holder, DictConfig) or PRESET_KEY not in holder:
                continue
            try:
                settings = kind.preset_settings(holder[PRESET_KEY])
            except OmegaConfBaseException as error:
                written = OmegaConf.to_container(holder, resolve=False)
                assert isinstance(written, dict)
                raise UserError(_describe_unresolved(key, written[PRESET_KEY], error)) from error
            below = OmegaConf.create({})
            for name, value in settings.items():
                OmegaConf.update(below, f"{section}.{name}" if section else name, value)
            layers[number] = typing.cast(DictConfig, OmegaConf.merge(below, layers[number]))
            break
    return layers


def save_described(config: Dataclass, path: Path) -> None:
    """Write the resolved config as YAML, its hash in the last line; private if some of it came from the environment."""
    text = HEAD_COMMENT + describe_config(config)
    write_text(path, f"{text}{HASH_COMMENT}{_hash(text)}\n", private=has_environment(config))


def load_described(schema: type[Schema], path: str | Path) -> Schema:
    """Return `schema` filled from a file that `save_described` wrote; version 0.1 wrote no hash.

    It is resolved already, so that all in it is literal: `${oc.env:NAME}` in it reads no variable.

    Raises:
        UserError: as `load_config`, naming the file; or if it is not what was written.
    """
    text = Path(path).read_text(errors="replace") if Path(path).is_file() else ""
    written, mark, digest = text.rpartition(HASH_COMMENT)
    if (mark or text.startswith(HEAD_COMMENT[:20])) and digest.strip() != _hash(written):
        raise UserError(
            f"{path} is damaged: its settings don't have the hash in its last line; put it back from a backup, or, if "
            "you know that the settings are right, delete that line"
        )
    values = OmegaConf.to_container(_load_yaml(path), resolve=False)
    assert isinstance(values, dict)
    try:
        return load_values(schema, _unescape(values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _hash(text: str) -> str:
    return xxhash.xxh3_64_hexdigest(text.encode())


def _unescape(value: Any) -> Any:
    """Return what `as_literal` was given."""
    if isinstance(value, dict):
        return {key: _unescape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_unescape(inner) for inner in value]
    return INTERPOLATION.sub(lambda m: m[1][: len(m[1]) // 2] + "${", value) if isinstance(value, str) else value


def load_values(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    """Return `schema` filled from its defaults and from values that somebody else may have written.

    They are taken literally: `${oc.env:NAME}` in one is these characters, and reads no variable.

    Raises:
        UserError: as `load_config`.
    """
    (given,) = _resolve_presets(schema, [_write_out(schema, OmegaConf.create(as_literal(values)))])
    return _fill(schema, given)


def as_literal(value: Any) -> Any:
    """Return a setting's value, in plain dicts and lists, as it has to be written so that it is read literally."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_literal(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: as_literal(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_literal(inner) for inner in value]
    return INTERPOLATION.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def as_word(key: str, written: Any) -> str:
    """Return `key=value` with what would be written for a setting in a YAML file, in plain dicts and lists."""
    return f"{key}={json.dumps(written)}"


def _fill(schema: type[Schema], given: DictConfig) -> Schema:
    """Return `schema` filled from its defaults and what is given; errors as `load_config`."""
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
            if hasattr(kind, "start_parts"):
                holder = OmegaConf.select(defaults, section) if section else defaults
                with read_write(holder):
                    for name, part in kind.start_parts(chosen).items():
                        holder[name] = OmegaConf.structured(part)
        merged = OmegaConf.merge(defaults, given)
        filled = typing.cast(Schema, OmegaConf.to_object(merged))
        return typing.cast(Schema, _mark_environment(OmegaConf.to_container(merged, resolve=False), filled))
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise UserError(f"{key} is not a setting{did_you_mean(key, _keys(defaults))}") from error
    except MissingMandatoryValue as error:
        key = str(error.full_key)
        raise UserError(f"{key} is required; give it in the YAML or as {key}=...") from error
    except (OmegaConfBaseException, TypeError) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        explained = _explain(defaults, given)
        if explained is None:
            raise
        raise UserError(explained) from error


def _explain(defaults: DictConfig, given: DictConfig) -> str | None:
    """Return which of the given values is wrong, what is needed instead, and an example."""
    values = [*_given_values(defaults, given)]
    for holder, key, value in values:
        try:
            OmegaConf.merge(holder, {key.rpartition(".")[2]: value})
        except (ValidationError, TypeError):
            return _describe_wrong(holder, key, value)
        except OmegaConfBaseException as error:
            return _describe_unresolved(key, value, error)
    for holder, key, value in values:  # now that all fit, what they refer to
        parts = {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
        for part, written in parts.items():
            try:
                OmegaConf.select(OmegaConf.merge(defaults, given), part)
            except (ValidationError, TypeError):
                return _describe_wrong(holder, key, value)
            except OmegaConfBaseException as error:
                return _describe_unresolved(part, written, error)
    return None


def _describe_wrong(holder: DictConfig, key: str, value: object) -> str:
    """Return that a value is of the wrong kind, what kind is needed, and an example."""
    name = key.rpartition(".")[2]
    schema = OmegaConf.get_type(holder)
    assert schema is not None
    hint = typing.get_type_hints(schema)[name]
    if section := section_class(hint):
        hints = typing.get_type_hints(section)
        first = next(field for field in dataclasses.fields(section) if section_class(hints[field.name]) is None)
        example = f"{key}.{first.name}={example_of(hints[first.name], first.default)}"
    else:
        defaults = OmegaConf.to_container(holder)
        assert isinstance(defaults, dict)
        example = f"{key}={example_of(hint, defaults[name])}"
    return f"{key}={shorten(value)} is wrong: it must be {describe_kind(hint)}; for example {example}"


def _describe_unresolved(key: str, value: object, error: OmegaConfBaseException) -> str:
    """Return that a value refers to something that isn't there, or is written wrongly."""
    before, _, reason = str(error.msg or error).splitlines()[0].partition(" while resolving interpolation: ")
    return (
        f"{key}={shorten(value)} can't be resolved: {reason or before}; set what it names, or give a value (a plain "
        "${ is written \\${)"
    )


def _given_values(holder: DictConfig, given: DictConfig, prefix: str = "") -> Iterator[tuple[DictConfig, str, Any]]:
    """Yield each given setting's section with its defaults, its whole name, and what was written for it."""
    written = OmegaConf.to_container(given, resolve=False)
    assert isinstance(written, dict)
    for name, value in written.items():
        inner = holder._get_node(name)
        if isinstance(value, dict) and isinstance(inner, DictConfig) and section_class(OmegaConf.get_type(inner)):
            yield from _given_values(inner, given[name], f"{prefix}{name!s}.")
        else:
            yield holder, f"{prefix}{name!s}", value


def _mark_environment(written: Any, value: Any) -> Any:
    """Return a value in which the texts that came from the environment are known as such.

    Args:
        written: the same with what was written for each setting.
        value: dataclasses, dicts, lists and tuples of settings.
    """
    if isinstance(written, dict) and dataclasses.is_dataclass(value):
        for name, inner in written.items():
            object.__setattr__(value, name, _mark_environment(inner, getattr(value, name)))
    elif isinstance(written, dict) and isinstance(value, dict):
        return {name: _mark_environment(written[name], inner) for name, inner in value.items()}
    elif isinstance(written, list | tuple) and isinstance(value, list | tuple):
        return type(value)(_mark_environment(*pair) for pair in zip(written, value, strict=True))
    elif isinstance(written, str) and type(value) is str and ENVIRONMENT.search(written):
        value = FromEnvironment(value)
        value.source = written
    return value


def has_environment(value: Any) -> bool:
    """Return whether a text in a config, section, dict or list came from the environment: a file with it is private."""
    if dataclasses.is_dataclass(value):
        return any(has_environment(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, dict):
        return any(map(has_environment, value.values()))
    return any(map(has_environment, value)) if isinstance(value, list | tuple) else isinstance(value, FromEnvironment)


def _sections(schema: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    """Yield the dotted name and the class of a schema and of all sections below it."""
    yield prefix, schema
    for name, hint in typing.get_type_hints(schema).items():
        inner = section_class(hint)
        if name in schema.__dataclass_fields__ and inner is not None:
            yield from _sections(inner, f"{prefix}.{name}" if prefix else name)


def describe_config(config: Dataclass | type[Any]) -> str:
    """Return the resolved config as YAML text, which `load_config` reads back to an equal value."""
    described = OmegaConf.structured(config) if isinstance(config, type) else OmegaConf.create(as_literal(config))
    return OmegaConf.to_yaml(described)


def describe_changes(before: Dataclass, after: Dataclass) -> str:
    """Return as YAML text in what `after` differs from `before`, both of one schema; `free` settings are left out."""
    changed = OmegaConf.create({})
    for key, (_, value) in changed_settings(before, after).items():
        if not is_free(type(after), key):
            OmegaConf.update(changed, key, as_literal(value))
    return OmegaConf.to_yaml(changed) if changed else ""


def changed_settings(before: Dataclass, after: Dataclass | None) -> dict[str, tuple[object, object]]:
    """Return {key: (before, after)} of the settings that differ between two configs of one schema."""
    changed: dict[str, tuple[object, object]] = {}
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(after, field.name, None)
        if dataclasses.is_dataclass(old) and not isinstance(old, type):
            inner = changed_settings(old, new)
            changed |= {f"{field.name}.{key}": pair for key, pair in inner.items()}
        elif as_literal(old) != as_literal(new):
            changed[field.name] = (old, new)
    return changed


def _load_yaml(path: str | Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        there = [str(file) for file in sorted(Path(path).parent.glob("[!.]*.y*ml"))]
        hint = did_you_mean(str(path), there) if there else "; give the path of a YAML file, or settings as key=value"
        raise UserError(f"there is no config file {path}{hint}") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise UserError(f"{path} is not a YAML config: {' '.join(str(error).split())}") from error
    if isinstance(loaded, ListConfig):
        raise UserError(f"{path} holds a list, but a config is `key: value` lines")
    return loaded


def _parse_override(override: str) -> DictConfig:
    if "=" not in override:
        raise UserError(f"{override!r} is neither a file nor a setting; settings are written key=value")
    try:
        return OmegaConf.from_dotlist([override])
    except OmegaConfBaseException as error:
        key, _, value = override.partition("=")
        raise UserError(_describe_unresolved(key, value, error)) from error
    except YAMLError as error:
        reason = " ".join(str(error).split())
        quoted = f"'{override.partition('=')[0]}=\"...\"'"
        raise UserError(
            f"can't read the setting {override!r}: {reason}; a text with such signs needs quotes of its own: {quoted}"
        ) from error


def setting_names(schema: type[Any]) -> list[str]:
    """Return the names of all settings of a schema, in sections `section.name`."""
    return _keys(OmegaConf.structured(schema))


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
    listed = [key for key in known if "." not in key] or known  # of settings, the sections alone
    return f"; did you mean {near[0]}?" if near else f"; there are: {', '.join(listed)}"
