"""`make test-blender`: the add-on's tests on every Blender version that the extension serves, one environment each.

    python tools/matrix.py [VERSION ...] [--skip-missing]

The main version runs in this environment; those of pyproject.toml's [tool.gaussian-atlas.blender] in .venv-VERSION, which is made
here where it is missing or out of date. A version whose Python is nowhere is named and counts as failed, the others still run.
Last come the tests that carry one .blend from version to version.
"""

from __future__ import annotations

import argparse
import glob
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from setup import MAIN, ROOT, Environment, environments, venv_python

ACROSS = "tests/test_versions.py"


def find_python(version: tuple[int, int]) -> str | None:
    """A Python of that version: PYTHON313 and the like from the environment, pythonX.Y on PATH, or one that pyenv keeps."""
    name = f"{version[0]}.{version[1]}"
    pyenv = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
    named = os.environ.get(f"PYTHON{version[0]}{version[1]}")
    candidates = [named] if named else [shutil.which(f"python{name}"), *sorted(glob.glob(f"{pyenv}/versions/{name}.*/bin/python{name}"))]
    code = f"import sys; sys.exit(sys.version_info[:2] != {version})"
    for candidate in filter(None, candidates):
        try:
            if subprocess.run([candidate, "-c", code], capture_output=True).returncode == 0:
                return candidate
        except OSError:
            continue
    return None


def missing_python(version: str, environment: Environment) -> str:
    """The one line for a person whose machine lacks the Python of a Blender version."""
    name = ".".join(map(str, environment.python))
    return (
        f"Blender {version} needs Python {name} (bpy {environment.bpy} is built for no other), which was not found: "
        f"install it (pyenv install {name}; Debian 13: sudo apt-get install python{name} python{name}-venv), "
        f"or name it with PYTHON{name.replace('.', '')}=/path/to/python{name}, or leave it out with SKIP=1"
    )


def prepare(version: str, environment: Environment) -> Path | str:
    """The environment's Python, made ready for tests; else one line that says why not."""
    if environment is MAIN:
        return Path(sys.executable)
    python = find_python(environment.python)
    if python is None:
        return missing_python(version, environment)
    print(f"test-blender: environment of Blender {version}", flush=True)
    if subprocess.run([python, str(ROOT / "tools" / "setup.py"), "--blender", version]).returncode:
        return f"the environment {environment.folder} of Blender {version} could not be made: see the lines above"
    return venv_python(ROOT / environment.folder)


def run_tests(python: Path, *what: str | Path) -> int:
    """pytest's exit status for a run of another environment's Python."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GAUSSIAN_ATLAS_EXTENSION_ZIP", "BLENDER_USER_RESOURCES")}
    return subprocess.run([str(python), *map(str, what)], cwd=ROOT, env=environment).returncode


def main() -> int:
    known = environments()
    known[".".join(MAIN.bpy.split(".")[:2])] = MAIN
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(sorted(known))} (default: all)")
    parser.add_argument("--skip-missing", action="store_true", help="a version whose Python is not installed is left out, not an error")
    arguments = parser.parse_args()
    if unknown := [version for version in arguments.versions if version not in known]:
        print(f"make test-blender: VERSIONS names {', '.join(unknown)}: known are {', '.join(sorted(known))}", file=sys.stderr)
        return 2
    outcomes: dict[str, str] = {}
    for version in arguments.versions or sorted(known):
        environment = known[version]
        skip = arguments.skip_missing and environment is not MAIN and find_python(environment.python) is None
        ready = missing_python(version, environment) if skip else prepare(version, environment)
        if isinstance(ready, str):
            print(f"make test-blender: {ready}", file=sys.stderr, flush=True)
            outcomes[version] = "left out" if skip else "not run"
            continue
        print(f"test-blender: Blender {version} (bpy {environment.bpy})", flush=True)
        began = time.monotonic()
        status = run_tests(ready, "tools/extension.py", "test", "--checkout")
        outcomes[version] = f"{'passed' if status == 0 else 'FAILED'} in {time.monotonic() - began:.0f} s"
    if sum("passed" in outcome for outcome in outcomes.values()) > 1:
        print("test-blender: one .blend through the versions", flush=True)
        outcomes["across"] = "passed" if run_tests(Path(sys.executable), "-m", "pytest", "-q", ACROSS) == 0 else "FAILED"
    for name, outcome in outcomes.items():
        print(f"test-blender: {f'Blender {name}' if name in known else 'from version to version':<24} {outcome}")
    return 0 if all("passed" in outcome or outcome == "left out" for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
