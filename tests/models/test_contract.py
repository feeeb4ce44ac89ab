"""timm's contract, in every family: classifier, features, intermediates, input sizes, checkpointing."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import timm.optim
import torch
from families import ALL, host, small

FAMILIES = list(ALL)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_registered() -> None:
    expected = {f"flatten_deit_{size}" for size in ("tiny", "small", "base")}
    expected |= {f"flatten_pvt_{size}" for size in ("tiny", "small", "medium", "large")}
    expected |= {f"flatten_pvt_v2_b{i}" for i in range(6)}
    expected |= {
        f"flatten_{f}_{size}" for f in ("swin", "cswin") for size in ("tiny", "small", "base", "base_384")
    }
    assert set(timm.list_models("flatten_*")) == expected
    for name in expected:
        cfg = timm.get_pretrained_cfg(name)
        side = 384 if name.endswith("384") else 224
        assert cfg.input_size == (3, side, side)
        assert (cfg.num_classes, cfg.crop_mode, cfg.crop_pct) == (1000, "squash", 0.875)


# Of the public READMEs, which have no other checkpoints; of the later families, one each.
OTHERS = ("mila_tiny", "ravlt_small", "mavit_large", "inline_pvt_tiny", "pola_swin_base")
PUBLISHED = {
    *OTHERS,
    *("flatten_pvt_tiny", "flatten_pvt_v2_b0", "flatten_cswin_tiny"),
    *(f"flatten_swin_{size}" for size in ("tiny", "small", "base", "base_384")),
}


@pytest.mark.parametrize("name", [*timm.list_models("flatten_*"), *OTHERS, "inline_swin_base_384"])
def test_pretrained_says_where_the_weights_are(name: str) -> None:
    with pytest.raises(RuntimeError, match="pretrained is True") as error:
        timm.create_model(name, pretrained=True)
    told = str(error.value)
    if name in PUBLISHED:
        page = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
        [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        link = row.partition("](")[2].partition(")")[0]
        assert f"nothing is downloaded: get the file linked for {name} in docs/models.md, {link}, and" in told
        assert "call flatten_ext.load_official(model, FILE)" in told
    else:
        assert f"weights of {name} are not published" in told


def test_pretrained_takes_a_file(tmp_path: Path) -> None:
    weights = small("deit").state_dict()
    torch.save(weights, tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth"), "num_classes": small("deit").num_classes}
    model = small("deit", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_default_cfg_names_modules(family: str) -> None:
    model = small(family, in_chans=1)
    cfg = model.pretrained_cfg
    assert model.get_submodule(cfg["first_conv"]).in_channels == 1
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()


@pytest.mark.parametrize("family", FAMILIES)
def test_classifier(family: str) -> None:
    model = small(family, drop_rate=0.1).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))
    assert small(family, num_classes=0).eval()(x).shape == (2, model.num_features)
    if host(family) != "deit":  # whose default is the class token
        assert small(family, num_classes=0, global_pool="").eval()(x).dim() == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_backward_and_drop_path(family: str) -> None:
    model = small(family, drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == 0.5
    model = small(family, drop_path_rate=0.0)
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    unused = (
        ["norm.weight", "norm.bias"] if family == "pola_pvt" else []
    )  # as in the public model, and frozen
    assert [n for n, p in model.named_parameters() if p.grad is None] == unused


@pytest.mark.parametrize("family", FAMILIES)
def test_features_only(family: str) -> None:
    name, config = ALL[family]
    indices = (0, 1) if host(family) == "deit" else (1, 3)
    model = timm.create_model(name, **config, features_only=True, out_indices=indices).eval()
    reductions = model.feature_info.reduction()
    assert reductions == ([16, 16] if host(family) == "deit" else [8, 32])
    outputs = model(torch.randn(1, 3, 64, 96))
    for output, channels, reduction in zip(outputs, model.feature_info.channels(), reductions, strict=True):
        assert output.shape == (1, channels, 64 // reduction, 96 // reduction)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_intermediates(family: str) -> None:
    model = small(family).eval()
    x = torch.randn(1, 3, 64, 96)
    features, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(features, model.forward_features(x))
    assert len(intermediates) == (2 if host(family) == "deit" else 4)
    last = model.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)[-1]
    final = features[:, 1:].transpose(1, 2).unflatten(2, (4, 6)) if host(family) == "deit" else features
    torch.testing.assert_close(last, final.movedim(-1, 1) if host(family) == "swin" else final)
    first = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert len(first) == 1
    torch.testing.assert_close(first[0], intermediates[0])


def test_deit_prefix_tokens() -> None:
    model = small("deit").eval()
    x = torch.randn(1, 3, 64, 96)
    patches, prefix = model.forward_intermediates(
        x, [1], return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )[0]
    torch.testing.assert_close(torch.cat((prefix, patches), 1), model.forward_features(x))
    with pytest.raises(ValueError, match="mask"):
        model.forward_features(x, attn_mask=torch.ones(1))
    with pytest.raises(ValueError, match="patch_drop_rate"):
        small("deit", patch_drop_rate=0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_prune_intermediate_layers(family: str) -> None:
    model = small(family).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)[0]
    assert model.prune_intermediate_layers([0], prune_head=True) == [0]
    torch.testing.assert_close(model.forward_intermediates(x, [0], intermediates_only=True)[0], expected)
    assert model(x).shape[0] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_set_input_size(family: str) -> None:
    """Afterwards the model gives at the new size what resampling on the fly gave."""
    model = small(family, img_size=96).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("positional_encoding", "pos_embed")):
            torch.nn.init.normal_(parameter)
    x = torch.randn(1, 3, 64, 128)
    expected = (
        None if host(family) == "swin" else model(x)
    )  # timm's softmax windows change with the input size
    model.set_input_size((64, 128))
    encodings = [p for n, p in model.named_parameters() if n.endswith("positional_encoding")]
    assert len(encodings) > 0 or family.startswith(("inline", "mila", "ravlt", "mavit"))
    assert all(encoding.shape[1] == (33 if host(family) == "deit" else 16 * 32) for encoding in encodings[:1])
    if expected is not None and host(family) != "deit":  # timm antialiases the embedding that it resamples
        torch.testing.assert_close(model(x), expected)
    assert model(x).isfinite().all()
    model.set_input_size((64, 128))
    assert model(x).shape == (1, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_grad_checkpointing(family: str) -> None:
    """Same gradients with two maps of different aspect between forward and backward."""
    model = small(family, drop_path_rate=0.0)
    images = [torch.randn(1, 3, 64, 128), torch.randn(1, 3, 128, 64)]
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        sum(model(x).square().sum() for x in images).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_decay(family: str) -> None:
    model = small(family)
    names = {
        n for n, _ in model.named_parameters() if n.endswith((".scale", ".positional_encoding", ".power"))
    }
    assert names or family.startswith(("inline", "mila", "ravlt", "mavit"))
    assert names <= set(model.no_weight_decay())
    groups = timm.optim.param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
    undecayed = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(p) for n, p in model.named_parameters() if n in names} <= undecayed
    assert set(timm.optim.param_groups_layer_decay(model, 0.1)[0])  # group_matcher covers every parameter


@pytest.mark.parametrize("family", FAMILIES)
def test_any_size(family: str) -> None:
    """Rectangles, from 64 to 1024 pixels, sides that no stage divides evenly; batches agree with images."""
    model = small(family).eval()
    for size in ((64, 64), (72, 200), (224, 224), (1024, 64), (100, 76)):
        x = torch.randn(2, 3, *size)
        with torch.inference_mode():
            out = model(x)
            assert out.isfinite().all()
            torch.testing.assert_close(model(x[1:]), out[1:], rtol=1e-4, atol=1e-5)


def test_swin_windows_and_shift() -> None:
    """Stages of type L may have windows too; they are padded, shifted, and follow set_input_size."""
    model = small("swin", img_size=64, window_size=(8, 4, 2, 2), depths=(2, 2, 2, 1)).eval()
    first, second = model.layers[0].blocks
    assert (first.window, first.shift) == ((8, 8), None)
    assert (second.window, second.shift) == ((8, 8), (4, 4))
    assert model(torch.randn(1, 3, 76, 52)).shape == (1, 10)
    model.set_input_size((128, 128))
    assert first.window == (16, 16)
    assert first.attn.positional_encoding.shape[1] == 256


def test_cswin_stripes() -> None:
    """Stripes in stages of type L: two branches on half the channels each, padded where needed."""
    model = small("cswin", img_size=64, la_split_sizes=(4, 2, None, None)).eval()
    block = model.stages[0].blocks[0]
    assert [a.positional_encoding.shape for a in block.attns] == [(1, 64, 8), (1, 64, 8)]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)
    assert model(torch.randn(1, 3, 72, 100)).shape == (1, 10)


@pytest.mark.parametrize("family", ["pvt", "pvt_v2"])
def test_reduced_keys(family: str) -> None:
    model = small(family, la_sr_ratios=(8, 4, 2, 1), attn_type="LLSS", img_size=64).eval()
    assert model.stages[0].blocks[0].attn.positional_encoding.shape[1] == 4
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 10)


@pytest.mark.parametrize("family", ["swin", "pvt", "pvt_v2", "cswin"])
def test_attention_types_are_checked(family: str) -> None:
    with pytest.raises(ValueError, match="attn_type"):
        small(family, attn_type="LLX")
