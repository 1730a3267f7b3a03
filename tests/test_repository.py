"""The repository itself: what lies at its top, its scripts, its metadata and pins."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(ROOT.glob("scripts/**/*.sh"))
ENTRY_SCRIPTS = [path for path in SCRIPTS if path.name != "common.sh"]
FOLDERS = {"sparsemm", "csrc", "scripts", "lmms-eval", "head_scores", "assets", "tests", ".ci"}
FILES = {
    "setup.py", "Makefile", "README.md", "pyproject.toml", "LICENSE", "CITATION.cff", ".gitignore", "constraints.txt",
    "MANIFEST.in",
}  # fmt: skip


def tracked() -> list[str]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listing.stdout.decode().split("\0") if name and (ROOT / name).exists()]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def requirements() -> dict[str, str]:
    """Name -> version range of every dependency, extras included."""
    table = project()["project"]
    listed = [*table["dependencies"], *(line for extra in table["optional-dependencies"].values() for line in extra)]
    found = {}
    for line in listed:
        name, limits = re.fullmatch(r"([A-Za-z0-9._-]+)(?:\[[^]]*\])?(.*)", line).groups()
        found[name.lower()] = limits
    return found


def test_top_level() -> None:
    names = {name.split("/")[0] for name in tracked()}
    assert names == FOLDERS | FILES


def test_metadata_takes_ranges_and_constraints_pin() -> None:
    table = project()["project"]
    assert table["name"] == "sparsemm" and table["requires-python"] == ">=3.10" and table["license"] == "Apache-2.0"
    assert {"torch>=2.11", "transformers>=5.17,<6"} <= set(table["dependencies"])
    assert {"flash", "qwen", "data", "dev"} <= set(table["optional-dependencies"])
    assert table["scripts"] == {"sparsemm": "sparsemm.cli:main"}
    assert not [name for name, limits in requirements().items() if "==" in limits]
    fixed = pins()
    assert fixed["torch"] == "2.13.0" and fixed["transformers"] == "5.23.0"
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in fixed.values())
    assert "torchvision" not in fixed and "torchvision" not in requirements()


def test_every_dependency_of_make_is_pinned_within_its_range() -> None:
    from packaging.specifiers import SpecifierSet

    fixed = {name.lower(): version for name, version in pins().items()}
    for name, limits in requirements().items():
        if name in ("sparsemm", "flash-attn", "qwen-vl-utils"):  # itself, and what needs a GPU or torchvision
            continue
        assert fixed[name] in SpecifierSet(limits), name


def test_version_is_one() -> None:
    import sparsemm

    assert project()["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sparsemm.__version__"}
    assert f"version: {sparsemm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_licence_and_citation() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    citation = (ROOT / "CITATION.cff").read_text()
    for part in ("Head Sparsity Emerges from Visual Concept Responses", "2506.05344", "Wang", "Liu", "Rao", "Lu"):
        assert part in citation


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


@pytest.mark.parametrize("script", ENTRY_SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_strict_executable_and_explain_themselves(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    shown = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=False, timeout=60)
    assert shown.returncode == 0 and shown.stderr == ""
    assert script.name in shown.stdout and "set -euo" not in shown.stdout


@pytest.mark.parametrize(
    ("script", "variables", "expected"),
    [
        ("quickstart.sh", {}, "quickstart --fresh"),
        (
            "quickstart.sh",
            {"METHOD": "snapkv", "BUDGET": "64", "RATIO": "0.2", "MASK_RATIO": "0.05", "MODEL": "org/a b"},
            "quickstart --model org/a b --methods snapkv --budgets 64 --ratio 0.2 --mask-ratio 0.05 --fresh",
        ),
        ("quickstart.sh", {"METHODS": "all", "METHOD": "x", "BUDGETS": "8 16"}, "--methods all --budgets 8 16 --fresh"),
        ("chase_visual_head/llava.sh", {}, "chase --model llava-vicuna --fresh"),
        ("chase_visual_head/mistral.sh", {"NUM_IMAGES": "9"}, "chase --model llava-mistral --num-images 9 --fresh"),
        ("chase_visual_head/qwen.sh", {"FRESH": "1"}, "chase --model qwen2-vl --fresh --fresh"),
        ("chase_visual_head/qwen.sh", {"MODEL": "Qwen/X", "MATCH": "unique"}, "--model Qwen/X --match unique --fresh"),
    ],
)
def test_scripts_hand_their_variables_on(tmp_path: Path, script: str, variables: dict[str, str], expected: str) -> None:
    """The scripts beside a stand-in for the program that prints its arguments."""
    copy = tmp_path / "checkout"
    program = copy / ".venv" / "bin" / "sparsemm"
    program.parent.mkdir(parents=True)
    program.write_text('#!/usr/bin/env bash\necho "$*"\n')
    program.chmod(0o755)
    for source in SCRIPTS:
        target = copy / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    known = ("METHOD", "METHODS", "BUDGET", "BUDGETS", "MODEL", "OUTPUT", "PAGES", "DEVICE", "DTYPE", "RATIO")
    clean = {name: value for name, value in os.environ.items() if name not in known}
    ran = subprocess.run(
        ["bash", copy / "scripts" / script, "--fresh"],
        env={**clean, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip().endswith(expected)


def test_continuous_integration_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "exec make test" in script.read_text()
    plan = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "pytest" in plan and "ruff check" in plan and "ruff format --check" in plan


def test_pages_lead_somewhere_and_the_first_is_short() -> None:
    """Every relative link and picture of the Markdown files is in the repository."""
    pages = [name for name in tracked() if name.endswith(".md")]
    for name in pages:
        text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", text):
            address = "".join(target)
            assert address.startswith("https://") or ((ROOT / name).parent / address).exists(), f"{name}: {address}"
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_no_path_of_one_machine() -> None:
    """Absolute home, root or work folders mean nothing on another machine."""
    pattern = re.compile(rb"(?<![\w.$/-])/(?:root|home/\w|work/|Users/\w|mnt/\w)")
    for name in tracked():
        path = ROOT / name
        if path.suffix in (".png", ".safetensors") or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            assert not pattern.search(line), f"{name}:{number} holds an absolute path"


def test_no_pickle_no_remote_code() -> None:
    for name in tracked():
        if not (name.startswith("sparsemm/") and name.endswith(".py")):
            continue
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert "pickle" not in modules, name
            if isinstance(node, ast.Call):
                options = {keyword.arg: keyword.value for keyword in node.keywords}
                remote = options.get("trust_remote_code")
                assert remote is None or (isinstance(remote, ast.Constant) and remote.value is False), name
                called = ast.unparse(node.func)
                if called == "torch.load":
                    only = options.get("weights_only")
                    assert isinstance(only, ast.Constant) and only.value is True, (
                        f"{name}: torch.load without weights_only"
                    )
                assert called != "print" or name.startswith("sparsemm/cli/"), f"{name} prints"
