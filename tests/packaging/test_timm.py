"""timm's own tests of its models, taken from its source distribution, on ours.

Their functions are called with our names: the smallest model of each family, and all of them for what is done
on the meta device. Most are slow tests, for before a release, of the families other than FLatten's. Left out
are

- TorchScript (`*_torchscript`, `*_script_*`): torch has deprecated it, and our modules are not written in its
  subset of Python;
- `test_swin_family_dynamic_mask_trace`: a traced graph of ours runs at its own size, and raises at another;
- `test_swin_family_compile_resize_guards`: it compiles for a size that varies, for which the masks of softmax
  windows take too long; FLatten-Swin is compiled for one size at a time (tests/models/test_export.py);
- `test_swin_family_window_padding`, and the default windows of `..._stage_windows`: they look for what timm's
  Swin has by default, static masks and windows of 7 in every stage;
- `test_model_*_pretrained`: there are no weights to download.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tarfile
from types import ModuleType
from typing import Any

import pytest
import timm
from building import run

import flatten_ext.models  # noqa: F401  registers them

DEIT, SWIN, PVT, PVT2, CSWIN = SMALLEST = (
    "flatten_deit_tiny",
    "flatten_swin_tiny",
    "flatten_pvt_tiny",
    "flatten_pvt_v2_b0",
    "flatten_cswin_tiny",
)
PYRAMIDS = SMALLEST[1:]
FAMILIES = ("flatten", "mila", "ravlt", "mavit", "inline", "pola")
# The other families on FLatten's hosts and on their own.
OTHERS = (
    *("mila_tiny", "ravlt_tiny", "mavit_tiny"),
    *("inline_swin_tiny", "inline_pvt_tiny", "inline_deit_tiny", "inline_cswin_tiny"),
    *("pola_swin_tiny", "pola_pvt_tiny"),
)


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> ModuleType:
    """test_models.py of the release that is installed."""
    folder = tmp_path_factory.mktemp("timm")
    run(
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "timm"),
        f"timm=={timm.__version__}",
        cwd=folder,
    )
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    file = next(folder.glob("timm-*/tests/test_models.py"))
    for mark in set(re.findall(r"pytest\.mark\.(\w+)", file.read_text())):
        pytestconfig.addinivalue_line("markers", f"{mark}: of timm")
    spec = importlib.util.spec_from_file_location("timm_test_models", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nothing_of_theirs_is_left_out_unseen(theirs: ModuleType) -> None:
    """Every test that timm runs on all of its models, or on its Swin, is run here or named above."""
    for_all = {
        name
        for name, test in vars(theirs).items()
        if name.startswith("test_")
        and any(mark.name == "parametrize" and len(mark.args[1]) > 500 for mark in test.pytestmark)
    }
    of_swin = {name for name in vars(theirs) if name.startswith("test_swin_family")}
    assert for_all | of_swin <= {*ON_SMALLEST, *ON_PYRAMIDS, *ON_ALL, *OF_SWIN, *LEFT_OUT}


LEFT_OUT = (
    "test_swin_family_compile_resize_guards",
    "test_model_forward_torchscript",
    "test_model_forward_fx_torchscript",
    "test_swin_family_script_after_resize",
    "test_swin_family_dynamic_mask_trace",
    "test_swin_family_window_padding",
    "test_model_load_pretrained",
    "test_model_features_pretrained",
)
# Their arguments behind the name.
ON_SMALLEST: dict[str, tuple[Any, ...]] = {
    "test_model_forward": (1,),
    "test_model_backward": (2,),
    "test_model_forward_fx": (1,),
    "test_model_backward_fx": (1,),
    "test_model_forward_intermediates_features": (1,),
    "test_model_forward_intermediates": (1,),
    "test_prune_intermediate_layers_params_used": (),
    "test_prune_intermediate_layers_contract": (),
    "test_headless_checkpoint_reload": ({},),
    "test_model_init_weights_after_to_empty": ({},),
}
# Of the other families too, at every run.
BRISK = (
    "test_model_backward",
    "test_model_forward_intermediates",
    "test_headless_checkpoint_reload",
    "test_model_init_weights_after_to_empty",
)
ON_PYRAMIDS: dict[str, tuple[Any, ...]] = {"test_model_forward_features": (1,)}
ON_ALL = ("test_model_default_cfgs", "test_model_default_cfgs_non_std")
OF_SWIN: dict[str, list[tuple[Any, ...]]] = {
    "test_swin_family_reinit_after_to_empty": [(224,)],
    "test_swin_family_set_input_size": [(224,)],
    "test_swin_family_set_input_size_stage_windows": [
        (224, spec) for spec in ("uniform", "per_stage", "non_square")
    ],
    "test_swin_family_set_input_size_window_ratios": [()],
    "test_swin_family_set_input_size_invalid_and_min_windows": [(224,)],
    "test_swin_family_resize_metadata": [()],
    "test_swin_family_resize_odd_stage_sizes": [()],
    "test_swin_family_set_input_size_after_pruning": [()],
}


def brisk(name: str, function: str = "") -> Any:
    """A name; what takes longer of the other families is for before a release."""
    slow = not name.startswith("flatten") and function not in BRISK
    return pytest.param(function, name, marks=pytest.mark.slow if slow else ())


# PolaFormer-PVT keeps the norm of its public models that no forward applies, so that every entry of their
# checkpoints has its place; these ask every parameter for a gradient. tests/models/test_contract.py asks all
# but that norm.
WANT_ALL_GRADIENTS = (
    "test_model_backward",
    "test_model_backward_fx",
    "test_prune_intermediate_layers_params_used",
)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        brisk(name, function)
        for name in SMALLEST + OTHERS
        for function in ON_SMALLEST
        if not (name == "pola_pvt_tiny" and function in WANT_ALL_GRADIENTS)
    ],
)
def test_on_the_smallest(theirs: ModuleType, function: str, name: str) -> None:
    getattr(theirs, function)(name, *ON_SMALLEST[function])


@pytest.mark.parametrize(
    ("function", "name"),
    [brisk(name, function) for name in PYRAMIDS + OTHERS if "deit" not in name for function in ON_PYRAMIDS],
)
def test_on_pyramids(theirs: ModuleType, function: str, name: str) -> None:
    getattr(theirs, function)(name, *ON_PYRAMIDS[function])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.startswith("flatten") or "tiny" in name else pytest.mark.slow)
        for name in timm.list_models([f"{family}_*" for family in FAMILIES], include_tags=True)
    ],
)
def test_on_all(theirs: ModuleType, name: str) -> None:
    """On the meta device; vision transformers, whose features are tokens, are not standard to timm."""
    getattr(theirs, ON_ALL["_deit_" in name])(name, 1, "meta")


@pytest.mark.parametrize(
    "name", [SWIN, *(pytest.param(f"{family}_swin_tiny", marks=pytest.mark.slow) for family in FAMILIES[-2:])]
)
@pytest.mark.parametrize(
    ("function", "arguments"),
    [(function, arguments) for function, several in OF_SWIN.items() for arguments in several],
)
def test_of_swin(theirs: ModuleType, function: str, arguments: tuple[Any, ...], name: str) -> None:
    getattr(theirs, function)(name, *arguments)
