"""Links of the pages to files outside docs/: mkdocs calls this for every page (see mkdocs.yml).

In the repository a page links to the source it speaks of. The site has no sources, so there the link goes to
the repository that it is built in, or, built elsewhere, becomes the file's name.
"""

from __future__ import annotations

import os
import re

OUTSIDE = re.compile(r"\[([^\]]*)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, **_: object) -> str:
    repository = os.environ.get("GITHUB_REPOSITORY")
    if not repository:
        return OUTSIDE.sub(_named, markdown)
    base = f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{repository}/blob/main"
    return OUTSIDE.sub(rf"[\1]({base}/\2)", markdown)


def _named(link: re.Match[str]) -> str:
    """The link's words with the file's name, where they are not the name already."""
    words, file = link[1], link[2].partition("#")[0]
    if words.startswith("`"):
        return words
    return f"`{file}`" if words == file else f"{words} (`{file}`)"


def on_page_content(html: str, **_: object) -> str:
    """Docstrings open a block with two colons, as reStructuredText does; a page shows one."""
    return html.replace("::</p>", ":</p>")
