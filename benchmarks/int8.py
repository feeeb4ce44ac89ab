"""Top-1 of models on the demo's images with their linear layers in 8 bits, eager and compiled.

    pip install torchao && python benchmarks/int8.py

Small models are trained for a few epochs on the demo's 4,000 images and tested on its other 1,000; torchao
and PT2E quantise the linear layers. Prints the table that docs/deploy.md has.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flatten_ext.tools.train import TrainConfig, Trainer

MODELS = {
    "flatten_deit_tiny": {"embed_dim": 96, "depth": 3, "num_heads": 3, "patch_size": 4},
    "flatten_pvt_v2_b0": {"embed_dims": (32, 64, 80, 128), "depths": (1, 1, 1, 1)},
    "flatten_swin_tiny": {
        "embed_dim": 32,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 8),
        "patch_size": 2,
    },
}
BATCH = 100


def trained(name: str, folder: Path) -> tuple[nn.Module, Tensor, list[tuple[Tensor, Tensor]]]:
    """The model, a batch of training images, and the held-out ones in batches."""
    config = TrainConfig(
        model=name, data="mnist", output=str(folder / name), model_args={"img_size": 32, **MODELS[name]},
        img_size=32, epochs=5, batch_size=64, warmup_epochs=1, lr=2e-3, mixup=0.0, cutmix=0.0,
        auto_augment=None, reprob=0.0, hflip=0.0, crop_scale=0.7, ema_decay=None, workers=0,
    )  # fmt: skip
    trainer = Trainer(config)
    trainer.fit()
    calibration = next(iter(DataLoader(trainer.train_set, BATCH)))[0]
    return trainer.model.eval(), calibration, list(DataLoader(trainer.val_set, BATCH))


def by_torchao(kind: str) -> Callable[[nn.Module, Tensor], nn.Module]:
    from torchao import quantization

    def quantized(model: nn.Module, images: Tensor) -> nn.Module:
        model = copy.deepcopy(model)
        quantization.quantize_(model, getattr(quantization, kind)())
        return model

    return quantized


def by_pt2e(model: nn.Module, images: Tensor) -> nn.Module:
    """Weights and activations, whose ranges are those of `images`."""
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_module_type_qconfig(nn.Linear, x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (images,)).module(), quantizer)
    prepared(images)
    return move_exported_model_to_eval(convert_pt2e(prepared))


WAYS: dict[str, Callable[[nn.Module, Tensor], nn.Module]] = {
    "float32": lambda model, images: model,
    "torchao, weights": by_torchao("Int8WeightOnlyConfig"),
    "torchao, weights and activations": by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "PT2E, weights and activations": by_pt2e,
}


@torch.no_grad()
def logits(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.cat([model(images) for images, _ in batches])


def rows(folder: Path) -> Iterator[str]:
    for name in MODELS:
        model, calibration, batches = trained(name, folder)
        labels = torch.cat([labels for _, labels in batches])
        expected = logits(model, batches)
        for way, quantize in WAYS.items():
            small = quantize(model, calibration)
            found = {"eager": small, "compiled": torch.compile(small)}
            results = {how: logits(one, batches) for how, one in found.items()}
            top1 = [100 * (x.argmax(1) == labels).double().mean().item() for x in results.values()]
            error = ((results["eager"] - expected).norm() / expected.norm()).item()
            yield f"| `{name}` | {way} | {top1[0]:.1f} | {top1[1]:.1f} | {error:.3f} |"
            torch._dynamo.reset()


if __name__ == "__main__":
    print("| model | linear layers | top-1, eager | top-1, compiled | error of logits |")
    print("|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder)):
            print(row, flush=True)
