"""The environment's tools: the lock, `make setup`, and how the Makefile passes on what people type."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import beside
import lock
import pytest
import setup as environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
CONTRACTS = ("setup", "generate", "batch", "train", "test", "extension", "index", "bench", "docs", "lint", "clean")


# The lock


def test_every_direct_requirement_is_locked_at_a_version_it_accepts():
    pins = lock.read_lock()
    for requirement in lock.direct_requirements(lock.read_project()):
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is in pyproject.toml but not in requirements.lock: make lock"
        assert requirement.specifier.contains(pins[name]), f"{requirement} against {pins[name]} in requirements.lock"


def test_the_lock_is_what_is_installed_and_lacks_nothing():
    import torch

    if torch.version.cuda:
        pytest.skip("a CUDA build of torch needs packages that the lock leaves to pip")
    project = lock.read_project()
    assert lock.closure(lock.direct_requirements(project), project["tool"]["gaussian-atlas"]["lock"]["unused"]) == lock.read_lock()


def test_torchvision_stays_out_of_the_lock_and_of_a_cpu_environment():
    import torch

    assert not set(lock.read_project()["tool"]["gaussian-atlas"]["lock"]["forbidden"]) & set(lock.read_lock())
    assert torch.version.cuda or importlib.util.find_spec("torchvision") is None


@pytest.mark.parametrize("line", ["torch @ file:///wheels/torch.whl", "torch>=2", "--extra-index-url https://example.org", "-e ."])
def test_a_lock_line_that_is_no_pin_is_named(tmp_path, line):
    path = tmp_path / "requirements.lock"
    path.write_text(f"# comment\nnumpy==1.26.4\n{line}\n")
    with pytest.raises(ValueError, match="line 3"):
        lock.read_lock(path)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """packages(name, version, *requires): pretend that a package is installed."""

    def add(name: str, version: str, *requires: str) -> None:
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    return add


def test_closure_follows_needs_extras_and_markers_and_stops_at_cycles(packages):
    packages("zz_a", "1.0+local", "zz-b[fast]", "zz-w; sys_platform == 'win32'", "zz-n; extra == 'never'")
    packages("zz_b", "2.0", "zz-a", "zz-c; extra == 'fast'", "zz-heavy")
    packages("zz_c", "3.0")
    packages("zz_w", "4.0")
    packages("zz_heavy", "5.0", "zz-missing")
    roots = [Requirement("zz-a")]
    here = lock.closure(roots, {"zz_b": ["zz.heavy"]}, {"sys_platform": "linux"})
    assert here == {"zz-a": "1.0", "zz-b": "2.0", "zz-c": "3.0"}
    assert "zz-w" in lock.closure(roots, {"*": ["zz-heavy"]}, {"sys_platform": "win32"})
    with pytest.raises(LookupError, match="zz-missing .needed by zz-heavy. is not installed"):
        lock.closure(roots)


def third_party_imports(folder: str) -> dict[str, set[str]]:
    """{distribution: files of `folder` that import it}, imports inside functions included; Blender's own modules aside."""
    ours = {"generator", "trainer", "blender_addon", "tests", "tools", *(path.stem for path in ROOT.glob("*s/*.py"))}
    blenders = {"bpy", "bpy_extras", "bmesh", "mathutils", "addon_utils", "gpu", "gpu_extras"}
    providers = metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - ours - blenders:
                provider = canonicalize_name(providers.get(name, [name])[0])
                found.setdefault(provider, set()).add(path.relative_to(ROOT).as_posix())
    return found


# Scripts that other environments run -> what those hold.
ELSEWHERE = {"trainer/sources/infinigen_spawn.py": "requirements-infinigen.lock", "tools/site_hooks.py": "requirements-docs.lock"}


@pytest.mark.parametrize(
    ("folder", "extras", "groups"),
    [
        ("generator", ["cuda", "compiled"], []),
        ("blender_addon", [], []),
        ("trainer", ["trainer", "cuda", "blender"], []),
        ("tools", [], ["dev"]),
        ("tests", ["trainer", "cuda", "blender"], ["dev"]),
        ("benchmarks", ["trainer", "cuda", "blender"], ["dev"]),
    ],
)
def test_what_is_imported_is_declared_where_it_is_needed(folder, extras, groups):
    project = lock.read_project()
    lines = list(project["project"]["dependencies"])
    for extra in extras:
        lines += project["project"]["optional-dependencies"][extra]
    for group in groups:
        lines += project["dependency-groups"][group]
    declared = {canonicalize_name(Requirement(line).name) for line in lines}
    found = {name: files - ELSEWHERE.keys() for name, files in third_party_imports(folder).items()}
    undeclared = {name: sorted(files) for name, files in found.items() if files and name not in declared}
    assert not undeclared, "imported, but not in pyproject.toml for this folder"


def test_what_runs_in_another_environment_is_in_its_lock():
    for script, name in ELSEWHERE.items():
        pins = lock.read_lock(ROOT / name)
        wanted = {package for package, files in third_party_imports(script.split("/")[0]).items() if script in files}
        assert wanted and wanted <= pins.keys()


def test_an_installed_package_has_every_module_and_data_file(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    expected = set()
    for package in ("generator", "trainer", "blender_addon"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        expected |= {path.relative_to(tmp_path).as_posix() for path in (tmp_path / package).rglob("*") if path.is_file()}
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", "."]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as file:
        held = set(file.namelist())
    assert expected <= held
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"generator", "trainer", "blender_addon"}


# make setup


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout whose setup makes a real, empty virtual environment; `project.installs` counts the installations."""
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.setattr(environment, "missing_packages", lambda: [])
    monkeypatch.setattr(environment, "CHECK", "print('checked')")
    return tmp_path


def count_installs(monkeypatch, failures: int = 0) -> list[Path]:
    calls: list[Path] = []

    def install(root: Path, venv: Path, torch_index: str | None, pins: tuple[str, ...]) -> None:
        calls.append(venv)
        (venv / f"run{len(calls)}").touch()
        if len(calls) <= failures:
            raise environment.SetupError("the network went away")

    monkeypatch.setattr(environment, "install_packages", install)
    return calls


@pytest.mark.skipif(sys.version_info[:2] != environment.PYTHON, reason="setup runs on Python 3.11 alone")
def test_an_interrupted_setup_is_made_anew_and_a_finished_one_left_alone(project, monkeypatch):
    installs = count_installs(monkeypatch, failures=1)
    venv = project / ".venv"
    with pytest.raises(environment.SetupError, match="network"):
        environment.setup(project)
    assert not (venv / ".stamp").exists()
    assert not environment.venv_is_sound(venv)

    environment.setup(project)
    assert environment.venv_is_sound(venv)
    assert not (venv / "run1").exists(), "what the interrupted run left is still there"
    assert len(installs) == 2

    environment.setup(project)
    assert len(installs) == 2

    (project / "requirements.lock").write_text("numpy==2.0\n")
    environment.setup(project)
    assert len(installs) == 3
    assert (venv / "run2").exists(), "a sound environment is brought up to date, not thrown away"


@pytest.mark.skipif(sys.version_info[:2] != environment.PYTHON, reason="setup runs on Python 3.11 alone")
def test_a_failed_check_gives_its_reason_and_writes_no_stamp(project, monkeypatch):
    count_installs(monkeypatch)
    monkeypatch.setattr(environment, "CHECK", "raise ImportError('libXi.so.6: cannot open shared object file')")
    with pytest.raises(environment.SetupError, match="libXi.so.6"):
        environment.setup(project)
    assert not (project / ".venv" / ".stamp").exists()


@pytest.mark.skipif(sys.version_info[:2] != environment.PYTHON, reason="environments are made by Python 3.11 alone")
def test_a_failed_check_leaves_the_environment_beside_in_place(tmp_path, monkeypatch):
    (tmp_path / "lock").write_text("")
    made: list[tuple] = []

    def run(*command: object, what: str) -> None:
        made.append(command)
        if "venv" in command:
            environment.run(*command, what=what)

    monkeypatch.setattr(beside, "run", run)
    failing = ["-c", "raise ImportError('libXi.so.6: cannot open shared object file')"]
    with pytest.raises(environment.SetupError, match="libXi.so.6"):
        beside.make(tmp_path, ".venv-beside", "lock", failing, "ok")
    assert not (tmp_path / ".venv-beside" / ".stamp").exists()
    # The next run checks again; the environment is not thrown away for what the system lacks.
    beside.make(tmp_path, ".venv-beside", "lock", ["-c", "print('ok')"], "ok")
    assert sum("venv" in command for command in made) == 1
    assert (tmp_path / ".venv-beside" / ".stamp").exists()


def test_another_python_is_refused_before_anything_is_made(project, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 13, 1, "final", 0))
    with pytest.raises(environment.SetupError, match=r"Python 3\.11 is needed .* this is 3\.13\.1"):
        environment.setup(project)
    assert not (project / ".venv").exists()


def test_a_missing_library_names_its_package(monkeypatch):
    monkeypatch.setattr(environment, "library_loads", lambda name: name != "libXi.so.6")
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: [])
    if sys.platform.startswith("linux"):
        assert {"libxi6", "libgl1-mesa-dri"} <= set(environment.missing_packages())
        assert "libx11-6" not in environment.missing_packages()


def test_without_permission_the_command_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(environment, "apt_prefix", lambda: None)
    environment.install_system_packages(["libegl1", "libxi6"])
    assert "sudo apt-get install --no-install-recommends libegl1 libxi6" in capsys.readouterr().out


# The Makefile


@pytest.fixture
def recorder(tmp_path):
    """A stand-in for the environment's Python that writes down its arguments; returns (path, read arguments)."""
    record = tmp_path / "arguments"
    program = tmp_path / "recorder"
    program.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" > '{record}'\n")
    program.chmod(0o755)
    return program, lambda: record.read_text(encoding="utf-8").split("\0")[:-1]


def make(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "prompt",
    [
        "a red armchair",
        'it\'s "quoted"',
        "costs $5 or $HOME or $(pwd) or $$ or ${PATH}",
        "`touch pwned`; touch pwned & touch pwned | touch pwned",
        "back\\slash # hash % percent",
        "ein grüner Stuhl, 赤い椅子",
        "--output=elsewhere",
    ],
)
def test_a_prompt_arrives_as_typed(recorder, prompt):
    program, arguments = recorder
    result = make("generate", f"RUN={program}", "STAMP=", f"PROMPT={prompt}", "SEED=7")
    assert result.returncode == 0, result.stderr
    assert arguments() == ["tools/blender.py", "generate", f"--prompt={prompt}", "--seed=7", "--count=1", "--out=out"]


def test_batch_and_train_pass_their_arguments(recorder):
    program, arguments = recorder
    make("batch", f"RUN={program}", "STAMP=", "PROMPTS=my prompts.txt", "OUT=some $dir")
    assert arguments()[2:] == ["--prompts=my prompts.txt", "--seed=0", "--count=1", "--out=some $dir"]
    make("train", f"RUN={program}", "STAMP=", "PRESET=tiny")
    assert arguments() == ["-m", "trainer", "train", "--preset=tiny"]


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ([], ["--platform=", "--python="]),
        (["PLATFORM=windows-x64", "PYTHON=3.13"], ["--platform=windows-x64", "--python=3.13"]),
        (["PYTHON=313", "CUDA=1"], ["--platform=", "--python=313", "--cuda"]),
        (["PYTHON=/opt/python3.11/bin/python"], ["--platform=", "--python="]),
    ],
)
def test_extension_tells_blenders_python_from_the_one_that_makes_the_environment(recorder, given, passed):
    program, arguments = recorder
    result = make("extension", f"RUN={program}", "STAMP=", *given)
    assert result.returncode == 0, result.stderr
    assert arguments() == ["tools/extension.py", "build", *passed]


@pytest.mark.parametrize(("target", "variable"), [("generate", "PROMPT"), ("batch", "PROMPTS"), ("train", "PRESET")])
def test_an_empty_argument_is_one_clear_line(recorder, target, variable):
    program, _ = recorder
    result = make(target, f"RUN={program}", "STAMP=", f"{variable}=")
    assert result.returncode == 2
    assert f"make {target}: {variable} is empty" in result.stderr.splitlines()[0]


@pytest.mark.parametrize("target", ["setup", "docs", "infinigen"])
def test_a_missing_python_is_one_clear_line(target):
    result = make(target, "PYTHON=/nonexistent/python3.11")
    assert result.returncode == 2
    assert f"make {target}: Python 3.11 was not found" in result.stderr.splitlines()[0]


@pytest.mark.parametrize(("target", "script"), [("docs", "tools/pages.py"), ("infinigen", "tools/setup_infinigen.py")])
def test_environments_beside_are_made_by_the_python_that_makes_the_main_one(recorder, target, script):
    program, arguments = recorder
    assert make(target, f"PYTHON={program}").returncode == 0
    assert arguments() == [script]
    assert f'"python3.11" {script}' in make("--dry-run", target, "PYTHON=3.13").stdout, "that is a Python of Blender's"


def test_help_lists_every_contract():
    listed = {line.split()[1] for line in make("help").stdout.splitlines()}
    assert set(CONTRACTS) <= listed


# Other Blender versions


def test_another_blender_has_the_lock_but_for_what_its_bpy_wants():
    entry = environment.environments(ROOT)["5.2"]
    lines = environment.requirements(ROOT, entry.pins)
    assert set(entry.pins) <= set(lines) and len({line.partition("==")[0] for line in lines}) == len(lines)
    assert set(environment.requirements(ROOT)) - set(lines) == {environment.pinned(ROOT, "bpy"), environment.pinned(ROOT, "numpy")}


@pytest.mark.parametrize(("arguments", "status", "outcome"), [([], 1, "not run"), (["--skip-missing"], 0, "left out")])
def test_a_blender_whose_python_is_missing_is_one_clear_line(monkeypatch, capfd, arguments, status, outcome):
    import matrix

    monkeypatch.setenv("PYTHON313", "/nonexistent/python3.13")
    monkeypatch.setattr(sys, "argv", ["matrix.py", "5.2", *arguments])
    assert matrix.main() == status
    output, errors = capfd.readouterr()
    assert len(errors.strip().splitlines()) == 1 and "Blender 5.2 needs Python 3.13" in errors and "PYTHON313=" in errors
    assert outcome in output
