"""README.md and README.ko.md: the same headings, commands and tables; every command names files and flags that exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import build_vl_cache
import compute_stats
import create_datapkl
import train_async
import train_diffusion
import train_mobile_kosmos
import train_nora
import train_openvla_vamos
import train_smolvla_sim
from common.config import fields_of

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, KOREAN = (ROOT / name for name in ("README.md", "README.ko.md"))
CONFIGS = {
    m.__name__: (m.Config, getattr(m, "ALIASES", {}))
    for m in (
        train_nora,
        train_smolvla_sim,
        train_openvla_vamos,
        train_mobile_kosmos,
        train_async,
        train_diffusion,
        create_datapkl,
        build_vl_cache,
        compute_stats,
    )
}


def blocks(path):
    """Contents of the fenced blocks, [(language, text)]."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)


def outline(path):
    """Level of every heading and number of columns of every table row, in order; fenced blocks left out."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [
        len(line.split(" ")[0]) if line.startswith("#") else f"row of {line.count('|')}"
        for line in text.splitlines()
        if re.match(r"#+ |\|", line)
    ]


def test_both_readmes_have_the_same_outline():
    assert outline(ENGLISH) == outline(KOREAN)


def test_both_readmes_show_the_same_commands_and_output():
    def without_comments(path):
        return [
            (language, re.sub(r"\s*#.*", "", text) if language else text)
            for language, text in blocks(path)
            if language or "├" not in text
        ]

    english, korean = without_comments(ENGLISH), without_comments(KOREAN)
    assert [b for b in english if b[0]] == [b for b in korean if b[0]], "commands differ"
    numbers = lambda all_blocks: [
        re.findall(r"[\w./-]*\d[\w./-]*", text, re.A) for language, text in all_blocks if not language
    ]  # noqa: E731
    assert numbers(english) == numbers(korean), "shown output differs"


@pytest.mark.parametrize("path", [ENGLISH, KOREAN, ROOT / "docs" / "distributed.md"], ids=lambda p: p.name)
def test_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:shells|configs|benchmarks|tests|docs|common)/[\w./*-]*)`", text):
        assert list(ROOT.glob(target.rstrip("/"))) or target.startswith("benchmarks/results/"), target


@pytest.mark.parametrize("path", [ENGLISH, KOREAN, ROOT / "docs" / "distributed.md"], ids=lambda p: p.name)
def test_commands_name_scripts_and_flags_that_exist(path):
    lines = [
        line.split("  #")[0].strip()
        for language, text in blocks(path)
        if language == "bash"
        for line in text.replace("\\\n", " ").splitlines()
    ]
    seen = 0
    for line in lines:
        for name in re.findall(r"(?:python|bash|torchrun)[^|&]*?\s((?:shells/)?[\w]+\.(?:py|sh))", line):
            assert (ROOT / name).is_file(), line
            seen += 1
            words = [w for w in shlex.split(line.split(name, 1)[1].rstrip(" &")) if w.startswith("--")]
            kind = {"compute_dataset_stats_sim": "compute_stats"}.get(Path(name).stem, Path(name).stem)
            if kind in CONFIGS:
                cls, aliases = CONFIGS[kind]
                known = (
                    {k for key in fields_of(cls) for k in (key, key.rsplit(".", 1)[-1])}
                    | set(aliases)
                    | {"config", "help", "multi_gpu", "num_gpus", "nnodes", "rdzv_backend", "rdzv_endpoint", "rdzv_id"}
                )
                for word in words:
                    assert word[2:].split("=")[0].replace("-", "_") in known, f"{word} in: {line}"
            elif kind == "evaluate":
                assert all(f'"{word}"' in (ROOT / "evaluate.py").read_text() for word in words), line
    assert seen >= (8 if path != ROOT / "docs" / "distributed.md" else 3)


def test_the_python_in_the_readme_uses_names_that_exist():
    for code in [text for language, text in blocks(ENGLISH) if language == "python"]:
        compile(code, "README.md", "exec")
        module, name = re.search(r"from (\w+) import (\w+)", code).groups()
        assert callable(getattr(importlib.import_module(module), name)) and hasattr(
            importlib.import_module(module).Policy, "predict"
        )
