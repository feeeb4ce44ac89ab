"""What a package index, and a visitor of the repository, see first."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".github" / "scripts" / "publishable.py"
RELATIVE = re.compile(r"!?\[[^\]]*\]\((?!https?://|#|mailto:)([^)\s#]+)")
PAGES = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("csrc/**/*.md"),
    *ROOT.glob("benchmarks/*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    missing = [link for link in RELATIVE.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_release_has_absolute_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the release workflow calls it; the sources stay relative, and hold no address to go stale."""
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(SCRIPT))
    script["main"]("https://example.org/team/flatten-ext", "v9.8.7")
    readme = (tmp_path / "README.md").read_text()
    assert RELATIVE.findall(ROOT.joinpath("README.md").read_text())
    assert not RELATIVE.findall(readme)
    base = "https://example.org/team/flatten-ext"
    assert f"]({base}/raw/v9.8.7/docs/images/headline.svg)" in readme
    assert f"]({base}/blob/v9.8.7/docs/evidence.md)" in readme
    pyproject = (tmp_path / "pyproject.toml").read_text()
    assert f'[project.urls]\nRepository = "{base}"\nIssues = "{base}/issues"\n' in pyproject
    assert 'Paper = "https://arxiv.org/abs/2308.00442"\n' in pyproject
    with pytest.raises(SystemExit, match="expected https://host/owner/name"):
        script["main"]("example.org", "v1")
