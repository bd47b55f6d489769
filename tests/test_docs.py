"""README and the pages in docs/: the same headings, commands and output in both languages; commands, flags, files and
functions that they name exist."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

from common.config import fields_of

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if not p.name.endswith(".ko.md"))]
PAGES = [page for english in ENGLISH for page in (english, english.with_suffix(".ko.md"))]
CONFIGURED = [p.stem for p in ROOT.glob("train_*.py")] + ["create_datapkl", "build_vl_cache", "compute_stats"]
OURS = {p.stem for p in ROOT.glob("*.py")}
LAUNCHER = {"config", "plan", "help", "multi_gpu", "num_gpus", "nnodes", "node_rank"}
LAUNCHER |= {"rdzv_backend", "rdzv_endpoint", "rdzv_id"}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
each_pair = pytest.mark.parametrize("english", ENGLISH, ids=lambda p: p.name)


def blocks(page):
    """Contents of the fenced blocks, [(language, text)]."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def outline(page):
    """Level of every heading and number of columns of every table row, in order; fenced blocks left out."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = [line for line in text.splitlines() if re.match(r"#+ |\|", line)]
    return [len(line.split(" ")[0]) if line.startswith("#") else f"row of {line.count('|')}" for line in found]


def commands(page):
    """Lines of the bash blocks, without comments, continued lines joined."""
    text = "".join(text for language, text in blocks(page) if language == "bash").replace("\\\n", " ")
    return [re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines() if not line.startswith("#")]


@each_pair
def test_both_languages_have_the_same_outline(english):
    assert outline(english) == outline(english.with_suffix(".ko.md"))


@each_pair
def test_both_languages_show_the_same_commands_and_output(english):
    korean = english.with_suffix(".ko.md")
    assert commands(english) == commands(korean)
    for (kind, ours), (_, theirs) in zip(blocks(english), blocks(korean), strict=True):
        numbers = [re.findall(r"[\w./-]*\d[\w./-]*", re.sub(r"#.*", "", text), re.A) for text in (ours, theirs)]
        assert numbers[0] == numbers[1] or kind == "bash", "shown output or code differs"


def test_the_readme_is_read_in_one_sitting_and_every_script_has_a_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    exported = {"modeling_openvla.py", "check_in_lerobot.py"}  # travel with a model
    scripts = [p.name for p in ROOT.glob("*.py") if p.name not in exported]
    assert all(f"`{name}`" in text for name in scripts)
    assert all((ROOT / "docs" / f"{p.stem}.md").is_file() for p in ROOT.glob("train_*.py"))


@each_page
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"`((?:shells|configs|benchmarks|tests|docs|common)/[\w./*-]*)`", text):
        assert list(ROOT.glob(target.rstrip("/"))) or target == "docs/INFERENCE_GUIDE.md", target


@each_page
def test_commands_name_scripts_and_flags_that_exist(page):
    for line in commands(page):
        for name in re.findall(r"(?:python|bash|torchrun)[^|&]*?\s((?:shells/)?\w+\.(?:py|sh))", line):
            if name == "train_mine.py":
                continue
            assert (ROOT / name).is_file(), line
            part = line.split(name, 1)[1].split(" && ")[0].rstrip(" &)")
            flags = [word[2:].split("=")[0].replace("-", "_") for word in shlex.split(part) if word.startswith("--")]
            script = Path(name).stem.replace("compute_dataset_stats_sim", "compute_stats")
            if script in CONFIGURED:
                module = importlib.import_module(script)
                keys = list(fields_of(module.Config)) + list(getattr(module, "ALIASES", {}))
                known = {k for key in keys for k in (key, key.rpartition(".")[2], f"no_{key}")} | LAUNCHER
                assert set(flags) <= known, f"{set(flags) - known} in: {line}"
            elif script == "evaluate":
                source = (ROOT / "evaluate.py").read_text()
                assert all(f'"--{flag}"' in source or f"    {flag}:" in source for flag in flags), line


def check_uses(code):
    """What `code` imports from this project exists, and its calls of that fit the signatures."""
    tree, known = ast.parse(code), {}
    for node in ast.walk(tree):
        modules = (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        )
        if any(name in OURS or name.startswith("common") for name in modules):
            exec(ast.unparse(node), known)
    for node in reversed(list(ast.walk(tree))):  # the inner ones first: common.plan, then common.plan.measure
        if isinstance(node, ast.Attribute) and inspect.ismodule(known.get(module := ast.unparse(node.value))):
            known[ast.unparse(node)] = getattr(known[module], node.attr)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := known.get(ast.unparse(node.func))):
            args = [a for a in node.args if not isinstance(a, ast.Starred)]
            named = {k.arg: k for k in node.keywords if k.arg}
            whole = len(args) == len(node.args) and len(named) == len(node.keywords)
            signature = inspect.signature(function)
            (signature.bind if whole else signature.bind_partial)(*args, **named)


@each_pair
def test_python_in_the_pages_uses_what_exists(english):
    for code in [text for language, text in blocks(english) if language == "python"]:
        check_uses(code)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.name)
def test_benchmarks_use_what_exists(path):
    check_uses(path.read_text())


@pytest.mark.parametrize("page", ["docs/closed_loop.md", "docs/closed_loop.ko.md"])
def test_the_scene_of_the_page_is_the_one_that_was_run(page):
    shown = re.search(r"```python\n(class MyInsertion.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
    assert shown in (ROOT / "benchmarks/mujoco_insertion.py").read_text()
