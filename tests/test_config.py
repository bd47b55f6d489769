"""The YAML + command line parser: every way of writing a value, every way of getting it wrong."""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import train_nora
from common.config import ConfigError, fields_of, parse_config, save_config

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Data:
    root_dir: str = ""  # folder with episodes
    horizon: int = 1  # future actions
    augment: bool = False  # colour augmentation
    size: list[int] = field(default_factory=lambda: [224, 224])  # height, width
    cameras: list[str] = field(default_factory=lambda: ["camera1"])  # views
    weights: dict = field(default_factory=dict)  # share per data set
    seed: int = 0  # of the order


@dataclass
class Model:
    name: str = "base"  # backbone with a # in it? no
    seed: int = 1  # of the weights


@dataclass
class Config:
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    learning_rate: float = 5e-5  # peak
    clip: float | None = 1.0  # largest norm; null: none
    resume: str | None = None  # checkpoint
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # autocast
    check: bool = False  # only look
    pin: bool = True  # pin memory


@dataclass
class Inherited(Config):
    output: str = "out.yaml"  # file to write
    modules: list[str] = field(
        default_factory=lambda: [  # where the adapters go
            "q_proj",
            "v_proj",
        ]
    )


def parse(*argv, cls=Config, **options):
    return parse_config(cls, argv, **options)


def from_yaml(tmp_path, text, *argv, **options):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return parse("--config", str(path), *argv, **options)


# ---- ways to write a value -------------------------------------------------------------------------------------------


def test_nothing_given_is_the_dataclass():
    assert parse() == Config()


@pytest.mark.parametrize(
    "argv",
    [["--data.horizon", "10"], ["--data.horizon=10"], ["--horizon", "10"], ["--horizon=10"], ["--horizon", "1e1"]],
)
def test_dotted_and_unique_leaf_flags(argv):
    assert parse(*argv) == Config(data=Data(horizon=10))


@pytest.mark.parametrize("flag", ["--learning-rate", "--learning_rate", "--learning-rate=", "--lr"])
def test_minus_is_underscore_and_aliases(flag):
    argv = [flag + "3e-4"] if flag.endswith("=") else [flag, "3e-4"]
    assert parse(*argv, aliases={"lr": "learning_rate"}).learning_rate == 3e-4


def test_a_leaf_of_two_groups_must_be_written_whole():
    with pytest.raises(ConfigError, match=r"--seed could be any of --data.seed, --model.seed"):
        parse("--seed", "3")
    assert parse("--model.seed", "3").model.seed == 3 and parse("--model.seed", "3").data.seed == 0


@pytest.mark.parametrize(
    "argv,value",
    [
        (["--augment"], True),
        (["--augment", "True"], True),
        (["--augment=true"], True),
        (["--augment", "1"], True),
        (["--augment", "yes"], True),
        (["--augment", "False"], False),
        (["--augment=false"], False),
        (["--augment", "0"], False),
        (["--no-augment"], False),
        (["--no_augment"], False),
        (["--data.augment", "off"], False),
    ],
)
def test_bools(argv, value):
    assert parse(*argv).data.augment is value


def test_no_prefix_turns_a_true_default_off_and_needs_a_bool():
    assert parse("--no-pin").pin is False
    with pytest.raises(ConfigError, match="unknown key '--no_clip'"):
        parse("--no-clip")


def test_no_prefix_does_not_swallow_a_value():
    """--no-augment False says two opposite things."""
    with pytest.raises(ConfigError, match="--no_augment takes no value"):
        parse("--no-augment", "False")


@pytest.mark.parametrize("text", ["5e-5", "'5e-5'", "0.00005", "5.0e-5"])
def test_exponent_without_dot_is_a_number(tmp_path, text):
    assert from_yaml(tmp_path, f"learning_rate: {text}\n").learning_rate == 5e-5


def test_whole_floats_are_ints_and_ints_are_floats(tmp_path):
    cfg = from_yaml(tmp_path, "data: {horizon: 1e3}\nclip: 2\n")
    assert cfg.data.horizon == 1000 and type(cfg.data.horizon) is int and cfg.clip == 2.0 and type(cfg.clip) is float


@pytest.mark.parametrize("number", [2**53 + 1, -12345678901234567890])
def test_large_ints_stay_exact(tmp_path, number):
    assert parse("--data.seed", str(number)).data.seed == number
    assert from_yaml(tmp_path, f"data: {{seed: {number}}}").data.seed == number


@pytest.mark.parametrize("value", ["2.5", "inf", "nan", "ten", "", "true"])
def test_int_refuses_what_is_not_whole(value):
    with pytest.raises(ConfigError, match=r"--data.horizon: expected int, got '" + value):
        parse("--horizon", value)


def test_yaml_bool_is_no_number_and_nan_no_rate(tmp_path):
    with pytest.raises(ConfigError, match="data.horizon: expected int, got True"):
        from_yaml(tmp_path, "data: {horizon: true}")
    with pytest.raises(ConfigError, match="learning_rate: expected float, got nan"):
        from_yaml(tmp_path, "learning_rate: .nan")


@pytest.mark.parametrize(
    "argv,cameras",
    [
        (["--cameras", "camera1", "camera3"], ["camera1", "camera3"]),
        (["--cameras", "camera1,camera3"], ["camera1", "camera3"]),
        (["--cameras", "[camera1, camera3]"], ["camera1", "camera3"]),
        (["--cameras=[camera1,camera3]"], ["camera1", "camera3"]),
        (["--cameras", "camera2"], ["camera2"]),
    ],
)
def test_lists(argv, cameras):
    assert parse(*argv).data.cameras == cameras


def test_list_items_are_checked(tmp_path):
    assert parse("--size", "112", "56").data.size == [112, 56] and parse("--size=[112, 56]").data.size == [112, 56]
    with pytest.raises(ConfigError, match=r"--data.size\[1\]: expected int, got '5.5'"):
        parse("--size", "112", "5.5")
    with pytest.raises(ConfigError, match="data.size: expected list of int, got 224"):
        from_yaml(tmp_path, "data: {size: 224}")


def test_negative_numbers_are_values():
    assert parse("--clip", "-1").clip == -1.0


@pytest.mark.parametrize("word", ["null", "none", "None", ""])
def test_optional_takes_null(tmp_path, word):
    assert parse("--clip", word).clip is None and parse("--resume", word).resume is None
    assert from_yaml(tmp_path, "clip: null\nresume:\n").clip is None


def test_null_is_refused_where_a_value_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="learning_rate: expected float, got None"):
        from_yaml(tmp_path, "learning_rate:")


def test_literal_choices_are_listed():
    assert parse("--mixed-precision", "bf16").mixed_precision == "bf16"
    with pytest.raises(ConfigError, match=r"expected auto \| no \| bf16, got 'fp16'"):
        parse("--mixed_precision", "fp16")


def test_the_choice_no_needs_no_quotes_in_yaml(tmp_path):
    """YAML 1.1 reads a bare `no` as false; who writes `mixed_precision: no` means the choice."""
    assert from_yaml(tmp_path, "mixed_precision: no").mixed_precision == "no"
    assert from_yaml(tmp_path, "mixed_precision: off").mixed_precision == "no", "the same false to YAML"
    with pytest.raises(ConfigError, match=r"mixed_precision: expected auto \| no \| bf16, got True"):
        from_yaml(tmp_path, "mixed_precision: yes")


def test_a_bare_yes_is_no_text(tmp_path):
    """Silently "True" otherwise."""
    with pytest.raises(ConfigError, match="model.name: expected str, got True"):
        from_yaml(tmp_path, "model: {name: yes}")
    assert from_yaml(tmp_path, "model: {name: 'yes'}").model.name == parse("--name", "yes").model.name == "yes"


def test_dict(tmp_path):
    assert from_yaml(tmp_path, "data: {weights: {sim: 1, real: 2.5}}").data.weights == {"sim": 1, "real": 2.5}
    assert parse("--weights", "{sim: 3}").data.weights == {"sim": 3}


def test_flags_win_over_yaml_wherever_they_stand(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("data: {horizon: 5}\nclip: 3\n")
    assert parse("--horizon", "7", "--config", str(path)) == Config(data=Data(horizon=7), clip=3.0)
    assert from_yaml(tmp_path, "data:\nclip: 3") == Config(clip=3.0), "an empty group is no error"
    assert from_yaml(tmp_path, "") == Config(), "nor is an empty file"


def test_partial_reads_what_it_knows_of_another_programs_yaml(tmp_path):
    """Only in the file: an unknown flag stays an error, and so does a wrong value of a known key."""
    text = "training: {steps: 5, data: {horizon: 9}}\noptimizer: adam\ndata: {horizon: 3, stride: 2}\nclip: 2\n"
    assert from_yaml(tmp_path, text, "--no-pin", partial=True) == Config(data=Data(horizon=3), clip=2.0, pin=False)
    with pytest.raises(ConfigError, match="unknown key 'training'"):
        from_yaml(tmp_path, text)
    with pytest.raises(ConfigError, match="unknown key '--optimizer'"):
        from_yaml(tmp_path, text, "--optimizer", "adam", partial=True)
    with pytest.raises(ConfigError, match="data.horizon: expected int, got 'many'"):
        from_yaml(tmp_path, "data: {horizon: many}", partial=True)


# ---- ways to get it wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv,nearest",
    [
        (["--learning_rat", "1"], "--learning_rate"),
        (["--data.horizn", "1"], "--data.horizon"),
        (["--horizn", "1"], "--data.horizon"),
        (["--camera", "x"], "--data.cameras"),
        (["--dataset.horizon", "1"], "--data.horizon"),
    ],
)
def test_unknown_flag_names_the_nearest(argv, nearest):
    with pytest.raises(ConfigError, match=f"unknown key '{argv[0]}'; did you mean '{nearest}'"):
        parse(*argv)


@pytest.mark.parametrize(
    "text,wrong,nearest",
    [
        ("learning_rte: 1", "learning_rte", "learning_rate"),
        ("data: {horizn: 1}", "data.horizn", "data.horizon"),
        ("horizon: 3", "horizon", "data.horizon"),
    ],
)
def test_unknown_yaml_key_names_file_and_nearest(tmp_path, text, wrong, nearest):
    with pytest.raises(ConfigError, match=f"config.yaml: unknown key '{wrong}'; did you mean '{nearest}'"):
        from_yaml(tmp_path, text)


@pytest.mark.parametrize("text", ["clip: 1\nclip: 2\n", "data:\n  horizon: 1\n  horizon: 2\n"])
def test_a_key_written_twice_is_refused(tmp_path, text):
    with pytest.raises(ConfigError, match="config.yaml.*written twice"):
        from_yaml(tmp_path, text)


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "just words", "\tx: 1"])
def test_files_that_are_no_mapping(tmp_path, text):
    with pytest.raises(ConfigError, match="config.yaml"):
        from_yaml(tmp_path, text)


def test_a_group_with_a_value_and_a_file_in_another_encoding(tmp_path):
    with pytest.raises(ConfigError, match=r"config.yaml: 'data' is a group of keys, got 3; write data: \{key: value\}"):
        from_yaml(tmp_path, "data: 3")
    (tmp_path / "korean.yaml").write_bytes("resume: 바늘".encode("cp949"))
    with pytest.raises(ConfigError, match="korean.yaml is not valid YAML in UTF-8"):
        parse("--config", str(tmp_path / "korean.yaml"))


def test_missing_file_and_stray_words(tmp_path):
    with pytest.raises(ConfigError, match="nowhere.yaml: no such file"):
        parse("--config", str(tmp_path / "nowhere.yaml"))
    with pytest.raises(ConfigError, match="unexpected argument 'train'"):
        parse("train")
    with pytest.raises(ConfigError, match=r"--learning_rate expects one value \(float\), got none"):
        parse("--learning_rate")
    with pytest.raises(ConfigError, match="--data.horizon expects one value"):
        parse("--horizon", "1", "2")


@pytest.mark.parametrize(
    "argv,expected", [(["--cameras", "[camera1"], r"\[a, b\] or a b"), (["--weights", "{sim: 1"], "{key: value}")]
)
def test_a_flag_with_broken_yaml_says_how_to_write_it(argv, expected):
    with pytest.raises(ConfigError, match=f"--data.{argv[0][2:]}: expected {expected}, got"):
        parse(*argv)


def test_on_the_command_line_a_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_x.py", "--horizn", "3"])
    with pytest.raises(SystemExit) as stop:
        parse_config(Config)
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "train_x.py: unknown key '--horizn'; did you mean '--data.horizon'? (--help lists all keys)\n"
    )


# ---- help and the saved file -----------------------------------------------------------------------------------------


def help_text(cls, capsys, aliases=None):
    with pytest.raises(SystemExit) as stop:
        parse("--help", cls=cls, aliases=aliases)
    assert stop.value.code == 0
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}


def test_help_has_every_field_with_comment_type_and_default(capsys):
    lines = help_text(Config, capsys, {"lr": "learning_rate"})
    assert set(lines) == {f"--{key}" for key in fields_of(Config)}
    assert "largest norm; null: none" in lines["--clip"] and "float or null; default 1.0" in lines["--clip"]
    assert "height, width" in lines["--data.size"] and "list of int; default [224, 224]" in lines["--data.size"]
    assert "also --lr" in lines["--learning_rate"] and "auto | no | bf16" in lines["--mixed_precision"]


def test_help_of_a_derived_config_keeps_the_comments_it_inherits(capsys):
    lines = help_text(Inherited, capsys)
    assert "file to write" in lines["--output"] and "folder with episodes" in lines["--data.root_dir"]
    assert "largest norm; null: none" in lines["--clip"] and "where the adapters go" in lines["--modules"]


def test_every_key_of_the_nora_config_is_explained():
    assert [key for key, (_, _, comment) in fields_of(train_nora.Config).items() if not comment] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("nora*.yaml")), ids=lambda p: str(p.relative_to(ROOT)))
def test_shipped_configs_parse(path):
    parse_config(train_nora.Config, ["--config", str(path)], train_nora.ALIASES)


def test_save_config_round_trip_and_content(tmp_path):
    cfg = parse(
        "--horizon",
        "4",
        "--clip",
        "null",
        "--mixed_precision",
        "no",
        "--cameras",
        "camera2",
        "camera1",
        "--weights",
        "{a: 2}",
        "--learning_rate",
        "1e-300",
    )
    save_config(cfg, tmp_path / "c.yaml")
    assert parse("--config", str(tmp_path / "c.yaml")) == cfg
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["data"]["horizon"] == 4, (
        "nested, as a person would write it"
    )


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
FLOAT = st.floats(allow_nan=False)


@settings(max_examples=100)
@given(
    st.builds(
        Config,
        learning_rate=FLOAT,
        clip=st.none() | FLOAT,
        check=st.booleans(),
        mixed_precision=st.sampled_from(["auto", "no", "bf16"]),
        resume=st.none()
        | TEXT.filter(lambda t: t.lower() not in ("", "null", "none")),  # these three words mean null, by design
        model=st.builds(Model, name=TEXT, seed=st.integers() | st.integers(2**53, 2**70)),
        data=st.builds(
            Data,
            root_dir=TEXT,
            horizon=st.integers(),
            augment=st.booleans(),
            size=st.lists(st.integers(-(2**40), 2**40), max_size=4),
            cameras=st.lists(TEXT, max_size=3),
            weights=st.dictionaries(TEXT, FLOAT, max_size=3),
        ),
    )
)
def test_whatever_is_saved_is_read_back_equal(tmp_path_factory, cfg):
    path = tmp_path_factory.mktemp("round_trip") / "c.yaml"
    save_config(cfg, path)
    assert parse("--config", str(path)) == cfg


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(10**6), 10**6))
def test_numbers_on_the_command_line_round_trip(value, whole):
    cfg = parse(f"--learning_rate={value!r}", f"--data.horizon={whole}")
    assert (
        cfg.learning_rate == value
        and math.copysign(1, cfg.learning_rate) == math.copysign(1, value)
        and cfg.data.horizon == whole
    )


def test_importing_a_script_parses_nothing():
    """`import train_nora` under a foreign command line does no work and reads no flags."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; sys.argv = ['x', '--nonsense']; import train_nora; print('imported')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "imported\n", done.stderr
