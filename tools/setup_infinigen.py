"""`make infinigen`: .venv-infinigen, the environment of the object source `infinigen`: Infinigen with the Blender it is made for.

About 2.5 GB. Run by Python 3.11; does nothing where the environment is there and whole.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

from setup import ROOT, SetupError, run, say, venv_is_sound, venv_python

FOLDER = ".venv-infinigen"
LOCK = "requirements-infinigen.lock"
# The child process says that it is up once everything that it imports is there.
SPAWN = ROOT / "trainer" / "sources" / "infinigen_spawn.py"


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    try:
        make(ROOT)
    except SetupError as error:
        print(f"make infinigen: {error}", file=sys.stderr)
        return 1
    return 0


def make(root: Path) -> None:
    """Make the environment in `root`. Raises SetupError with one clear line."""
    if sys.version_info[:2] != (3, 11):
        raise SetupError("Python 3.11 is needed (bpy 4.2 is built for no other): make infinigen PYTHON=python3.11")
    lock = root / LOCK
    venv = root / FOLDER
    stamp = venv / ".stamp"
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    if venv_is_sound(venv) and stamp.exists() and stamp.read_text() == digest:
        say("nothing to do")
        return
    if not venv_is_sound(venv):
        say(f"creating {FOLDER}")
        run(sys.executable, "-m", "venv", "--clear", venv, what="creating the virtual environment (Debian: python3.11-venv)")
    marker = venv / ".installing"
    stamp.unlink(missing_ok=True)
    marker.touch()  # stays behind when this run is interrupted: the next one starts over
    pip = (venv_python(venv), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off", "--quiet")
    say(f"everything in {LOCK} (bpy alone is some 520 MB)")
    run(*pip, "--no-deps", "--only-binary", ":all:", "--requirement", lock, what=f"installing {LOCK}")
    say("checking what was installed")
    check = subprocess.run([venv_python(venv), "-P", SPAWN], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if '"ready"' not in check.stdout:
        lines = check.stderr.strip().splitlines()
        raise SetupError(lines[-1] if lines else f"the check ended with status {check.returncode}")
    marker.unlink()
    stamp.write_text(digest)
    say("ready: --sources infinigen")


if __name__ == "__main__":
    sys.exit(main())
