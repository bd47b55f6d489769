"""YAML + command line -> dataclass. The dataclass is the only place where a default is written.

A config is a dataclass whose fields are scalars, lists, dicts or other dataclasses (one level of nesting is one level of
YAML). `parse_config(Config)` reads `--config FILE`, then lets flags win:

    --dataset.horizon 10    --dataset.horizon=10    --horizon 10 (a name that only one group has)    --grad-clip 1 (- is _)
    --augment  --augment True  --no-augment         --cameras camera1 camera3

`--help` prints every field with its default and the comment that stands behind it in the source.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import io
import math
import re
import sys
import textwrap
import tokenize
import types
import typing
from pathlib import Path

import yaml


class ConfigError(ValueError):
    """A key or value the dataclass does not accept; the message names it, what was expected, and the nearest real key."""


def parse_config(cls, argv=None, aliases=None, partial=False):
    """Return an instance of the dataclass `cls` from `argv` (default: the command line).

    `aliases` maps a guide's flag to a field, e.g. {"resume": "resume_from_checkpoint"}. `partial` ignores keys of the YAML file
    that `cls` lacks, for a program that needs a part of another one's config. On the command line a mistake ends the
    program with its message and exit code 2; with an explicit `argv` it raises ConfigError.
    """
    if argv is not None:
        return _parse(cls, list(argv), aliases or {}, partial)
    try:
        return _parse(cls, sys.argv[1:], aliases or {}, partial)
    except ConfigError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def save_config(cfg, path):
    """Write every resolved value to `path` (YAML), in the form that --config reads."""
    Path(path).write_text(
        yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def fields_of(cls, prefix=""):
    """{dotted name: (type, default, comment)} for every leaf field of a nested config dataclass."""
    hints, comments, out = typing.get_type_hints(cls), _comments(cls), {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            out |= fields_of(kind, f"{prefix}{field.name}.")
        else:
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            out[prefix + field.name] = (kind, default, comments.get(field.name, ""))
    return out


def _parse(cls, argv, aliases, partial):
    fields = fields_of(cls)
    flags = _split_flags(argv)
    if any(name in ("help", "h") for name, _ in flags):
        print(_help(cls, fields, aliases))
        sys.exit(0)
    values = {}
    for name, given in flags:
        if name == "config":
            if len(given) != 1:
                raise ConfigError(f"--config expects one YAML file, got {given}")
            values |= _read_yaml(given[0], fields, partial)
    for name, given in flags:
        if name == "config":
            continue
        key, negated = _resolve(name, fields, aliases)
        if negated and given:
            raise ConfigError(f"--{name} takes no value, got {given}; write --{name} or --{key} true|false")
        values[key] = False if negated else _from_flag(key, fields[key][0], given)
    return _build(cls, values)


def _split_flags(argv):
    """['--a', '1', '--b=2'] -> [('a', ['1']), ('b', ['2'])]. A value starts with anything but '--' ('-1' is a number)."""
    flags = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, eq, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if eq else []))
        elif word == "-h":
            flags.append(("help", []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise ConfigError(f"unexpected argument '{word}': arguments are --key value; try --help")
    return flags


def _resolve(name, fields, aliases):
    """Flag name -> (dotted field, negated?)."""
    name = aliases.get(name, name)
    if name in fields:
        return name, False
    leaves = [key for key in fields if key.rsplit(".", 1)[-1] == name]
    if len(leaves) == 1:
        return leaves[0], False
    if len(leaves) > 1:
        raise ConfigError(
            f"--{name} could be any of {', '.join('--' + leaf for leaf in leaves)}: write the one you mean"
        )
    if name.startswith("no_"):
        try:
            key, _ = _resolve(name[3:], fields, aliases)
        except ConfigError:
            key = None
        if key and fields[key][0] is bool:
            return key, True
    raise ConfigError(_unknown("--", name, list(fields) + list(aliases)))


def _unknown(prefix, name, known):
    near = difflib.get_close_matches(name, known, 1, 0.0) or known[:1]
    leaf = difflib.get_close_matches(name.rsplit(".", 1)[-1], [k.rsplit(".", 1)[-1] for k in known], 1, 0.7)
    best = next((k for k in known if leaf and k.rsplit(".", 1)[-1] == leaf[0]), near[0])
    return f"unknown key '{prefix}{name}'; did you mean '{prefix}{best}'? (--help lists all keys)"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice; PyYAML would silently keep the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise ConfigError(f"{node.start_mark.name}: key '{key}' is written twice; keep one")
        return super().construct_mapping(node, deep)


def _read_yaml(path, fields, partial):
    if not Path(path).is_file():
        raise ConfigError(f"--config {path}: no such file; ready-made ones are in configs/")
    try:
        with open(path, encoding="utf-8") as stream:
            tree = yaml.load(stream, _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(tree or {}, dict):
        raise ConfigError(f"{path} must hold 'key: value' lines, found a {type(tree).__name__}")
    groups = {key.rsplit(".", i)[0] for key in fields for i in range(1, key.count(".") + 1)}
    values = {}

    def walk(node, prefix):
        for key, value in node.items():
            dotted = f"{prefix}{key}"
            if dotted in fields:
                values[dotted] = _coerce(f"{path}: {dotted}", fields[dotted][0], value)
            elif dotted in groups:
                if not isinstance(value or {}, dict):
                    raise ConfigError(
                        f"{path}: '{dotted}' is a group of keys, got {value!r}; write {dotted}: {{key: value}}"
                    )
                walk(value or {}, dotted + ".")
            elif not partial:
                raise ConfigError(f"{path}: " + _unknown("", dotted, list(fields)))

    walk(tree or {}, "")
    return values


def _from_flag(key, kind, given):
    name = f"--{key}"
    if kind is bool and not given:
        return True
    base = _strip_none(kind)
    is_list = typing.get_origin(base) is list
    if len(given) != 1 and not is_list:
        raise ConfigError(f"{name} expects one value ({_type_name(kind)}), got {given or 'none'}")
    value = given if is_list else given[0]
    if base is dict or (is_list and len(given) == 1 and given[0].startswith("[")):
        try:
            value = yaml.load(given[0], _Loader)
        except yaml.YAMLError:
            raise ConfigError(
                f"{name}: expected {'[a, b] or a b' if is_list else '{key: value}'}, got {given[0]!r}"
            ) from None
    elif is_list and len(given) == 1:
        value = given[0].split(",")
    return _coerce(name, kind, value)


def _strip_none(kind):
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(arg for arg in typing.get_args(kind) if arg is not type(None))
    return kind


def _coerce(name, kind, value):
    """Turn `value` (from YAML or a flag) into `kind`; 5e-5 is a number although PyYAML reads a string, 'false' is no true."""
    base = _strip_none(kind)
    if base is not kind and (value is None or (isinstance(value, str) and value.lower() in ("", "null", "none"))):
        return None
    wrong = ConfigError(f"{name}: expected {_type_name(kind)}, got {value!r}")
    origin = typing.get_origin(base)
    if origin is typing.Literal:
        for choice in typing.get_args(base):  # a bare no, off, yes, on in YAML arrives as a bool
            if value == choice or (isinstance(value, bool) and yaml.safe_load(str(choice)) is value):
                return choice
        raise wrong
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise wrong
        return [_coerce(f"{name}[{i}]", typing.get_args(base)[0], v) for i, v in enumerate(value)]
    if base is dict:
        if not isinstance(value, dict):
            raise wrong
        return value
    if base is bool:
        text = str(value).lower()
        if text in ("true", "yes", "on", "1"):
            return True
        if text in ("false", "no", "off", "0"):
            return False
        raise wrong
    if base in (int, float):
        if isinstance(value, bool):
            raise wrong
        if base is int and re.fullmatch(r"[-+]?\d+", str(value)):
            return int(value)  # not by way of a float, which is exact to 2**53 only
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise wrong from None
        if math.isnan(number) or (base is int and not number.is_integer()):
            raise wrong
        return base(number)
    if base is str:
        if (
            isinstance(value, (dict, list, bool)) or value is None
        ):  # a bool: YAML reads a bare on, off, yes, no as one; quote it
            raise wrong
        return str(value)
    raise TypeError(f"{name}: the config dataclass uses an unsupported type {kind}")


def _type_name(kind):
    base = _strip_none(kind)
    origin, args = typing.get_origin(base), typing.get_args(base)
    text = (
        " | ".join(map(str, args))
        if origin is typing.Literal
        else f"list of {args[0].__name__}"
        if origin is list
        else base.__name__
    )
    return text + (" or null" if base is not kind else "")


def _build(cls, values, prefix=""):
    kwargs = {}
    for field in dataclasses.fields(cls):
        kind = typing.get_type_hints(cls)[field.name]
        if dataclasses.is_dataclass(kind):
            kwargs[field.name] = _build(kind, values, f"{prefix}{field.name}.")
        elif prefix + field.name in values:
            kwargs[field.name] = values[prefix + field.name]
    return cls(**kwargs)


@functools.cache
def _comments(cls):
    """{field: trailing comment} read from the source of the dataclass and of those it inherits from."""
    out = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        source = textwrap.dedent(inspect.getsource(base))
        by_line = {
            tok.start[0]: tok.string.lstrip("# ")
            for tok in tokenize.generate_tokens(io.StringIO(source).readline)
            if tok.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):  # a default over several lines may carry its comment on any of them
                out[node.target.id] = " ".join(
                    by_line[line] for line in range(node.lineno, node.end_lineno + 1) if line in by_line
                )
    return out


def _help(cls, fields, aliases):
    lines = [
        f"usage: {Path(sys.argv[0]).name} [--config FILE.yaml] [--key value ...]",
        "",
        "Flags win over the YAML file. Keys, types and defaults:",
        "",
    ]
    width = max(len(key) for key in fields) + 2
    for key, (kind, default, comment) in fields.items():
        also = "".join(f" (also --{flag})" for flag, field in aliases.items() if field == key)
        lines.append(f"  --{key:<{width}} {comment}{also} [{_type_name(kind)}; default {default!r}]")
    return "\n".join(lines)
