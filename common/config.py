"""YAML + command line -> dataclass, with tyro. The dataclass is the only place where a default is written.

A --config file becomes flags in front of the user's own; of two equal flags the later one wins; tyro parses the types.

    --dataset.horizon 10   --horizon 10 (a name that only one group has)   --grad-clip=1 (- is _)   --resume null
    --augment   --augment true   --no-augment   --cameras camera1 camera3"""

import contextlib
import dataclasses
import difflib
import io
import os
import re
import sys
import typing

import tyro
import yaml

from common import UserError, require
from common.checkpoint import flat


def parse_config(cls, argv=None, aliases=None, partial=False, accepted=None):
    """-> an instance of cls. `aliases` {a guide's flag: field}; `partial`: a YAML file may have keys that cls lacks.
    `accepted` {a guide's YAML key that cls lacks: values that mean what the program does anyway, or None for any}."""
    kinds, flags, words = fields_of(cls), [], []
    for word in sys.argv[1:] if argv is None else argv:  # ['--a', '1', '--b=2'] -> [('a', ['1']), ('b', ['2'])]
        if match := re.fullmatch(r"--([A-Za-z][\w.-]*)(?:=(.*))?", word, re.DOTALL):
            flags.append((match[1].replace("-", "_"), [] if match[2] is None else [match[2]]))
        else:
            require(flags, f"unexpected argument '{word}': arguments are --key value (--help lists all)")
            flags[-1][1].append(word)
    for path in [" ".join(given) for name, given in flags if name == "config"]:
        words += _yaml_flags(path, _read_yaml(path), kinds, partial, accepted or {})
    for name, given in flags:
        words += [] if name == "config" else _flag(name, given, kinds, aliases or {})
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            cfg = tyro.cli(cls, args=words, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    except SystemExit as end:
        if not end.code:  # --help
            raise
        box = [line.strip("│ ") for line in stderr.getvalue().splitlines()[1:]]  # some locales have no lines
        text = " ".join(line for line in box if not re.search("full helptext| --help$|^[─╰╯-]*$", line))
        raise UserError(f"{text} (--help lists all keys)") from None
    usual = flat(dataclasses.asdict(cls()))
    for key, value in flat(dataclasses.asdict(cfg)).items():  # a path "" would be the current folder
        for v in value if isinstance(value, (list, tuple)) else [value]:
            require(v not in ("", "~", "null") or usual.get(key) == "", f"--{key} is empty: expected a text")
            number = isinstance(v, (int, float))
            require(not number or abs(v) < 2**63, f"--{key} is {v}: expected a finite number, below 2**63")
    return cfg


def config_from(cls, values):
    """A checkpoint's dict -> cls. A field added since then has its default; one removed since then is ignored."""
    kinds, known = typing.get_type_hints(cls), {f.name for f in dataclasses.fields(cls)} & set(values)
    nested = {k for k in known if dataclasses.is_dataclass(kinds[k])}
    return cls(**{k: config_from(kinds[k], values[k]) if k in nested else values[k] for k in known})


def fields_of(cls, prefix=""):
    """{dotted name: type} of every leaf."""
    out = {}
    for name, kind in typing.get_type_hints(cls).items():
        out |= fields_of(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else {prefix + name: kind}
    return out


def _flag(name, given, kinds, aliases):
    """One of the user's flags -> words for tyro."""
    field = aliases.get(name, name)
    leaves = [key for key in kinds if key == field] or [key for key in kinds if key.rpartition(".")[2] == field]
    require(len(leaves) < 2, f"--{name} could be {' or '.join(f'--{key}' for key in leaves)}: write one of them")
    if leaves or name == "help":
        return _words(leaves[0] if leaves else name, given, kinds)
    if name.startswith("no_") and not given:
        return _flag(name[3:], ["false"], kinds, aliases)
    raise UserError(f"unknown flag --{name}; {_nearest(name, [*kinds, *aliases], '--')}")


def _words(name, given, kinds):
    kinds = (kinds.get(name), *typing.get_args(kinds.get(name)))
    several = any(typing.get_origin(kind) in (list, tuple, dict) for kind in kinds)
    require(several or len(given) < 2, f"--{name} takes one value, found {given}; a text with spaces needs quotes")
    given = [os.path.expanduser(word) if word.startswith("~/") else word for word in given]  # no shell has seen a YAML
    if type(None) in kinds:
        given = ["None" if word in ("", "~", "null", "none") else word for word in given]
    if bool in kinds:
        given = [word.capitalize() for word in given or ["True"]]
    if int in kinds:  # 1e5 and 100.0 are whole numbers, too
        given = [str(int(float(w))) if re.fullmatch(r"\d+(\.0*)?(e\d+)?", w) and len(w) < 16 else w for w in given]
    return [f"--{name}={given[0]}"] if len(given) == 1 else [f"--{name}", *given]  # = is for what begins with -


def _read_yaml(path):
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.load(file, _Loader) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {error}; ready-made files are in configs/") from error
    require(isinstance(tree, dict), f"--config {path} must hold 'key: value' lines, found a {type(tree).__name__}")
    return tree


def _yaml_flags(path, tree, kinds, partial, accepted, prefix=""):
    words = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in kinds:
            value = [word for pair in value.items() for word in pair] if isinstance(value, dict) else value
            given = value if isinstance(value, list) else [value]
            plain = all(isinstance(word, str) for word in given)
            require(plain, f"{path}: {name} is {value}: expected one value, or a list of plain ones")
            words += _words(name, given, kinds)
        elif name in accepted:
            means = [v if isinstance(v, str) else str(v).lower() for v in accepted[name] or [value]]
            fits = f"{path}: {name} is '{value}', this program does {' or '.join(means)} only: leave the key out"
            require(str(value).lower() in map(str.lower, means), fits)
        elif isinstance(value, dict) or any(known.startswith(f"{name}.") and not value for known in kinds):
            words += _yaml_flags(path, value or {}, kinds, partial, accepted, f"{name}.")
        else:
            require(partial, f"{path}: unknown key '{name}'; {_nearest(name, kinds)}")
    return words


def _nearest(name, known, dashes=""):
    likeness = [max(difflib.SequenceMatcher(None, name, s).ratio() for s in (k, k.rpartition(".")[2])) for k in known]
    return f"the nearest is {dashes}{list(known)[likeness.index(max(likeness))]} (--help lists all)"


class _Loader(yaml.BaseLoader):  # leaves every scalar a string: tyro knows the types
    """Refuses a key that is written twice; PyYAML would keep the last one."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        require(not twice, f"{node.start_mark.name}: '{(twice or [''])[0]}' is written twice; keep one")
        return super().construct_mapping(node, deep)
