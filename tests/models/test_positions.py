"""On what map a checkpoint's positions were learned: kept with them, told by the names, or asked for."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import golden_data
import pytest
import timm
import torch
import torch.nn.functional as F
from families import SMALL, small
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import Tensor, nn

import flatten_ext
from flatten_ext.models import checkpoint_filter

PUBLIC = json.loads((golden_data.FOLDER / "models.json").read_text())
# Families, and every other way in which positions lie on a map; image sizes are at stride 4, in DeiT 16.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in SMALL},
    "deit, registers": ("deit", {"reg_tokens": 3, "no_embed_class": True}),
    "pvt, reduced keys": ("pvt", {"la_sr_ratios": (8, 4, 2, 1)}),
    "pvt_v2, pooled keys": ("pvt_v2", {"linear": True, "attn_type": "LLSS"}),
    "cswin, stripes": ("cswin", {"la_split_sizes": (None, 7, None, None)}),
    "cswin, stripes only": ("cswin", {"la_split_sizes": (8, 4, 2, None), "attn_type": "LLLS"}),
    "swin, all linear": ("swin", {"attn_type": "LLLL"}),
}
WIDE, SQUARE = (128, 512), (256, 256)


def build(variant: str, img_size: tuple[int, int]) -> nn.Module:
    """A model of the variant whose positions are told apart."""
    family, config = VARIANTS[variant]
    model = small(family, img_size=img_size, **config).eval()
    with torch.no_grad():
        for value in positions(model).values():
            value.normal_()
    return model


def positions(model: nn.Module) -> dict[str, Tensor]:
    endings = ("positional_encoding", "pos_embed", "relative_position_bias_table")
    return {name: value for name, value in model.named_parameters() if name.endswith(endings)}


def stem(variant: str, img_size: tuple[int, int]) -> tuple[int, int]:
    patch = 16 if VARIANTS[variant][0] == "deit" else 4
    return img_size[0] // patch, img_size[1] // patch


def maps(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The map of each positional encoding, by what the model is built for."""
    return {
        f"{name}.positional_encoding": tuple(module.grid)
        for name, module in model.named_modules()
        if hasattr(module, "positional_encoding")
    }


def check_resampled(model: nn.Module, source: nn.Module) -> None:
    """Every encoding is the source's, bicubically brought from its map to the model's."""
    old, new, learned = maps(source), maps(model), positions(source)
    assert old
    for name, value in positions(model).items():
        if not name.endswith("positional_encoding"):
            continue
        prefix = value.shape[1] - new[name][0] * new[name][1]
        image = learned[name][:, prefix:].transpose(1, 2).unflatten(2, old[name])
        image = F.interpolate(image, new[name], mode="bicubic").flatten(2).transpose(1, 2)
        expected = torch.cat((learned[name][:, :prefix], image), 1)
        torch.testing.assert_close(value, expected, msg=name)


def check_equal(model: nn.Module, source: nn.Module) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(source.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("old", "new"), [(WIDE, SQUARE), (SQUARE, WIDE), (WIDE, (512, 128)), (WIDE, (96, 96))]
)
def test_torch_save_keeps_the_map(
    variant: str, old: tuple[int, int], new: tuple[int, int], tmp_path: Path
) -> None:
    source, model, same = build(variant, old), build(variant, new), build(variant, old)
    torch.save(source.state_dict(), tmp_path / "own.pth")
    check_equal(flatten_ext.load_official(same, tmp_path / "own.pth"), source)
    flatten_ext.load_official(model, tmp_path / "own.pth")
    check_resampled(model, source)
    flatten_ext.load_official(model, tmp_path / "own.pth", grid=stem(variant, old))
    saved = torch.load(tmp_path / "own.pth", weights_only=True)
    same.load_state_dict(saved)
    if "pooled" in variant:
        return
    with pytest.raises(ValueError, match=r"grid \(31, 17\) does not fit"):
        flatten_ext.load_official(model, tmp_path / "own.pth", grid=(31, 17))
    as_many_tokens = new != (96, 96) and "only" not in variant  # in the first stage at least
    with pytest.raises(
        RuntimeError, match=r"grid mismatch for .*load_official" if as_many_tokens else "size mismatch"
    ):
        model.load_state_dict(saved, strict=False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["safetensors", "dict"])
@pytest.mark.parametrize("old", [WIDE, SQUARE])
def test_a_lost_map_is_asked_for(variant: str, form: str, old: tuple[int, int], tmp_path: Path) -> None:
    """Whatever the model's own size is: as many tokens may have lain on another map."""
    source, path = build(variant, old), tmp_path / f"own.{form}"
    if form == "safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save({"model": {key: value.clone() for key, value in source.state_dict().items()}}, path)
    for new in (WIDE, SQUARE, (96, 160)):
        model = build(variant, new)
        before = copy.deepcopy(model)
        if "pooled" in variant:  # 7 x 7, whatever the image was
            flatten_ext.load_official(model, path)
            check_resampled(model, source)
            continue
        with pytest.raises(ValueError, match=r"has \d+ tokens: a map of .*Pass grid=\(height, width\)"):
            flatten_ext.load_official(model, path)
        with pytest.raises(ValueError, match=r"grid \(5, 7\) does not fit"):
            flatten_ext.load_official(model, path, grid=(5, 7))
        check_equal(model, before)
        flatten_ext.load_official(model, path, grid=stem(variant, old))
        check_resampled(model, source)
        if new == old:
            check_equal(model, source)
    # To torch it is a state of this very model.
    same = build(variant, old)
    same.load_state_dict(dict(source.state_dict()))
    check_equal(same, source)


def test_grid_is_checked(tmp_path: Path) -> None:
    model = build("pvt_v2", (64, 64))
    torch.save(dict(model.state_dict()), tmp_path / "own.pth")
    for bad in (0, (16,), (16, 16, 1), (16.0, 16.0), (-4, -64), "16"):
        with pytest.raises(ValueError, match="grid is"):
            flatten_ext.load_official(model, tmp_path / "own.pth", grid=bad)
    flatten_ext.load_official(model, tmp_path / "own.pth", grid=16)


def test_one_token_fits_one_map(tmp_path: Path) -> None:
    model = build("deit", (16, 16))
    torch.save(dict(model.state_dict()), tmp_path / "own.pth")
    flatten_ext.load_official(model, tmp_path / "own.pth")


@pytest.mark.parametrize("wrapper", ["parallel", "compiled", "both", "averaged"])
def test_wrapped_models(wrapper: str, tmp_path: Path) -> None:
    source, model = build("pvt", WIDE), build("pvt", SQUARE)
    wrapped: nn.Module = source
    if wrapper in ("parallel", "both"):
        wrapped = nn.ModuleDict({"module": wrapped})
    if wrapper in ("compiled", "both"):
        wrapped = nn.ModuleDict({"_orig_mod": wrapped})
    saved: dict[str, Any] = {"state_dict": wrapped.state_dict(), "epoch": 3}
    if wrapper == "averaged":
        saved = {"state_dict": build("pvt", WIDE).state_dict(), "state_dict_ema": source.state_dict()}
    torch.save(saved, tmp_path / "own.pth")
    flatten_ext.load_official(model, tmp_path / "own.pth")
    check_resampled(model, source)


@pytest.mark.parametrize("variant", VARIANTS)
def test_copies_and_resized_models_know_their_map(variant: str, tmp_path: Path) -> None:
    source = pickle.loads(pickle.dumps(copy.deepcopy(build(variant, SQUARE))))
    if variant == "swin":  # whose softmax windows would grow
        source.set_input_size(WIDE, window_size=(None, None, 7, 7))
    else:
        source.set_input_size(WIDE)
    torch.save(source.state_dict(), tmp_path / "own.pth")
    same, model = build(variant, WIDE), build(variant, SQUARE)
    same.load_state_dict(torch.load(tmp_path / "own.pth", weights_only=True))
    check_equal(same, source)
    flatten_ext.load_official(model, tmp_path / "own.pth")
    check_resampled(model, source)


def published(names: dict[str, str], config: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of one of our models under the public code's names."""
    out = {}
    for key, value in model.state_dict().items():
        for pattern, public in names.items():
            key = re.sub(pattern, public, key)
        out[key] = value
    return out


NAMES: dict[str, dict[str, str]] = {
    "cswin": {
        r"^patch_embed\.proj": "stage1_conv_embed.0",
        r"^patch_embed\.norm": "stage1_conv_embed.2",
        r"^stages\.1\.downsample\.(proj|norm)": r"merge1.\1",
        r"^stages\.2\.downsample\.(proj|norm)": r"merge2.\1",
        r"^stages\.3\.downsample\.(proj|norm)": r"merge3.\1",
        r"^(merge\d)\.proj": r"\1.conv",
        r"^stages\.0\.blocks": "stage1",
        r"^stages\.1\.blocks": "stage2",
        r"^stages\.2\.blocks": "stage3",
        r"^stages\.3\.blocks": "stage4",
    },
    "pvt": {
        r"^patch_embed\.": "patch_embed1.",
        r"^stages\.1\.downsample": "patch_embed2",
        r"^stages\.2\.downsample": "patch_embed3",
        r"^stages\.3\.downsample": "patch_embed4",
        r"^stages\.0\.": "s1.",
        r"^stages\.1\.": "s2.",
        r"^stages\.2\.": "s3.",
        r"^stages\.3\.": "s4.",
        r"^s(\d)\.blocks": r"block\1",
        r"^s(\d)\.pos_embed": r"pos_embed\1",
    },
    "swin": {
        r"^layers\.1\.downsample": "layers.0.down",
        r"^layers\.2\.downsample": "layers.1.down",
        r"^layers\.3\.downsample": "layers.2.down",
        r"\.down\.": ".downsample.",
        r"^head\.fc": "head",
    },
}
NAMES["pvt_v2"] = {**NAMES["pvt"], r"^s(\d)\.norm": r"norm\1"}


@pytest.mark.parametrize("variant", [name for name, (family, _) in VARIANTS.items() if family != "deit"])
@pytest.mark.parametrize("new", [SQUARE, WIDE, (512, 128), (96, 160)])
def test_published_names_mean_square_maps(variant: str, new: tuple[int, int], tmp_path: Path) -> None:
    family, config = VARIANTS[variant]
    source, model = build(variant, SQUARE), build(variant, new)
    torch.save({"model": published(NAMES[family], config, source)}, tmp_path / "public.pth")
    flatten_ext.load_official(model, tmp_path / "public.pth")
    check_resampled(model, source)
    if new == SQUARE:
        check_equal(model, source)


@pytest.mark.parametrize("variant", ["pvt", "pvt_v2", "cswin", "swin"])
def test_published_names_on_no_square_map(variant: str, tmp_path: Path) -> None:
    """The public code trained at another size than its own configurations know."""
    family, config = VARIANTS[variant]
    source, model = build(variant, (64, 96)), build(variant, SQUARE)
    torch.save({"model": published(NAMES[family], config, source)}, tmp_path / "public.pth")
    with pytest.raises(ValueError, match="Pass grid="):
        flatten_ext.load_official(model, tmp_path / "public.pth")
    flatten_ext.load_official(model, tmp_path / "public.pth", grid=(16, 24))
    check_resampled(model, source)


OFFICIAL = {
    "flatten_pvt_tiny": "flatten_pvt_tiny",
    "flatten_pvt_v2_b0": "flatten_pvt_v2_b0",
    "flatten_swin_t": "flatten_swin_tiny",
    "flatten_cswin_t": "flatten_cswin_tiny",
}


@pytest.mark.parametrize("public", OFFICIAL)
def test_an_official_file_in_a_rectangle_of_as_many_tokens(public: str) -> None:
    """56 x 56 positions for a map of 28 x 112 are resampled, not taken as they are."""
    with torch.device("meta"):
        model = timm.create_model(OFFICIAL[public], img_size=(112, 448))
    state_dict = {key: torch.randn(shape) for key, shape in PUBLIC[public]["state_dict"].items()}
    loaded = checkpoint_filter(model)(state_dict, model)
    key = next(key for key in loaded if key.endswith("positional_encoding"))
    (old,) = (v for k, v in state_dict.items() if k == key or k.endswith(key.replace("stages.0.blocks", "1")))
    image = old.transpose(1, 2).unflatten(2, (56, 56))
    expected = F.interpolate(image, (28, 112), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(loaded[key], expected)


def test_tables_of_rectangular_windows(tmp_path: Path) -> None:
    """Swin's softmax windows: 8 x 10 has as many relative positions, 285, as 2 x 48."""
    source = small("swin")
    source.set_input_size((256, 320))
    assert source.layers[2].blocks[0].window_size == (8, 10)
    with torch.no_grad():
        for value in positions(source).values():
            value.normal_()
    torch.save(source.state_dict(), tmp_path / "own.pth")
    same = small("swin")
    same.set_input_size((256, 320))
    check_equal(flatten_ext.load_official(same, tmp_path / "own.pth"), source)

    save_file(source.state_dict(), tmp_path / "own.safetensors")
    other = small("swin")
    other.set_input_size((256, 320))
    check_equal(flatten_ext.load_official(other, tmp_path / "own.safetensors", grid=(64, 80)), source)

    back, resized = small("swin"), copy.deepcopy(source)
    flatten_ext.load_official(back, tmp_path / "own.pth")
    resized.set_input_size((224, 224))
    check_equal(back, resized)  # the table is resized as set_input_size resizes it
    table = "layers.2.blocks.0.attn.relative_position_bias_table"
    centre = source.state_dict()[table][285 // 2]
    torch.testing.assert_close(back.state_dict()[table][169 // 2], centre, rtol=0, atol=1e-4)

    tall = small("swin")
    tall.set_input_size((320, 256))
    with pytest.raises(RuntimeError, match=r"grid mismatch for .*relative_position_bias_table"):
        tall.load_state_dict(source.state_dict())


@pytest.mark.parametrize("family", SMALL)
def test_folders_of_timm(family: str, tmp_path: Path) -> None:
    """Weights as safetensors beside a configuration that says what image size they are for."""
    name, config = SMALL[family]
    source = timm.create_model(name, **config)
    save_for_hf(source, tmp_path, model_args=copy.deepcopy(config), safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    check_equal(loaded, source)
    larger = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(112, 448))
    check_resampled(larger, source)


@pytest.mark.parametrize("name", ["inline_pvt_tiny", "pola_pvt_tiny"])
def test_pvt_of_other_families_resamples_as_its_public_code(name: str) -> None:
    """Position embeddings bilinearly: at another input, another size, and from a checkpoint."""
    config = {"embed_dims": (16, 32, 40, 64), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 5, 8)}
    torch.manual_seed(0)
    source = timm.create_model(name, img_size=64, **config).eval()
    image = torch.rand(1, 3, 96, 160)

    def expected(stage: int) -> torch.Tensor:
        embedding = source.stages[stage].pos_embed.transpose(1, 2).unflatten(2, (16 >> stage,) * 2)
        size = (24 >> stage, 40 >> stage)
        return F.interpolate(embedding, size, mode="bilinear").flatten(2).transpose(1, 2)

    resized = copy.deepcopy(source)
    resized.set_input_size((96, 160))
    loaded = timm.create_model(name, img_size=(96, 160), **config).eval()
    loaded.load_state_dict(checkpoint_filter(loaded)(source.state_dict(), loaded))
    for model in (resized, loaded):
        for stage in range(4):
            torch.testing.assert_close(model.stages[stage].pos_embed, expected(stage))
    torch.testing.assert_close(resized(image), source(image))
