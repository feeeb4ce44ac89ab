"""The table of models in docs/models.md: `python docs/scripts/zoo_table.py` writes it anew.

Parameters and multiply-adds of the published models are those recorded of the public code
(tests/golden/models.json and families.json.gz), less what ours leave out: tests/models/test_public.py and
test_families.py hold ours to them, and to recorded logits where the last column says so. FLatten-DeiT, which
was never published, is counted. Accuracies and checkpoints are what the public repositories' READMEs state.
"""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import flatten_ext.models  # noqa: F401  registers them

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
PAGE = ROOT / "docs" / "models.md"
MARKS = re.compile(
    r"(?<=<!-- zoo, by docs/scripts/zoo_table.py -->\n\n).*?(?=\n<!-- end of the zoo -->)", re.S
)

# Of the public README, at commit abdb115: ImageNet-1K top-1 of the published checkpoints.
PUBLISHED = {
    "flatten_pvt_tiny": "77.8",
    "flatten_pvt_v2_b0": "71.1",
    "flatten_swin_t": "82.1",
    "flatten_swin_s": "83.5",
    "flatten_swin_b": "83.8",
    "flatten_swin_b_384": "85.0",
    "flatten_cswin_t": "83.1",
}
SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large"}
RENAMED = {
    "mlla": "mila",
    "RAVLT": "ravlt",
    "MALA": "mavit",
    "_patch4_224": "",
    "_patch4_384_finetune": "_384",
}


def our_name(public: str) -> str:
    """flatten_swin_t -> flatten_swin_tiny, MALA_T -> mavit_tiny."""
    for theirs, ours in RENAMED.items():
        public = public.replace(theirs, ours)
    return "_".join(SIZES.get(part.lower(), part) for part in public.split("_"))


def with_logits() -> set[str]:
    """Our names of the models of which the public code's logits are recorded."""
    recorded = {path.stem.removeprefix("model_") for path in GOLDEN.glob("model_*.npz")}
    for path in GOLDEN.glob("family_*.npz"):
        with np.load(path) as file:
            recorded.add(json.loads(str(file["meta"]))["variant"])
    return set(map(our_name, recorded))


def folded_lepe(config: dict) -> int:
    """Multiply-adds of LePE in CSWin's stages of type L, whose kernel ours adds to the taps."""
    if config["family"] != "cswin":
        return 0
    side, total = config["img_size"] // 4, 0
    for stage, (kind, depth) in enumerate(zip(config["attn_type"], config["depths"], strict=True)):
        if kind == "L":
            total += depth * 9 * (side >> stage) ** 2 * (config["embed_dim"] << stage)
    return total


def deit() -> list[tuple[str, int, int, int]]:
    """Name, image size, parameters and multiply-adds of the models that have no record."""
    rows = []
    for size in ("tiny", "small", "base"):
        with torch.device("meta"):
            model = timm.create_model(f"flatten_deit_{size}").eval()
            image = torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
        parameters = sum(p.numel() for p in model.parameters())
        rows.append((f"flatten_deit_{size}", 224, parameters, counter.get_total_flops() // 2))
    return rows


def table() -> str:
    lines = [
        "| model | px | parameters | multiply-adds | top-1 | checkpoint, saved as | as in the public code |",
        "|---|---:|---:|---:|---:|---|---|",
    ]
    logits = with_logits()

    def add(name: str, size: int, parameters: int, adds: int, top1: str, checkpoint: str) -> None:
        checked = "names, shapes, sizes" + (", logits" if name in logits else "")
        checked = "" if name.startswith("flatten_deit") else checked
        lines.append(
            f"| `{name}` | {size} | {parameters / 1e6:.2f} M | {adds / 1e9:.2f} G | {top1} | {checkpoint} "
            f"| {checked} |"
        )

    for row in deit():
        add(*row, "", "not published")
    public = json.loads((GOLDEN / "models.json").read_text())
    for name, record in public.items():
        config = record["config"]
        last_norm = 1024 if name.startswith("flatten_pvt") and "v2" not in name else 0
        adds = record["flops"] // 2 - folded_lepe(config)
        link = timm.get_pretrained_cfg(our_name(name)).origin_url
        file = f"[`{name}.pth`]({link})" if link else "not published"
        top1 = PUBLISHED.get(name, "")
        add(our_name(name), config["img_size"], record["params"] - last_norm, adds, top1, file)
    with gzip.open(GOLDEN / "families.json.gz") as families:
        others = json.load(families)
    for name, record in others.items():
        link = timm.get_pretrained_cfg(our_name(name)).origin_url
        where = f"[{link.removeprefix('https://github.com/')}]({link})" if link else "not published"
        top1 = record["readme"]["top1"] or ""
        size, adds = record["img_size"], int(record["macs"])
        add(our_name(name), size, record["params"], adds, str(top1), where)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(MARKS.sub(lambda _: table(), PAGE.read_text()))
