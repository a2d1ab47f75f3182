"""What mkdocs does beside its own: pages outside of docs/, and links between them and the others.

The pages are written to be read in the repository, too, where their links point to its files. On
the site a link goes to the page that a file has there; a file without a page keeps its name, as
plain text, since the site does not have it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = "docs/"
# In the repository -> on the site
OUTSIDE = {
    name: name
    for name in (
        "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/NOTES.md",
        "kernels/README.md",
    )
}  # fmt: skip
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
FROM_ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(?:https?:)?//")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie outside of docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_serve(server: Any, **_: Any) -> Any:
    """Build again when one of those changes, too."""
    for source in OUTSIDE:
        server.watch(str(ROOT / source))
    return server


def on_page_markdown(markdown: str, page: Any, files: Files, **_: Any) -> str:
    """Point the links to where the files are on the site."""
    here = page.file.src_uri
    source = here if here in OUTSIDE else DOCS + here

    def on_the_site(link: re.Match[str]) -> str:
        text, target = link["text"], urlsplit(link["target"])
        if target.scheme or target.netloc or not target.path:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target.path))
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: there is no {path}, which {link[0]} points to.")
        there = "index.md" if path == "README.md" else OUTSIDE.get(path, path.removeprefix(DOCS))
        if files.get_file_from_path(there) is None:
            return text
        relative = posixpath.relpath(there, posixpath.dirname(here) or ".")
        return f"[{text}]({relative}{'#' + target.fragment if target.fragment else ''})"

    parts = FENCED.split(markdown)
    return "".join(
        part if number % 2 else LINK.sub(on_the_site, part) for number, part in enumerate(parts)
    )


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load something from elsewhere."""
    if found := FROM_ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another server: {found[0]}")
    return output
