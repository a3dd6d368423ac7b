"""mkdocs' hooks: pages outside docs/ are part of the site too; links between both hold in the repository and on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
# In the repository -> on the site.
OUTSIDE = {
    "README.md": "overview.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "models/starter/CREDITS.md": "credits.md",
    "LICENSE": "LICENSE",
}
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files, config):
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links as the site has them. What leads to neither a page nor a file of docs/ stays, for mkdocs to complain of."""
    source = {page_name: source for source, page_name in OUTSIDE.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def target(link: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        return OUTSIDE.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else link[1])

    return _LINK.sub(target, markdown)
