"""Makes README.md and pyproject.toml fit for a package index, just before a release is built.

In the repository README.md links to files beside it, so that a link leads to the file of the branch that is
read. A package index has no files beside it. This rewrites the working tree's copy to links and images of the
repository at the release's tag, and gives pyproject.toml the repository's pages as project urls:

    python .github/scripts/publishable.py https://host/owner/name v1.2.3

The release workflow calls it with the address that it runs at, so no address stands in the sources.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"(!?\[[^\]]*\]\()(?!https?://|#|mailto:)([^)\s]+)(\))")


def absolute_links(text: str, repository: str, tag: str) -> str:
    """Markdown with its relative links led to `repository` at `tag`; images to the files' own bytes."""

    def absolute(match: re.Match[str]) -> str:
        view = "raw" if match[1].startswith("!") else "blob"
        return f"{match[1]}{repository}/{view}/{tag}/{match[2]}{match[3]}"

    return LINK.sub(absolute, text)


def project_urls(text: str, repository: str) -> str:
    """pyproject.toml with the repository's pages among its project urls."""
    urls = {
        "Repository": repository,
        "Issues": f"{repository}/issues",
        "Changelog": f"{repository}/blob/main/CHANGELOG.md",
    }
    head = "[project.urls]\n"
    if text.count(head) != 1:
        raise ValueError(f"pyproject.toml has {text.count(head)} lines {head.strip()}, expected one")
    return text.replace(head, head + "".join(f'{name} = "{url}"\n' for name, url in urls.items()))


def main(repository: str, tag: str) -> None:
    if not re.fullmatch(r"https://[^/\s]+/[^/\s]+/[^/\s]+", repository):
        raise SystemExit(f"repository is {repository!r}, expected https://host/owner/name")
    readme, pyproject = Path("README.md"), Path("pyproject.toml")
    text = absolute_links(readme.read_text(encoding="utf-8"), repository, tag)
    urls = project_urls(pyproject.read_text(encoding="utf-8"), repository)
    readme.write_text(text, encoding="utf-8")
    pyproject.write_text(urls, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
