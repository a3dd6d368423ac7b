"""`make setup`: the .venv, from nothing, with what requirements.lock names and the system libraries that Blender's module loads.

Run by Python 3.11 (bpy 5.0.1 is built for no other) with nothing installed: the standard library only. With --blender VERSION
the same for another Blender that pyproject.toml names, in .venv-VERSION, by the Python that its bpy is built for.
Safe to run again at any time: it does nothing when nothing changed, and rebuilds an environment that an interrupted run left half made.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = (3, 11)


@dataclass(frozen=True)
class Environment:
    """One environment of the checkout: the main one, or that of another Blender version."""

    folder: str  # in the checkout
    python: tuple[int, int]
    bpy: str  # its version
    pins: tuple[str, ...] = ()  # what stands in the place of lines of requirements.lock, or beside them


MAIN = Environment(".venv", PYTHON, "5.0.1")


def environments(root: Path = ROOT) -> dict[str, Environment]:
    """The environments of other Blender versions that pyproject.toml names, by version ("4.5")."""
    with open(root / "pyproject.toml", "rb") as file:
        table = tomllib.load(file)["tool"]["gaussian-atlas"]["blender"]
    found = {}
    for version, entry in table.items():
        major, minor = entry["python"].split(".")
        bpy = next(pin.removeprefix("bpy==") for pin in entry["pins"] if pin.startswith("bpy=="))
        found[version] = Environment(f".venv-{version}", (int(major), int(minor)), bpy, tuple(entry["pins"]))
    return found


# What `import bpy` and its renderers load from the system (ldd over the wheel, and its run-time loading), by Debian's package.
# EGL with Mesa's software driver is what EEVEE needs where there is no screen; without it the process aborts.
SYSTEM_LIBRARIES = {
    "libX11.so.6": "libx11-6",
    "libXext.so.6": "libxext6",
    "libXrender.so.1": "libxrender1",
    "libXfixes.so.3": "libxfixes3",
    "libXi.so.6": "libxi6",
    "libXt.so.6": "libxt6",
    "libSM.so.6": "libsm6",
    "libICE.so.6": "libice6",
    "libxkbcommon.so.0": "libxkbcommon0",
    "libGL.so.1": "libgl1",
    "libOpenGL.so.0": "libopengl0",
    "libEGL.so.1": "libegl1",
    "libEGL_mesa.so.0": "libegl-mesa0",
}
SOFTWARE_DRIVERS = ("/usr/lib/*/dri/swrast_dri.so", "/usr/lib*/dri/swrast_dri.so")

# Imported by a child process after the installation: prints one line a package, or says what is wrong and exits 1.
CHECK = """
import importlib.util, sys
import bpy, torch, numpy, diffusers, transformers
if torch.version.cuda is None and importlib.util.find_spec("torchvision"):
    sys.exit("torchvision is installed beside a CPU build of torch and breaks diffusers: .venv/bin/python -m pip uninstall torchvision")
names = ("bpy", bpy.app.version_string), ("torch", torch.__version__), ("numpy", numpy.__version__)
names += ("diffusers", diffusers.__version__), ("transformers", transformers.__version__)
print("  ".join(f"{name} {version}" for name, version in names))
"""


class SetupError(Exception):
    """One clear line that says what is missing and what to do."""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def state_digest(root: Path, environment: Environment) -> str:
    """Hash of all that decides what the environment holds: a stamp with this digest needs no work."""
    parts = [(root / name).read_bytes() for name in ("pyproject.toml", "requirements.lock")]
    parts.append(Path(__file__).read_bytes())
    parts.append(".".join(map(str, sys.version_info[:3])).encode())
    parts.append(environment.folder.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def library_loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def missing_packages() -> list[str]:
    """Debian packages whose libraries this system lacks, sorted; always empty away from Linux."""
    if not sys.platform.startswith("linux"):
        return []
    missing = {package for library, package in SYSTEM_LIBRARIES.items() if not library_loads(library)}
    if not any(glob.glob(pattern) for pattern in SOFTWARE_DRIVERS):
        missing.add("libgl1-mesa-dri")
    if importlib.util.find_spec("ensurepip") is None:
        missing.add(f"python{sys.version_info.major}.{sys.version_info.minor}-venv")
    return sorted(missing)


def apt_prefix() -> list[str] | None:
    """How to run apt-get without a question: [] as root, ["sudo", "-n"] where sudo asks for no password, None where neither."""
    if shutil.which("apt-get") is None:
        return None
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0:
        return ["sudo", "-n"]
    return None


def install_system_packages(packages: list[str]) -> None:
    """Install with apt-get where that is permitted, else print the one command that does; never fails by itself."""
    command = "sudo apt-get install --no-install-recommends " + " ".join(packages)
    prefix = apt_prefix()
    if prefix is None:
        say(f"these system packages are missing and cannot be installed from here: {' '.join(packages)}")
        say(f"on Debian or Ubuntu, run: {command}")
        return
    say(f"installing system packages: {' '.join(packages)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    pass_on = ["env", "DEBIAN_FRONTEND=noninteractive"] if prefix else []
    for step in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *packages]):
        result = subprocess.run([*prefix, *pass_on, "apt-get", *step], env=environment, capture_output=True, text=True)
        if result.returncode != 0 and step[0] == "install":
            reason = (result.stderr or result.stdout).strip().splitlines()
            say(f"apt-get could not install them ({reason[-1] if reason else f'exit status {result.returncode}'})")
            say(f"run by hand: {command}")


def venv_python(venv: Path) -> Path:
    return venv / "bin" / "python"


def venv_is_sound(venv: Path, python: tuple[int, int] = PYTHON) -> bool:
    """True for an environment of the right Python that no run left half made."""
    if not venv_python(venv).exists() or (venv / ".installing").exists():
        return False
    code = f"import pip, sys; sys.exit(sys.version_info[:2] != {python})"
    return subprocess.run([venv_python(venv), "-c", code], capture_output=True).returncode == 0


def run(*command: str | Path, what: str) -> None:
    """Run to the end in silence; on failure show what the command said. Raises SetupError."""
    try:
        result = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise SetupError(f"{what} could not start: {error}") from None
    if result.returncode != 0:
        print(result.stdout, file=sys.stderr, end="")
        raise SetupError(f"{what} failed (exit status {result.returncode}): see the lines above, then run the same command again")


def pinned(root: Path, name: str) -> str:
    """`name==version` as requirements.lock has it."""
    match = re.search(rf"^{re.escape(name)}==\S+$", (root / "requirements.lock").read_text(encoding="utf-8"), re.MULTILINE)
    if not match:
        raise SetupError(f"requirements.lock has no line for {name}: `make lock` writes it")
    return match[0]


def requirements(root: Path, pins: tuple[str, ...] = ()) -> list[str]:
    """The lines of requirements.lock, with `pins` in the place of those that name the same packages."""
    replaced = {pin.partition("==")[0] for pin in pins}
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#") and line.partition("==")[0] not in replaced] + list(pins)


def install_packages(root: Path, venv: Path, torch_index: str | None, pins: tuple[str, ...] = ()) -> None:
    """Everything in requirements.lock but what `pins` replaces, then the project itself as an editable package.

    torch goes first and alone: with what it declares where pip chooses the build (on Linux PyPI's brings CUDA libraries that the
    lock does not name), without where `torch_index` names the build. The rest comes without dependencies, so that nothing can
    bring torchvision along.
    """
    pip = (venv_python(venv), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off", "--quiet")
    lock = venv / "requirements.lock"
    lock.write_text("\n".join(requirements(root, pins)) + "\n", encoding="utf-8")
    run(*pip, pinned(root, "pip"), pinned(root, "setuptools"), what="installing pip")
    say(f"{pinned(root, 'torch')} from {'TORCH_INDEX' if torch_index else 'the package index'}")
    if torch_index:
        run(*pip, "--no-deps", "--index-url", torch_index, pinned(root, "torch"), what="installing torch")
    else:
        run(*pip, "--constraint", lock, pinned(root, "torch"), what="installing torch")
    say("everything else in requirements.lock (bpy alone is some 350 MB)")
    run(*pip, "--no-deps", "--requirement", lock, what="installing requirements.lock")
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", root, what="installing the project itself")


def setup(root: Path = ROOT, torch_index: str | None = None, environment: Environment = MAIN) -> None:
    """Make or bring up to date an environment in `root`. Raises SetupError with one clear line."""
    if sys.version_info[:2] != environment.python:
        found = ".".join(map(str, sys.version_info[:3]))
        name = ".".join(map(str, environment.python))
        raise SetupError(
            f"Python {name} is needed (bpy {environment.bpy} is built for no other) but this is {found}: make setup PYTHON=python{name}"
        )
    venv = root / environment.folder
    stamp = venv / ".stamp"
    digest = state_digest(root, environment)
    if venv_is_sound(venv, environment.python) and stamp.exists() and stamp.read_text() == digest:
        stamp.touch()
        say("nothing to do")
        return
    began = time.monotonic()
    missing = missing_packages()
    if missing:
        install_system_packages(missing)
    if not venv_is_sound(venv, environment.python):
        say(f"creating {venv.name} with Python {'.'.join(map(str, sys.version_info[:3]))}")
        run(sys.executable, "-m", "venv", "--clear", venv, what="creating the virtual environment (Debian: python3.11-venv)")
    marker = venv / ".installing"
    stamp.unlink(missing_ok=True)
    marker.touch()  # stays behind when this run is interrupted: the next one starts over
    install_packages(root, venv, torch_index, environment.pins)
    say("checking what was installed")
    check = subprocess.run([venv_python(venv), "-c", CHECK], capture_output=True, text=True)
    if check.returncode != 0:
        lines = check.stderr.strip().splitlines()
        still = missing_packages()
        fix = f" (sudo apt-get install --no-install-recommends {' '.join(still)})" if still else ""
        marker.unlink()
        raise SetupError(f"{lines[-1] if lines else f'the check ended with status {check.returncode}'}{fix}")
    marker.unlink()
    temporary = stamp.with_suffix(".part")
    temporary.write_text(digest)
    os.replace(temporary, stamp)
    say(check.stdout.strip().splitlines()[-1])
    say(f"ready in {time.monotonic() - began:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--torch-index",
        default=os.environ.get("TORCH_INDEX") or None,
        metavar="URL",
        help="package index to take torch from (default: TORCH_INDEX from the environment, else pip's own)",
    )
    parser.add_argument("--blender", choices=sorted(environments()), metavar="VERSION", help="make .venv-VERSION for that Blender instead")
    arguments = parser.parse_args()
    try:
        setup(torch_index=arguments.torch_index, environment=environments()[arguments.blender] if arguments.blender else MAIN)
    except SetupError as error:
        print(f"make setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("make setup: interrupted; run it again to start over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
