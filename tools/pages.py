"""`make docs`: the documentation site in site/, from docs/ and the pages of the root, in an environment of its own (.venv-docs, 165 MB).

    python tools/pages.py [--serve]

Built strictly: a link or an anchor that leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

import beside
from setup import ROOT, SetupError

CHECK = "import material, mkdocs; print('ready')"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="show the site on this machine and follow changes, instead of writing it")
    arguments = parser.parse_args()
    try:
        python = beside.make(ROOT, ".venv-docs", "requirements-docs.lock", ("-c", CHECK), "ready")
    except SetupError as error:
        print(f"make docs: {error}", file=sys.stderr)
        return 1
    what = ["serve", "--strict"] if arguments.serve else ["build", "--strict", "--clean"]  # --quiet would also quieten what makes it strict
    # Material warns of another program's plans at every build otherwise.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    status = subprocess.run([str(python), "-m", "mkdocs", *what], cwd=ROOT, env=environment).returncode
    if status == 0 and not arguments.serve:
        print("site/index.html")
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
