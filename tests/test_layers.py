"""The shape of the program: which package may import which, and the one place of its version."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from generator import version

ROOT = Path(__file__).resolve().parent.parent
BLENDERS = {"bpy", "bpy_extras", "bmesh", "mathutils", "addon_utils", "gpu", "gpu_extras", "blf"}
# Package -> what it must not import, by any name.
FORBIDDEN = {
    "generator": BLENDERS | {"blender_addon", "trainer"},
    "blender_addon": {"trainer"},
    "trainer": {"blender_addon"},
}
# Inside Blender these two have other names, so they name each other and themselves only relatively.
RELATIVE = ("generator", "blender_addon")


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """What a file imports anywhere, functions and type checking included: absolute names, with a dot before what was relative."""
    package = path.relative_to(root).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parts = [*base, *filter(None, [node.module])]
            found |= {("." if node.level else "") + ".".join([*parts, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            found |= {node.args[0].value} if node.args and isinstance(node.args[0], ast.Constant) else set()
    return found


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_package_imports_what_stands_above_it(package):
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(package)
        for name in imported(path)
        if FORBIDDEN[package] & {name.lstrip(".").split(".")[0]}
    }
    assert not wrong


@pytest.mark.parametrize("package", RELATIVE)
def test_what_runs_inside_blender_imports_itself_relatively(package):
    wrong = {f"{path.name} imports {name}" for path in files(package) for name in imported(path) if name.split(".")[0] in RELATIVE}
    assert not wrong


def test_imports_are_found_wherever_they_hide(tmp_path):
    (tmp_path / "generator" / "model").mkdir(parents=True)
    path = tmp_path / "generator" / "model" / "x.py"
    path.write_text(
        "import a.b, trainer\nfrom ...blender_addon import job\nfrom . import y\nfrom .z import w\n"
        "def f():\n    import bpy\n    importlib.import_module('trainer.fit')\n"
    )
    assert imported(path, tmp_path) == {
        *("a.b", "trainer", "bpy", "trainer.fit"),
        *(".blender_addon.job", ".generator.model.y", ".generator.model.z.w"),
    }


def test_one_version():
    with open(ROOT / "blender_manifest.toml", "rb") as file:
        stated = tomllib.load(file)["version"]
    from setuptools.config.pyprojecttoml import apply_configuration
    from setuptools.dist import Distribution

    assert apply_configuration(Distribution(), ROOT / "pyproject.toml").get_version() == stated
    version.program_version.cache_clear()
    assert version.program_version() == stated
    numbers = re.findall(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d{2}-\d{2}\)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert numbers[0] == stated, "the changelog's newest release"
    assert numbers == sorted(numbers, key=lambda number: [int(part) for part in number.split(".")], reverse=True)


def test_the_version_is_written_nowhere_else():
    """A literal beside the manifest would be forgotten at the next release."""
    stated = version.program_version()
    for package in ("generator", "blender_addon", "tools"):
        for path in files(package):
            constants = (node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant))
            assert stated not in constants, path


def test_without_a_manifest_the_installed_version_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(version, "MANIFEST", tmp_path / "none.toml")
    monkeypatch.setattr(version, "version", lambda name: "7.8.9")
    version.program_version.cache_clear()
    try:
        assert version.program_version() == "7.8.9"
    finally:
        version.program_version.cache_clear()
