"""Weight for weight the published models: parameters, FLOPs, state_dicts, logits, features, gradients."""

from __future__ import annotations

import json
import math
import re

import golden_data
import pytest
import timm
import torch
from golden_data import Golden
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flatten_ext.models import checkpoint_filter

PUBLIC = json.loads((golden_data.FOLDER / "models.json").read_text())
SIZES = {"t": "tiny", "s": "small", "b": "base"}


def our_name(public: str) -> str:
    """flatten_swin_t -> flatten_swin_tiny; PVT's names are the same."""
    return "_".join(SIZES.get(part, part) for part in public.split("_"))


def folded_lepe(config: dict) -> int:
    """FLOPs that the public CSWin spends on LePE in stages of type L, and ours not: the kernels are added."""
    if config["family"] != "cswin":
        return 0
    side, total = config["img_size"] // 4, 0
    for stage, (kind, depth) in enumerate(zip(config["attn_type"], config["depths"], strict=True)):
        if kind == "L":
            total += depth * 2 * 9 * (side >> stage) ** 2 * (config["embed_dim"] << stage)
    return total


def unused(public: str) -> list[str]:
    """Public parameters that the public forward never reads: PVT's last norm."""
    return ["norm.weight", "norm.bias"] if public.startswith("flatten_pvt") and "v2" not in public else []


@pytest.mark.parametrize("public", PUBLIC)
def test_configuration(public: str) -> None:
    expected = PUBLIC[public]
    with torch.device("meta"):
        model = timm.create_model(our_name(public)).eval()
        image = torch.empty(1, 3, expected["config"]["img_size"], expected["config"]["img_size"])
        state_dict = {key: torch.empty(shape) for key, shape in expected["state_dict"].items()}
        state_dict |= {key: torch.empty(1) for key in expected["buffers"]}
    left_out = sum(math.prod(expected["state_dict"][key]) for key in unused(public))
    assert sum(p.numel() for p in model.parameters()) == expected["params"] - left_out
    assert left_out == (1024 if unused(public) else 0)

    loaded = {key: value.shape for key, value in checkpoint_filter(model)(state_dict, model).items()}
    assert loaded == {key: value.shape for key, value in model.state_dict().items()}

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert counter.get_total_flops() + folded_lepe(expected["config"]) == expected["flops"]

    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates[::2] == rates[1::2] == pytest.approx(expected["drop_path"])


def load_by_recipe(public: str) -> tuple[nn.Module, dict[str, str]]:
    """Our model with the recorded parameters, and our name of each public parameter."""
    shapes = PUBLIC[public]["state_dict"]
    model = timm.create_model(our_name(public)).eval()
    filter_fn = checkpoint_filter(model)
    parameters = {key: golden_data.model_parameter(key, tuple(shape)) for key, shape in shapes.items()}
    model.double().load_state_dict(filter_fn(parameters, model))
    tags = {key: torch.full(tuple(shape), i) for i, (key, shape) in enumerate(shapes.items())}
    keys = list(shapes)
    names = {keys[int(tag.flatten()[0])]: name for name, tag in filter_fn(tags, model).items()}
    return model, names


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).abs().max() / expected.abs().max())


MODELS = [name.removeprefix("model_") for name in golden_data.names("model_")]


def our_module(model: nn.Module, stage: str) -> nn.Module:
    """The module whose output is recorded as `stage`: tokens, or a map with its channels last."""
    if stage in ("embed", "patch_embed1", "stage1_conv_embed"):
        return model.patch_embed
    if match := re.fullmatch(r"layers\.([012])", stage):  # timm downsamples at the start of the next stage
        return model.layers[int(match[1]) + 1].downsample
    if match := re.fullmatch(r"(?:block|stage)(\d)\.(\w+)", stage):
        return model.stages[int(match[1]) - 1].blocks[-1 if match[2] == "last" else int(match[2])]
    return model.get_submodule(stage)


@pytest.mark.parametrize("public", MODELS)
def test_logits_and_features(public: str) -> None:
    golden = Golden(f"model_{public}")
    model, _ = load_by_recipe(public)
    stages = [key.removesuffix(".sample") for key in golden.under("stage.") if key.endswith(".sample")]
    outputs: dict[str, Tensor] = {}
    hooks = [
        our_module(model, stage).register_forward_hook(
            lambda _module, _inputs, output, stage=stage: outputs.__setitem__(stage, output.flatten())
        )
        for stage in stages
    ]
    image = golden_data.unit("input", (2, 3, 224, 224))
    with torch.inference_mode():
        assert relative(model(image), golden["logits64"]) < 1e-10
    for hook in hooks:
        hook.remove()
    for stage in stages:
        index = torch.arange(256) * 2654435761 % outputs[stage].numel()
        assert relative(outputs[stage][index], golden[f"stage.{stage}.sample"]) < 1e-10, stage
    with torch.inference_mode():
        assert relative(model.float()(image.float()), golden["logits64"]) < 1e-5


@pytest.mark.parametrize("public", MODELS)
def test_gradients(public: str) -> None:
    """Of every parameter: norm, sum and projection. In float64 where no large convolution makes it slow."""
    golden = Golden(f"model_{public}")
    model, names = load_by_recipe(public)
    dtype, tolerance = (torch.float64, 1e-10) if public == "flatten_pvt_tiny" else (torch.float32, 2e-4)
    model = model.to(dtype)
    logits = model(golden_data.unit("input", (2, 3, 224, 224)).to(dtype))
    (logits * golden_data.unit("loss", (2, 1000))).sum().backward()
    parameters = dict(model.named_parameters())
    keys = golden.text("grad.keys")
    assert golden.meta["unused_params"] == unused(public)
    assert set(keys) == set(names)
    for i, key in enumerate(keys):
        grad, norm = parameters[names[key]].grad.double(), golden["grad.l2"][i]
        probe = (grad * golden_data.unit(f"probe/{key}", tuple(grad.shape))).sum()
        # A random projection of an error of norm e is about e; the sum of n entries up to sqrt(n) times it.
        assert abs(grad.norm() - norm) < tolerance * norm, key
        assert abs(probe - golden["grad.dot"][i]) < 3 * tolerance * norm, key
        assert abs(grad.sum() - golden["grad.sum"][i]) < tolerance * norm * grad.numel() ** 0.5, key
