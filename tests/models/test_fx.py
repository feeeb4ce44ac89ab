"""torch.fx traces every family, and what it traces gives the same at every size."""

from __future__ import annotations

import pytest
import timm
import torch
from families import ALL, small
from torchvision.models.feature_extraction import create_feature_extractor

from flatten_ext import FocusedLinearAttention, convert

SIZES = [(64, 64), (96, 64)]


@pytest.mark.parametrize("family", ALL)
def test_torchvisions_feature_extractor(family: str) -> None:
    model = small(family, img_size=64).eval()
    classifier = model.pretrained_cfg["classifier"]
    extractor = create_feature_extractor(model, [classifier])
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(extractor(x)[classifier], model(x), rtol=0, atol=0)
    model.zero_grad()
    model(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    extractor(x)[classifier].square().sum().backward()  # whose parameters are the model's
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.get(name), rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("family", ALL)
def test_timms_feature_graph(family: str) -> None:
    """timm.create_model(..., features_only=True, feature_cls="fx"), against its getter."""
    arguments = {"img_size": 64, "features_only": True, "out_indices": (0, 1)}
    torch.manual_seed(1)
    graph = small(family, **arguments, feature_cls="fx").eval()
    torch.manual_seed(1)
    model = small(family, img_size=64).eval()
    model.load_state_dict(graph.graph_module.state_dict(), strict=False)
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        nodes = [info["module"] for info in graph.feature_info.info[:2]]
        seen: list[torch.Tensor] = []
        handles = [
            model.get_submodule(node).register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            for node in nodes
        ]
        model(x)
        for handle in handles:
            handle.remove()
        found = graph(x)
        assert len(found) == len(seen) == 2
        for ours, expected in zip(found, seen, strict=True):
            torch.testing.assert_close(ours.flatten().sort()[0], expected.flatten().sort()[0])


@pytest.mark.parametrize(
    ("name", "token"),
    [("deit_tiny_distilled_patch16_224", "dist_token"), ("vit_medium_patch16_reg4_gap_256", "reg_token")],
)
def test_leading_tokens_of_timms_transformers(name: str, token: str) -> None:
    """Their positions are resampled whole, with the tokens before the map."""
    arguments = {"img_size": 64, "dynamic_img_size": True, "embed_dim": 24, "num_heads": 3, "depth": 1}
    model = convert(timm.create_model(name, **arguments), "L", img_size=64).eval()
    extractor = create_feature_extractor(model, ["norm"])
    for size in SIZES:
        x = torch.randn(2, 3, *size)
        torch.testing.assert_close(extractor(x)["norm"], model.forward_features(x), rtol=0, atol=0)
    extractor(x)["norm"].square().sum().backward()
    assert model.get_parameter(token).grad.abs().max() > 0


def test_stripes_are_padded_for_every_map() -> None:
    model = small("cswin", img_size=64, la_split_sizes=(None, 3, None, None), split_sizes=(1, 3, 3, 7)).eval()
    extractor = create_feature_extractor(model, ["head"])
    for size in SIZES:
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(extractor(x)["head"], model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("window", [None, (2, 3)])
def test_the_module_alone(called: bool, window: tuple[int, int] | None) -> None:
    """A plain depthwise layer is read while tracing, one with hooks is called."""
    module = FocusedLinearAttention(12, 3, window=window, positional_encoding=window or (4, 4)).eval()
    if called:
        module.dwc.register_forward_hook(lambda _, given, out: 2 * out)
    graph = torch.fx.symbolic_trace(module)
    x = torch.randn(2, 24, 12)
    torch.testing.assert_close(graph(x, (4, 6)), module(x, (4, 6)))
    assert ("dwc" in [node.target for node in graph.graph.nodes if node.op == "call_module"]) == called
    with pytest.raises(ValueError, match="no square map"):
        graph(x, None)


def test_a_mask_is_refused() -> None:
    model = small("deit", img_size=64).eval()
    with pytest.raises(ValueError, match="takes no mask"):
        model.forward_features(torch.randn(1, 3, 64, 64), attn_mask=torch.ones(1))
