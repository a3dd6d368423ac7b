"""`make infinigen`: .venv-infinigen, the environment of the object source `infinigen`: Infinigen with the Blender it is made for.

About 2.5 GB. Run by Python 3.11; does nothing where the environment is there and whole.
"""

from __future__ import annotations

import argparse
import sys

import beside
from setup import ROOT, SetupError, say

# The child process says that it is up once everything that it imports is there.
SPAWN = ROOT / "trainer" / "sources" / "infinigen_spawn.py"


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    try:
        beside.make(ROOT, ".venv-infinigen", "requirements-infinigen.lock", ("-P", SPAWN), '"ready"', "bpy alone is some 520 MB")
    except SetupError as error:
        print(f"make infinigen: {error}", file=sys.stderr)
        return 1
    say("ready: --sources infinigen")
    return 0


if __name__ == "__main__":
    sys.exit(main())
