"""The YAML + command line parser: ways of writing a value, ways of getting it wrong."""

import inspect
import io
import os
import re
import subprocess
import sys
import typing
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common import UserError
from common.config import config_from, parse_config

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))


@dataclass
class Data:
    horizon: int = 1  # future actions
    augment: bool = False  # colour augmentation
    size: list[int] = field(default_factory=lambda: [224, 224])  # height, width
    cameras: list[str] = field(default_factory=lambda: ["camera1"])  # views
    weights: dict[str, float] = field(default_factory=dict)  # share per data set
    seed: int = 0  # of the order


@dataclass
class Model:
    name: str = "base"  # backbone
    seed: int = 1  # of the weights


@dataclass
class Config:
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    learning_rate: float = 5e-5  # peak
    clip: float | None = 1.0  # largest norm; null: none
    resume: str | None = None  # checkpoint
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # autocast
    pin: bool = True  # pin memory


def parse(*argv, cls=Config, **options):
    return parse_config(cls, argv, **options)


def from_yaml(tmp_path, text, *argv, **options):
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse("--config", str(path), *argv, **options)


# ---- ways to write a value -------------------------------------------------------------------------------------------


FLAGS = [  # (ways to write it, what they mean)
    ("", {}),
    ("--data.horizon 10 | --data.horizon=10 | --horizon 10 | --horizon 1e1", dict(data=Data(horizon=10))),
    ("--model.seed 3", dict(model=Model(seed=3))),
    ("--learning-rate 3e-4 | --learning_rate=3e-4 | --lr 3e-4 | --lr=3e-4", dict(learning_rate=3e-4)),
    ("--augment | --augment True | --augment=true | --data.augment TRUE", dict(data=Data(augment=True))),
    ("--no-pin | --no_pin | --pin false | --pin=False", dict(pin=False)),
    ("--cameras a b | --data.cameras a b", dict(data=Data(cameras=["a", "b"]))),
    ("--cameras", dict(data=Data(cameras=[]))),
    ("--name=--foo", dict(model=Model("--foo"))),
    ("--name=-1x | --name -1x", dict(model=Model("-1x"))),
    ("--name=~/x", dict(model=Model(os.path.expanduser("~/x")))),
    ("--clip -1", dict(clip=-1.0)),
    ("--clip null", dict(clip=None)),
]


@pytest.mark.parametrize("ways, meaning", FLAGS)
def test_ways_to_write_a_flag(ways, meaning):
    for text in ways.split(" | "):
        assert parse(*text.split(), aliases={"lr": "learning_rate"}) == Config(**meaning), text


FILES = [
    ("", {}),
    ("data:\nclip: 3", dict(clip=3.0)),
    ("learning_rate: 5e-3", dict(learning_rate=0.005)),
    ("learning_rate: '5e-3'", dict(learning_rate=0.005)),
    ("data: {horizon: 1e3, seed: 9007199254740993}", dict(data=Data(1000, seed=2**53 + 1))),
    ("data: {horizon: 100.0}", dict(data=Data(horizon=100))),
    ("data: {cameras: [a, b], size: [112, 56]}", dict(data=Data(cameras=["a", "b"], size=[112, 56]))),
    ("data: {weights: {sim: 1, real: 2.5}}", dict(data=Data(weights={"sim": 1.0, "real": 2.5}))),
    ("model: {name: --clip}", dict(model=Model("--clip"))),
    ("clip: null\nresume:\n", dict(clip=None)),
    ("mixed_precision: no", dict(mixed_precision="no")),  # YAML 1.1 reads a bare `no` as false
    ("model: {name: yes}", dict(model=Model("yes"))),
]


@pytest.mark.parametrize("text, meaning", FILES)
def test_ways_to_write_a_file(tmp_path, text, meaning):
    """A flag wins wherever it stands."""
    assert from_yaml(tmp_path, text) == Config(**meaning)
    argv = ["--lr", "7", "--config", str(tmp_path / "config.yaml")]
    assert parse(*argv, aliases={"lr": "learning_rate"}) == Config(**meaning | dict(learning_rate=7.0))


def test_partial_reads_what_it_knows_of_another_programs_yaml(tmp_path):
    text = "training: {steps: 5, data: {horizon: 9}}\noptimizer: adam\ndata: {horizon: 3, stride: 2}\nclip: 2\n"
    assert from_yaml(tmp_path, text, partial=True) == Config(data=Data(horizon=3), clip=2.0)
    with pytest.raises(UserError, match="unknown key 'training.steps'"):
        from_yaml(tmp_path, text)


def test_a_guides_key_is_accepted_where_its_value_means_what_happens(tmp_path):
    accepted = {"trainer_type": ("Lightning", "ddp"), "data.kind": None, "save_last": (True,)}
    for text in ("trainer_type: ddp", "data: {kind: anything}", "save_last: true", "save_last: True"):
        assert from_yaml(tmp_path, text, accepted=accepted) == Config()
    for text, said in (("trainer_type: deepspeed", "Lightning or ddp only"), ("save_last: false", "true only")):
        with pytest.raises(UserError, match=said):
            from_yaml(tmp_path, text, accepted=accepted)


# ---- ways to get it wrong --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "text, said",
    [
        ("--learning_rat 1", "unknown flag --learning_rat; the nearest is --learning_rate"),
        ("--horizn 1", "the nearest is --data.horizon"),
        ("--dataset.horizon 1", "the nearest is --data.horizon"),
        ("--seed 3", "--seed could be --data.seed or --model.seed"),
        ("--horizon 2.5", "data.horizon"),
        ("--horizon 1 2", "--data.horizon takes one value, found ['1', '2']"),
        ("--learning_rate", "learning_rate"),
        ("--mixed_precision fp16", "bf16"),
        ("--no-clip", "Error parsing --clip"),
        ("train", "unexpected argument 'train'"),
        ("--name=", "--model.name is empty"),
        ("--name null", "--model.name is empty"),  # as YAML writes it
        ("--weights a nan", "--data.weights.a is nan: expected a finite number"),
        (f"--data.seed {2**64}", "--data.seed is 18446744073709551616: expected a finite number, below 2**63"),
        ("--cameras=", "--data.cameras is empty"),
        ("--config", "ready-made files are in configs/"),
        ("--config nowhere.yaml", "nowhere.yaml"),
        ("--config a.yaml b.yaml", "--config a.yaml b.yaml: "),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_wrong_flags(text, said, encoding, monkeypatch):
    """Also on a terminal that has no lines for tyro's boxes."""
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    with pytest.raises(UserError) as error:
        parse(*text.split())
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("resume: 바늘".encode("cp949"), "config.yaml"),
        ("learning_rte: 1", "unknown key 'learning_rte'; the nearest is learning_rate"),
        ("data: {horizn: 1}", "unknown key 'data.horizn'; the nearest is data.horizon"),
        ("horizon: 3", "the nearest is data.horizon"),
        ("data: {horizon: true}", "data.horizon"),
        ("learning_rate:", "learning_rate"),
        ("clip: 1\nclip: 2\n", "'clip' is written twice"),
        ("data:\n  horizon: 1\n  horizon: 2\n", "'horizon' is written twice"),
        ("a: [1", "config.yaml"),
        ("- 1\n- 2\n", "found a list"),
        ("just words", "found a str"),
        ("data: 3", "unknown key 'data'"),
        ("data: {size: [[112, 56]]}", "data.size is [['112', '56']]: expected one value, or a list of plain ones"),
        ("data: {weights: {sim: {a: 1}}}", "expected one value"),
    ],
)
def test_wrong_files(tmp_path, text, said):
    with pytest.raises(UserError, match="config.yaml|learning_rate|horizon") as error:
        from_yaml(tmp_path, text)
    assert said in str(error.value)


# ---- the scripts' own configs ----------------------------------------------------------------------------------------
def script_config(name):
    module = __import__(name)
    return module.Config, getattr(module, "ALIASES", {}), getattr(module, "ACCEPTED", {})


@pytest.mark.parametrize("script", SCRIPTS)
def test_shipped_configs_parse_and_every_key_is_explained(script, capsys):
    cls, aliases, accepted = script_config(script)
    for folder in ("configs", "configs/demo"):
        parse("--config", f"{ROOT}/{folder}/{script[6:]}.yaml", cls=cls, aliases=aliases, accepted=accepted)
    with pytest.raises(SystemExit) as stop:
        parse("--help", cls=cls, aliases=aliases)
    assert stop.value.code == 0 and "--seed" in capsys.readouterr().out
    groups = [cls, *(kind for kind in typing.get_type_hints(cls).values() if is_dataclass(kind))]
    for group in groups:  # a comment that stands on another line is lost to --help
        lines = [line for line in inspect.getsource(group).splitlines() if re.match(r"    \w+: ", line)]
        assert lines and [line for line in lines if " # " not in line and "Config" not in line] == []


GUIDES = dict(train_nora="nora", train_smolvla_sim="smolvla_sim", train_mobile_kosmos="mobile_kosmos")
MOBILE = "trainer_type: MobileVLATrainer\nact_head: {type: MobileVLALSTMDecoder}\ntrainer: {save_last: true}\n"


@pytest.mark.parametrize("script", GUIDES)
def test_the_yaml_of_the_guides_is_read_as_written(script, shared, tmp_path):
    cls, aliases, accepted = script_config(script)
    text = (shared / "guides" / f"{GUIDES[script]}.ko.md").read_text(encoding="utf-8")
    own = [MOBILE + "dataset: {name_instructions: {왼쪽: 왼쪽으로}}"] if script == "train_mobile_kosmos" else []
    for block in [*re.findall(r"```yaml\n(.*?)```", text, re.S), *own]:
        cfg = from_yaml(tmp_path, block, cls=cls, aliases=aliases, accepted=accepted)
    assert not own or cfg.dataset.name_instructions == {"왼쪽": "왼쪽으로"}


def test_importing_a_script_does_no_work():
    code = f"import sys; sys.argv = ['x', '--nonsense']; import {', '.join(SCRIPTS)}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stderr[-2000:]


def test_a_checkpoint_opens_after_a_field_came_and_another_went():
    saved = asdict(Config(data=Data(horizon=7))) | dict(gone=3)
    del saved["clip"], saved["data"]["seed"]
    assert config_from(Config, saved) == Config(data=Data(horizon=7))


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
    lambda s: not s.startswith("-") and s not in ("~", "null", "none", "None")
)  # a list of several texts cannot have one that begins with a dash


integers = st.integers(1 - 2**63, 2**63 - 1)


@given(st.builds(Data, integers, st.booleans(), st.lists(integers), st.lists(texts)), st.floats(1e-9, 1e9))
def test_whatever_is_saved_is_read_back_equal(tmp_path_factory, data, rate):
    cfg, path = Config(data=data, learning_rate=rate), tmp_path_factory.mktemp("c") / "c.yaml"
    path.write_text(yaml.safe_dump(asdict(cfg), allow_unicode=True), encoding="utf-8")
    assert parse("--config", str(path)) == cfg
