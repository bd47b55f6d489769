"""Launchers: what they start, from where, with which flags. The program is replaced by one that says its arguments."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def launch(tmp_path):
    """launch(script, *arguments) -> (arguments of the program, stderr, exit code), from a folder with a blank in its
    name, through a link, by sh."""
    python, elsewhere = tmp_path / "python", tmp_path / "some where"
    python.write_text("#!/usr/bin/env python3\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    elsewhere.mkdir()

    def call(script, *arguments, **environment):
        env = {k: v for k, v in os.environ.items() if k != "NUM_GPUS"} | dict(PYTHON=str(python)) | environment
        link = elsewhere / script
        link.is_symlink() or link.symlink_to(ROOT / "shells" / script)
        how = dict(cwd=elsewhere, env=env, capture_output=True, text=True, timeout=60)
        done = subprocess.run(["sh", script, *arguments], **how)
        return json.loads(done.stdout or "null"), done.stderr, done.returncode

    return call


LAUNCHERS = sorted(p.name for p in (ROOT / "shells").glob("train_*.sh"))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_plain_call_is_one_process_with_the_default_config(launch, name):
    (script, flag, config), shown, code = launch(name, NUM_GPUS="1")
    assert flag == "--config" and Path(config).is_file() and Path(script).is_file() and code == 0
    assert Path(script).name == name.replace(".sh", ".py") and shown.startswith("+ ") and script in shown


def test_guide_2_means_every_gpu_that_may_be_seen(launch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU\\nGPU\\nGPU\\nGPU\\nGPU\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    env = dict(PATH=f"{tmp_path}:{os.environ['PATH']}")
    counts = [launch("train_smolvla_sim.sh", *flags, **env)[0][4] for flags in ((), ("--num-gpus", "2"))]
    assert counts == ["5", "2"] and launch("train_smolvla_sim.sh", **env, NUM_GPUS="3")[0][4] == "3"
    assert launch("compute_dataset_stats_sim.sh", **env)[0][0].endswith("compute_stats.py")
    seen = env | dict(CUDA_VISIBLE_DEVICES="0,2")
    assert launch("train_smolvla_sim.sh", **seen)[0][4] == launch("train_nora.sh", "--multi-gpu", **seen)[0][4] == "2"
    for devices in ("3", ""):
        assert launch("train_smolvla_sim.sh", **env, CUDA_VISIBLE_DEVICES=devices)[0][0].endswith("_sim.py")


def test_several_gpus_go_through_torchrun(launch):
    flags = ["--lr", "1e-4", "--cameras", "camera1", "camera 2"]
    arguments, *_ = launch("train_nora.sh", "--multi-gpu", "--num-gpus", "4", *flags)
    assert arguments[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert arguments[5].endswith("train_nora.py") and arguments[6] == "--config" and arguments[8:] == flags
    assert launch("train_nora.sh", "--num-gpus=3")[0][4] == "3"
    assert launch("train_nora.sh", NUM_GPUS="2")[0][4] == "2"
    assert launch("train_nora.sh", "--num-gpus", "1")[0][0].endswith("train_nora.py")


def test_the_users_config_replaces_the_default(launch):
    assert launch("train_nora.sh", "--config", "my config.yaml")[0][1:] == ["--config", "my config.yaml"]
    mine = launch("train_nora.sh", "--config=mine.yaml", "--mixed-precision", "bf16")[0]
    assert mine[1:] == ["--config", "mine.yaml", "--mixed-precision", "bf16"]


def test_several_machines(launch):
    machines = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv-endpoint=a:29500"]
    arguments, *_ = launch("train_nora.sh", "--num-gpus", "4", *machines, "--resume", "auto")
    assert arguments[2:9] == [*machines, "--nproc-per-node", "4"] and arguments[-2:] == ["--resume", "auto"]


WRONG = {"--num-gpus 0": "'0'", "--num-gpus four": "'four'", "--num-gpus": "needs a value", "--config": "needs a value"}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_calls(launch, arguments):
    _, said, code = launch("train_nora.sh", *arguments.split())
    assert WRONG[arguments] in said and code != 0


def test_the_exit_code_is_the_programs(launch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\nexit 7\n")
    assert launch("train_nora.sh")[2] == 7


@pytest.mark.parametrize("path", sorted((ROOT / "shells").glob("*.sh")), ids=lambda p: p.name)
def test_every_shell_script_parses(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
