"""Launchers: what they start, from where, with which flags. The program is replaced by one that says its arguments."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def launch(tmp_path):
    """Run a launcher from a folder with a blank in its name, with a Python that prints its own arguments."""
    python = tmp_path / "python"
    said = 'json.dumps([sys.argv[1:], os.environ.get("OMP_NUM_THREADS")])'
    python.write_text(f"#!/usr/bin/env python3\nimport json, os, sys\nprint({said})\n")
    python.chmod(0o755)
    elsewhere = tmp_path / "some where"
    elsewhere.mkdir()

    def call(script, *arguments, ok=True, **environment):
        env = (
            {k: v for k, v in os.environ.items() if k not in ("NUM_GPUS", "OMP_NUM_THREADS")}
            | {"PYTHON": str(python)}
            | environment
        )
        result = subprocess.run(
            ["bash", str(ROOT / "shells" / script), *arguments],
            cwd=elsewhere,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (result.returncode == 0) == ok, result.stderr
        return (json.loads(result.stdout)[0] if ok else None), result.stderr

    return call


LAUNCHERS = sorted(p.name for p in (ROOT / "shells").glob("train_*.sh"))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_plain_call_is_one_process_with_the_default_config(launch, name):
    arguments, shown = launch(name, NUM_GPUS="1")
    script, config = Path(arguments[0]), Path(arguments[2])
    assert (
        arguments[1] == "--config"
        and len(arguments) == 3
        and script.name == name.replace(".sh", ".py")
        and script.is_file()
        and config.is_file()
    )
    assert shown.startswith("+ ") and str(script) in shown


def test_guide_2_means_every_gpu(launch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU\\nGPU\\nGPU\\nGPU\\nGPU\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    counts = [launch("train_smolvla_sim.sh", *flags, PATH=path)[0][4] for flags in ((), ("--num-gpus", "2"))]
    assert counts == ["5", "2"] and launch("train_smolvla_sim.sh", PATH=path, NUM_GPUS="3")[0][4] == "3"
    assert launch("compute_dataset_stats_sim.sh", PATH=path)[0][0].endswith("compute_stats.py")


def test_several_gpus_go_through_torchrun(launch):
    arguments, _ = launch(
        "train_nora.sh", "--multi-gpu", "--num-gpus", "4", "--lr", "1e-4", "--cameras", "camera1", "camera 2"
    )
    assert arguments[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    assert (
        arguments[5].endswith("train_nora.py")
        and arguments[6] == "--config"
        and arguments[8:] == ["--lr", "1e-4", "--cameras", "camera1", "camera 2"]
    )
    assert (
        launch("train_nora.sh", "--num-gpus=3")[0][4] == "3"
        and launch("train_nora.sh", NUM_GPUS="2")[0][4] == "2"
        and launch("train_nora.sh", "--num-gpus", "1")[0][0].endswith("train_nora.py")
    )


def test_the_users_config_replaces_the_default(launch):
    assert launch("train_nora.sh", "--config", "my config.yaml")[0][1:] == ["--config", "my config.yaml"]
    assert launch("train_nora.sh", "--config=mine.yaml", "--mixed-precision", "bf16")[0][1:] == [
        "--config",
        "mine.yaml",
        "--mixed-precision",
        "bf16",
    ]


def test_several_machines(launch):
    arguments, _ = launch(
        "train_nora.sh",
        "--num-gpus",
        "4",
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint=a:29500",
        "--resume",
        "auto",
    )
    assert arguments[2:9] == [
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint=a:29500",
        "--nproc-per-node",
        "4",
    ] and arguments[-2:] == ["--resume", "auto"]
    assert "--standalone" not in arguments


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--num-gpus", "0"], "'0'"),
        (["--num-gpus", "four"], "'four'"),
        (["--num-gpus"], "needs a value"),
        (["--config"], "needs a value"),
    ],
)
def test_wrong_calls(launch, arguments, message):
    assert message in launch("train_nora.sh", *arguments, ok=False)[1]


def test_the_exit_code_is_the_programs(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 7\n")
    python.chmod(0o755)
    assert (
        subprocess.run(
            ["bash", str(ROOT / "shells/train_nora.sh")], env=os.environ | {"PYTHON": str(python)}, capture_output=True
        ).returncode
        == 7
    )


@pytest.mark.parametrize("path", sorted((ROOT / "shells").glob("*.sh")), ids=lambda p: p.name)
def test_every_shell_script_parses(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
