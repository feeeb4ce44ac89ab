"""The documentation: every Python block runs, generated parts are current, and the site builds."""

from __future__ import annotations

import functools
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)


def without_download(create, name: str, pretrained: bool = False, **kwargs):
    """timm.create_model, of few layers where a page does not say how many there are."""
    if name == "flatten_pvt_v2_b0":
        kwargs = {"depths": (1, 1, 1, 1), **kwargs}
    if name == "deit_tiny_patch16_224":
        kwargs = {"depth": 4, **kwargs}
    return create(name, **kwargs)


def published_checkpoint(path: Path) -> None:
    """A file as the published ones are, of random numbers."""
    models = json.loads((ROOT / "tests" / "golden" / "models.json").read_text())
    shapes = models["flatten_swin_t"]["state_dict"]
    torch.save({"model": {key: torch.rand(shape) for key, shape in shapes.items()}}, path)


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=lambda p: p.stem)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page one after the other, as a reader would type them."""
    text = page.read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", functools.partial(without_download, timm.create_model))
    if "flatten_swin_t.pth" in text:
        published_checkpoint(tmp_path / "flatten_swin_t.pth")
    names: dict = {}
    for i, block in enumerate(BLOCK.findall(text)):
        exec(compile(block, f"{page.name}, block {i + 1}", "exec"), names)


def test_generated_parts_are_current() -> None:
    """Those that docs/scripts write."""
    picture = runpy.run_path(str(ROOT / "docs" / "scripts" / "operator_picture.py"))["picture"]()
    assert (ROOT / "docs" / "images" / "operator.svg").read_text() == picture
    zoo = runpy.run_path(str(ROOT / "docs" / "scripts" / "zoo_table.py"))
    page = (ROOT / "docs" / "models.md").read_text()
    assert zoo["MARKS"].search(page)[0] == zoo["table"]()
    # The accuracies are the paper's, as docs/evidence.md has them.
    evidence = (ROOT / "docs" / "evidence.md").read_text()
    rows = evidence.partition("| model | original | FLatten |")[2].partition("\n\n")[0]
    accuracies = sorted(zoo["PUBLISHED"].values())
    assert sorted(re.findall(r"([\d.]+) \|$", rows, re.M)) == accuracies


def test_the_walk_through_cuda_has_the_counted_numbers() -> None:
    row = re.compile(r"^\| (?:56x56 C=96 h=3 \| )?(`tensorcore::.*)$", re.M)
    counted, walked = (
        row.findall((ROOT / "docs" / page).read_text()) for page in ("cuda_counters.md", "kernels.md")
    )
    counted = [" | ".join(line.split(" | ")[:4]) + " |" for line in counted]
    assert walked == counted[: len(walked)] != []


def test_every_model_is_in_the_zoo() -> None:
    import flatten_ext.models  # noqa: F401  registers them

    rows = re.findall(r"^\| `(\w+)` \| \d", (ROOT / "docs" / "models.md").read_text(), re.M)
    ours = [
        name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("flatten")
    ]
    assert len(ours) == 21 + 34
    assert sorted(rows) == sorted(ours)


@pytest.mark.packaging
def test_site_builds(tmp_path: Path) -> None:
    """Without a warning: links, anchors, docstrings."""
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text()
    assert "flatten_ext.ops.attention" in page
