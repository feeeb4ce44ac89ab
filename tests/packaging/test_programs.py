"""Programs that take a model as they find it: profilers and drawers of graphs, which trace it, and adapters,
which wrap its layers. Their newest releases are installed in a folder behind this environment's packages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from building import run
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import flatten_ext
import flatten_ext.models

pytestmark = pytest.mark.filterwarnings("ignore")

# With what they import and the package's extras do not bring. Of their dependencies torch is ours.
PROGRAMS = (
    *("fvcore", "iopath", "yacs", "portalocker", "tabulate", "termcolor", "tqdm", "pyyaml"),
    *(
        "tensorboard",
        "tensorboard-data-server",
        "absl-py",
        "grpcio",
        "werkzeug",
        "markupsafe",
        "protobuf",
        "markdown",
    ),
    *("peft", "accelerate", "transformers", "tokenizers", "regex", "psutil"),
)
FAMILIES = {
    "flatten_deit_tiny": 12,
    "flatten_pvt_tiny": 8,
    "flatten_pvt_v2_b0": 8,
    "flatten_swin_tiny": 4,
    "flatten_cswin_tiny": 6,
}  # with the number of their linear attentions


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("programs")
    run(
        *(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *PROGRAMS),
        cwd=folder,
    )
    sys.path.append(str(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_timms_profile(name: str) -> None:
    """timm's benchmark.py --bench profile asks fvcore for these, of a model as it is created."""
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis, flop_count_str

    model, image = timm.create_model(name).eval(), torch.ones(1, 3, 224, 224)
    analysis = FlopCountAnalysis(model, image)
    described = flop_count_str(analysis)
    assert "attn" in described
    assert ActivationCountAnalysis(model, image).total() > 10**6
    assert analysis.unsupported_ops()["flatten::attention_traced"] == FAMILIES[name]


def multiply_adds(inputs, outputs):
    """As docs/operator.md has it."""
    (batch, n, channels), (_, m, _) = (inputs[i].type().sizes() for i in (2, 3))
    attended = (n + m) * channels * (channels // inputs[5].toIValue()) + n * channels
    taps = inputs[8].type()
    convolved = m * channels * taps.sizes()[2] * taps.sizes()[3] if taps.kind() == "TensorType" else 0
    return batch * (attended + convolved)


def counted(model: nn.Module, *inputs: Tensor) -> tuple[int, int]:
    """FLOPs of attention and of convolutions, by fvcore with the handle and by torch."""
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(model, inputs).set_op_handle("flatten::attention_traced", multiply_adds)
    found = analysis.by_operator()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    flops = counter.get_flop_counts()["Global"]
    convolutions = flops.get(torch.ops.aten.convolution, 0)
    return 2 * (found["attention_traced"] + found["conv"]), flops[torch.ops.flatten.attention] + convolutions


@pytest.mark.parametrize("name", [name for name in FAMILIES if "cswin" not in name])
def test_fvcore_counts_with_a_handle(name: str) -> None:
    """fvcore wraps every layer's forward, so the models call the depthwise layers, which it counts as
    convolutions. (CSWin's two are one kernel otherwise.)"""
    found, expected = counted(timm.create_model(name).eval(), torch.ones(2, 3, 224, 224))
    assert found == expected


def test_fvcore_counts_the_taps_of_a_call() -> None:
    class Call(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return flatten_ext.attention(x, x, x, 2, dwc_weight=weight, size=(4, 6))

    found, expected = counted(Call(), torch.ones(2, 24, 16), torch.ones(8, 1, 3, 5))
    assert found == expected


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_tensorboard_draws_the_graph(name: str, training: bool, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = timm.create_model(name).train(training)
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(model, torch.ones(2, 3, 224, 224))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    operators = [node.op for node in events.Graph().node]
    assert operators.count("flatten::attention_traced") == FAMILIES[name]


@pytest.mark.parametrize("window", [None, (4, 4)])
def test_lora_of_the_depthwise_layer_is_added(window: tuple[int, int] | None) -> None:
    """PEFT wraps `dwc`: what the adapter makes of each head's map of v is in the result, and only that."""
    from peft import LoraConfig, get_peft_model

    block = flatten_ext.FocusedLinearAttention(64, 2, kernel_size=3, window=window).double()
    x = torch.randn(2, 8 * 12, 64, dtype=torch.float64)
    plain = block(x, size=(8, 12))
    v = block.qkv(x).unflatten(-1, (3, 64)).select(-2, 2)
    adapted = get_peft_model(block, LoraConfig(target_modules=["dwc"], r=32, lora_alpha=16))
    torch.testing.assert_close(adapted(x, size=(8, 12)), plain)  # LoRA begins with zero
    layer = block.dwc
    torch.nn.init.normal_(layer.lora_B["default"].weight)

    def adapter(maps: Tensor) -> Tensor:
        return layer.lora_B["default"](layer.lora_A["default"](maps)) / 2

    rows, columns = window or (8, 12)
    grid = (2, 8 // rows, rows, 12 // columns, columns, 2, 32)
    maps = v.reshape(grid).permute(0, 1, 3, 5, 6, 2, 4)
    added = adapter(maps.reshape(-1, 32, rows, columns)).reshape(maps.shape)
    added = added.permute(0, 1, 5, 2, 6, 3, 4).reshape(x.shape)
    expected = plain + added @ block.proj.weight.T
    torch.testing.assert_close(adapted(x, size=(8, 12)), expected)


# The rank has to be a multiple of the groups of every convolution.
@pytest.mark.parametrize(
    ("name", "targets", "rank"),
    [(name, ["dwc"], 192 if "deit" in name else 64) for name in FAMILIES]
    + [("flatten_cswin_tiny", ["dwc", "get_v", "qkv"], 512)],
)
def test_lora_in_the_models(name: str, targets: list[str], rank: int) -> None:
    from peft import LoraConfig, get_peft_model

    model, image = timm.create_model(name, num_classes=10).eval(), torch.randn(1, 3, 224, 224)
    plain = model(image)
    adapted = get_peft_model(model, LoraConfig(target_modules=targets, r=rank, lora_alpha=rank)).eval()
    torch.testing.assert_close(adapted(image), plain, atol=1e-5, rtol=0)
    learned: dict[str, nn.Parameter] = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    for parameter in learned.values():
        nn.init.normal_(parameter, std=0.05)
    out = adapted(image)
    assert (out - plain).abs().max() > 1e-3
    out.sum().backward()
    # DeiT reads the class token alone, which no convolution of the last block reaches.
    unused = "blocks.11.attn.dwc" if "deit" in name else "none"
    assert all(p.grad is not None and p.grad.any() for n, p in learned.items() if unused not in n)
