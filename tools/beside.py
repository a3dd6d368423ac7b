"""Environments beside the main one, each with a lock of its own: Infinigen's, and the documentation site's."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from setup import PYTHON, SetupError, run, say, venv_is_sound, venv_python


def make(root: Path, folder: str, lock: str, check: Sequence[str | Path], answer: str, note: str = "") -> Path:
    """Make an environment in `root`, or leave it alone where it is there and whole. Returns its Python.

    Args:
        folder: its name in `root`, such as ".venv-docs".
        lock: the file in `root` whose lines it holds, and nothing else.
        check: arguments of its Python for a run that imports what it is there for.
        answer: what that run prints when all is well.
        note: said before the installation, such as how large it is.

    Raises:
        SetupError: one clear line.
    """
    if sys.version_info[:2] != PYTHON:
        raise SetupError(f"Python 3.11 is needed for {folder}: give make PYTHON=python3.11")
    venv, lines = root / folder, root / lock
    stamp, marker = venv / ".stamp", venv / ".installing"
    digest = hashlib.sha256(lines.read_bytes()).hexdigest()
    if venv_is_sound(venv) and stamp.exists() and stamp.read_text() == digest:
        return venv_python(venv)
    if not venv_is_sound(venv):
        say(f"creating {folder}")
        run(sys.executable, "-m", "venv", "--clear", venv, what="creating the virtual environment (Debian: python3.11-venv)")
    stamp.unlink(missing_ok=True)
    marker.touch()  # stays behind when this run is interrupted: the next one starts over
    pip = (venv_python(venv), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off", "--quiet")
    say(f"everything in {lock}{note and f' ({note})'}")
    run(*pip, "--no-deps", "--only-binary", ":all:", "--requirement", lines, what=f"installing {lock}")
    say("checking what was installed")
    done = subprocess.run([venv_python(venv), *check], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if answer not in done.stdout:
        errors = done.stderr.strip().splitlines()
        marker.unlink()  # what is installed is whole
        raise SetupError(errors[-1] if errors else f"the check ended with status {done.returncode}")
    marker.unlink()
    stamp.write_text(digest)
    return venv_python(venv)
