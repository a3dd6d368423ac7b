"""The set of packages behind `pyproject.toml`: walk what installed packages declare, and write requirements.lock.

requirements.lock names every package of the environment with its exact version, and nothing else: no address, no path.
`make lock` rewrites it from the environment in use, so that a fresh machine installs what was tested.
extension.lock names every wheel of every extension zip with its size and hash; tools/extension.py writes it.
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
WHEEL_LOCK = ROOT / "extension.lock"

HEADER = """\
# Every package of the environment, as tested (Linux x86-64, Python 3.11). Written by `make lock`; installed by `make setup`.
# Complete on purpose: `pip install --no-deps -r requirements.lock` brings nothing else, torch's own GPU packages aside.
"""

WHEEL_HEADER = """\
# Every wheel of every extension zip: file name, bytes, SHA-256. Written by `make lock-wheels`; a build refuses any other file.
"""


@dataclass(frozen=True)
class LockedWheel:
    """One wheel of extension.lock."""

    file: str
    size: int  # bytes
    sha256: str

    @property
    def name(self) -> str:
        return parse_wheel_filename(self.file)[0]

    @property
    def version(self) -> Version:
        return parse_wheel_filename(self.file)[1]


def read_project(root: Path = ROOT) -> dict:
    """The parsed pyproject.toml of the repository at `root`."""
    with open(root / "pyproject.toml", "rb") as file:
        return tomllib.load(file)


def direct_requirements(project: Mapping) -> list[Requirement]:
    """The requirements that the lock starts from: the project's own, and the extras and groups that pyproject.toml names."""
    scope = project["tool"]["gaussian-atlas"]["lock"]
    lines = list(project["project"]["dependencies"])
    for extra in scope["extras"]:
        lines += project["project"]["optional-dependencies"][extra]
    for group in scope["groups"]:
        lines += project["dependency-groups"][group]
    return [Requirement(line) for line in lines]


def closure(
    roots: Iterable[Requirement],
    left_out: Mapping[str, Iterable[str]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Every installed package that `roots` need, directly or not, as {canonical name: version without a local part}.

    Args:
        roots: requirements to start from.
        left_out: {package, or "*" for any: [requirement names not to follow]}.
        environment: marker values that differ from this interpreter's, such as {"sys_platform": "win32"}.

    Raises:
        LookupError: a needed package is not installed, so its version and needs are unknown.
    """
    skip = {canonicalize_name(k) if k != "*" else k: {canonicalize_name(v) for v in values} for k, values in (left_out or {}).items()}
    found: dict[str, str] = {}
    visited: set[tuple[str, frozenset[str]]] = set()
    pending = [(root, "pyproject.toml") for root in roots]
    while pending:
        requirement, wanted_by = pending.pop()
        name = canonicalize_name(requirement.name)
        marker_values = {"extra": "", **(environment or {})}
        if name in skip.get("*", ()) or (requirement.marker and not requirement.marker.evaluate(marker_values)):
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise LookupError(f"{name} (needed by {wanted_by}) is not installed: run `make setup`, or pip install it first") from None
        extras = frozenset(requirement.extras)
        if (name, extras) in visited:
            continue
        visited.add((name, extras))
        found[name] = distribution.version.split("+")[0]
        for line in distribution.requires or []:
            need = Requirement(line)
            if canonicalize_name(need.name) in skip.get(name, ()):
                continue
            plain = need.marker is None or need.marker.evaluate(marker_values)
            if plain or any(need.marker.evaluate({**marker_values, "extra": extra}) for extra in extras):
                need.marker = None
                pending.append((need, name))
    return dict(sorted(found.items()))


def read_lock(path: Path = LOCK) -> dict[str, str]:
    """{canonical name: version} of a lock file. Raises ValueError for a line that is not `name==version`."""
    pins = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([0-9][A-Za-z0-9.!]*)", text)
        if not match:
            raise ValueError(f"{path.name} line {number}: expected name==version, found {text!r}")
        pins[canonicalize_name(match[1])] = match[2]
    return pins


def read_wheels(path: Path = WHEEL_LOCK) -> dict[str, list[LockedWheel]]:
    """{label of a zip: its wheels} of extension.lock, {} where there is none. Raises ValueError for a file that is not such a lock."""
    if not path.exists():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return {label: [LockedWheel(name, e["size"], e["sha256"]) for name, e in entries.items()] for label, entries in table.items()}
    except (tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} is not a lock of wheels ({error}): run `make lock-wheels`") from None


def write_wheels(wheels: Mapping[str, Iterable[LockedWheel]], path: Path = WHEEL_LOCK) -> None:
    """The inverse of read_wheels, sorted, so that a change shows as changed lines."""
    text = WHEEL_HEADER
    for label in sorted(wheels):
        lines = (f'"{w.file}" = {{ size = {w.size}, sha256 = "{w.sha256}" }}\n' for w in sorted(wheels[label], key=lambda w: w.file))
        text += f"\n[{label}]\n" + "".join(lines)
    temporary = path.with_suffix(".lock.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def main() -> int:
    project = read_project()
    scope = project["tool"]["gaussian-atlas"]["lock"]
    try:
        pins = closure(direct_requirements(project), scope["unused"])
    except LookupError as error:
        print(f"make lock: {error}", file=sys.stderr)
        return 1
    if bad := sorted(set(pins) & set(scope["forbidden"]) | {name for name in pins if name.startswith("nvidia-")}):
        print(f"make lock: {', '.join(bad)} must not be in the CPU environment: uninstall, then try again", file=sys.stderr)
        return 1
    temporary = LOCK.with_suffix(".lock.part")
    temporary.write_text(HEADER + "".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
    os.replace(temporary, LOCK)
    print(f"{LOCK.name}: {len(pins)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
