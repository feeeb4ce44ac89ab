"""The options of a training run: one list for the program, the command line and the checkpoint."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from flatten_ext.errors import InputError

__all__ = ["Amp", "TrainConfig"]


class Amp(str, enum.Enum):
    """Precision of autocast; "none" computes in the parameters' own."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    none = "none"

    @classmethod
    def of(cls, name: str | None) -> Amp:
        """The precision of a name; None is "none".

        Raises:
            InputError: no such precision.
        """
        try:
            return cls(name or "none")
        except ValueError:
            known = ", ".join(one.value for one in cls)
            raise InputError(f"amp is {name!r}, expected one of {known}") from None

    @property
    def dtype(self) -> torch.dtype | None:
        return None if self is Amp.none else getattr(torch, self.value)


def _option(
    default: Any, help: str, *, least: float | None = None, most: float | None = None, cli: bool = True
) -> Any:
    """A field of TrainConfig: its default, what it is, its bounds, and whether the command line has it."""
    return field(default=default, metadata={"help": help, "min": least, "max": most, "cli": cli})


@dataclass
class TrainConfig:
    """One run. Every field is a setting of timm's recipes or says what it is.

    Raises:
        InputError: a number is out of its range; naming it.
    """

    model: str = field(metadata={"help": "A timm model name, ours or timm's."})
    data: str = field(metadata={"help": 'A folder with train/ and val/, or "digits" or "mnist".'})
    output: str = field(metadata={"help": "Folder of the run; resumed if begun."})
    model_args: dict[str, Any] = field(default_factory=dict, metadata={"cli": False})
    checkpoint: str | None = _option(
        None, "Weights to start from; a classifier of other classes is not loaded."
    )
    grid: str | None = _option(
        None, "Map that --checkpoint's positions were learned on, ROWS,COLUMNS, where it does not say it."
    )
    convert: str | None = _option(None, "Stages to make focused-linear after loading, such as LLSS.")
    teacher: str | None = _option(None, 'Model to distil from; "self" is the softmax model before --convert.')
    teacher_checkpoint: str | None = _option(None, "The teacher's weights.")
    distillation: float = _option(0.5, "Weight of the teacher's loss.", least=0, most=1)
    temperature: float = _option(2.0, "Temperature of distillation.", least=1e-3, cli=False)
    img_size: int = _option(224, "Pixels a side.", least=1)
    epochs: int = _option(300, "Passes over the training images.", least=1)
    batch_size: int = _option(128, "Images a step, of all processes.", least=1)
    accumulate: int = _option(1, "Parts of a step that a process takes one after the other.", least=1)
    opt: str = _option("adamw", "timm's optimizer.")
    lr: float = _option(5e-4, "Peak learning rate.", least=0)
    weight_decay: float = _option(0.05, "Of matrices and kernels.", least=0)
    clip_grad: float | None = _option(5.0, "Largest norm of the gradient.", least=0, cli=False)
    sched: str = _option("cosine", "timm's scheduler.", cli=False)
    warmup_epochs: int = _option(5, "Epochs of rising learning rate.", least=0)
    min_lr: float = _option(1e-5, "Last learning rate.", least=0, cli=False)
    smoothing: float = _option(0.1, "Label smoothing.", least=0, most=1)
    mixup: float = _option(0.8, "mixup's alpha; 0 for none.", least=0)
    cutmix: float = _option(1.0, "CutMix's alpha; 0 for none.", least=0)
    # mmax9: at magnitude 10 timm posterises to 0 bits, which Pillow refuses.
    auto_augment: str | None = _option("rand-m9-mstd0.5-mmax9-inc1", 'timm\'s policy; "none" for none.')
    reprob: float = _option(0.25, "Probability of random erasing.", least=0, most=1)
    hflip: float = _option(0.5, "Probability of a horizontal flip.", least=0, most=1)
    crop_scale: float = _option(
        0.08, "Smallest share of the picture that a random crop shows.", least=1e-6, most=1
    )
    ema_decay: float | None = _option(0.9999, "Decay of the averaged weights; 0 for none.", least=0, most=1)
    amp: str | None = _option(None, "bfloat16, float16 or none.")
    workers: int = _option(4, "Processes that load images.", least=0)
    device: str = _option("cpu", "cpu, cuda or another of torch's.")
    seed: int = _option(0, "Of weights, order, augmentation and dropout.", least=0, most=2**40)
    save_every: int = _option(100, "Steps between checkpoints; one more ends every epoch.", least=1)

    def __post_init__(self) -> None:
        # The command line's words for None.
        self.auto_augment = None if self.auto_augment == "none" else self.auto_augment
        self.amp = None if Amp.of(self.amp) is Amp.none else self.amp
        self.ema_decay = self.ema_decay or None
        for option in fields(self):
            least, most = (option.metadata.get(key) for key in ("min", "max"))
            value = getattr(self, option.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{option.name} is {value}, expected a finite number")
            if value is None or least is None:
                continue
            if value < least or (most is not None and value > most):
                expected = f"at least {least}" if most is None else f"{least} to {most}"
                raise InputError(f"{option.name} is {value}, expected {expected}")
