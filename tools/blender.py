"""Run the extension's commands from the source tree: python tools/blender.py generate --prompt "a red armchair" --out out

Behaves as `blender --background --command gaussian_atlas generate ...`. With a Blender application (--blender PATH or the
variable BLENDER) exactly that is run, on the built extension (`make extension`); without one the bpy module does the work
on the source tree. Either way Blender's user folder is .blender/ in the checkout: the person's own is never touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USER_FOLDER = ROOT / ".blender"
REPOSITORY = "user_default"
EXTENSION = "gaussian_atlas"
MODULE = f"bl_ext.{REPOSITORY}.{EXTENSION}"
# What the extension consists of; the rest of the checkout is for making it.
PARTS = ("__init__.py", "blender_manifest.toml", "blender_addon", "generator", "models")


def link_extension(user_folder: Path) -> None:
    """Make the checkout an installed extension of this Blender user folder: a link, or a copy where links are refused."""
    place = user_folder / "extensions" / REPOSITORY / EXTENSION
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.is_symlink():
        if place.resolve() == ROOT:
            return
        place.unlink()
    elif place.exists():
        shutil.rmtree(place)
    try:
        place.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        ignore = shutil.ignore_patterns("__pycache__")
        for part in PARTS:
            source = ROOT / part
            if source.is_dir():
                shutil.copytree(source, place / part, ignore=ignore)
            elif source.exists():
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, place / part)


def start(user_folder: Path, extension_zip: Path | None = None) -> None:
    """Import bpy with its own user folder and enable the extension: the linked checkout, or a zip installed there.

    Raises:
        RuntimeError: bpy was imported before, so that its user folder is another, or the extension does not enable.
    """
    if "bpy" in sys.modules and os.environ.get("BLENDER_USER_RESOURCES") != str(user_folder):
        raise RuntimeError("bpy was imported before its user folder was chosen")
    os.environ["BLENDER_USER_RESOURCES"] = str(user_folder)
    user_folder.mkdir(parents=True, exist_ok=True)
    if extension_zip is None:
        link_extension(user_folder)
    import bpy

    if extension_zip is not None:
        bpy.ops.extensions.package_install_files(filepath=str(extension_zip), repo=REPOSITORY, enable_on_install=True, overwrite=True)
    import addon_utils  # found only once bpy has been imported

    if MODULE not in bpy.context.preferences.addons and addon_utils.enable(MODULE, default_set=True) is None:
        raise RuntimeError(f"{MODULE} did not enable; the reason is printed above")


def python_of(blender: str) -> str:
    """The Python in a Blender application, "3.11". Raises RuntimeError where there is no Blender at that path."""
    ask = "import sys; print('python', *sys.version_info[:2])"
    try:
        said = subprocess.run([blender, "--background", "--factory-startup", "--python-expr", ask], capture_output=True, text=True).stdout
    except OSError as error:
        raise RuntimeError(f"cannot run Blender at {blender}: {error.strerror}") from None
    for line in said.splitlines():
        if line.startswith("python "):
            return ".".join(line.split()[1:])
    raise RuntimeError(f"{blender} does not answer as Blender does")


def fitting_zip(blender: str) -> Path:
    """The newest zip in dist, else in dist/cuda, for this machine and a Blender application's Python. Raises RuntimeError."""
    from extension import host_target

    platform, python = host_target().platform, python_of(blender)
    for folder in (ROOT / "dist", ROOT / "dist" / "cuda"):
        found = folder.glob(f"{EXTENSION}-*-{platform}-cp{python.replace('.', '')}*.zip")
        if archives := sorted(found, key=lambda path: path.stat().st_mtime):
            return archives[-1]
    raise RuntimeError(
        f"dist has no zip for the Python {python} of {blender}: run `make extension PLATFORM={platform} PYTHON={python}` first"
    )


def install(blender: str, archive: Path, environment: dict[str, str]) -> None:
    """Install and enable a zip in the user folder that `environment` names. Raises RuntimeError with what Blender said."""
    command = [blender, "--background", "--command", "extension", "install-file", "--repo", REPOSITORY, "--enable", str(archive)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"Blender did not install {archive.name}: {(done.stdout + done.stderr).strip()[-300:]}")


def _run_application(blender: str, arguments: list[str]) -> int:
    environment = os.environ | {"BLENDER_USER_RESOURCES": str(USER_FOLDER)}
    USER_FOLDER.mkdir(exist_ok=True)
    try:
        install(blender, fitting_zip(blender), environment)
    except RuntimeError as error:
        print(f"tools/blender.py: {error}", file=sys.stderr)
        return 2
    return subprocess.run([blender, "--background", "--command", EXTENSION, *arguments], env=environment).returncode


def main(arguments: list[str]) -> int:
    blender = os.environ.get("BLENDER", "")
    if arguments[:1] == ["--blender"]:
        if len(arguments) < 2:
            print("tools/blender.py: --blender needs the path of a Blender application", file=sys.stderr)
            return 2
        blender, arguments = arguments[1], arguments[2:]
    if blender:
        return _run_application(blender, arguments)
    start(USER_FOLDER)
    import importlib

    return importlib.import_module(f"{MODULE}.blender_addon.batch").main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
