"""Bringing a checkpoint's learned positions to a model's size; from what map is read or asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from torch import Tensor, nn

from .._focused import resize_positional_encoding
from ._timm import stem_grid
from ._windows import stage_maps

__all__ = ["Grid", "Positions", "metadata_of", "module_positions", "resample_positions", "resize_table"]

Grid = tuple[int, int]
# No published model has a stem whose map is larger than this many times its number of positions.
_STRIDE = 8


@dataclass(frozen=True)
class Positions:
    """Learned positions of a model.

    Args:
        key: the parameter's name.
        owner: the module that owns it; `positions_grid` says what map it tiles.
        grids: the map of the stem's patches -> the maps that the positions may tile in this configuration.
    """

    key: str
    owner: Any
    grids: Callable[[Grid], list[Grid]]

    @property
    def is_table(self) -> bool:
        """Whether it is Swin's table of relative positions, (2h - 1)(2w - 1) for windows of (h, w)."""
        return self.key.endswith("relative_position_bias_table")

    def count(self, grid: Grid) -> int:
        """How many rows or tokens there are for a map."""
        if self.is_table:
            return (2 * grid[0] - 1) * (2 * grid[1] - 1)
        return self._prefix + grid[0] * grid[1]

    def length(self, value: Tensor) -> int:
        return value.shape[0] if self.is_table else value.shape[1]

    def resample(self, value: Tensor, grid: Grid) -> Tensor:
        """Positions learned on `grid` -> on the model's map."""
        new = tuple(self.owner.positions_grid())
        if grid == new:
            return value
        if self.is_table:
            return resize_table(value, grid, new)
        if self.key == "pos_embed":  # of a vision transformer: as timm does it
            return resample_abs_pos_embed(value, new, grid, self._prefix)
        mode = getattr(self.owner, "resampling", "bicubic")
        return resize_positional_encoding(value, grid, new, self._prefix, mode)

    @property
    def _prefix(self) -> int:
        if getattr(self.owner, "no_embed_class", False):
            return 0
        return getattr(self.owner, "num_prefix_tokens", 0)


def module_positions(module: nn.Module, prefix: str, stage: int) -> Iterator[Positions]:
    """The positions inside `module`, named `prefix` in its model, whose map is `stage` times halved.

    A module says by `position_grids(size)` on what maps its positions, or those of modules inside it, may be
    learned where its tokens tile the map `size`; what an outer module says counts.
    """
    found: set[str] = set()
    modules = dict(module.named_modules(prefix=prefix))
    for name, part in modules.items():
        grids_at: Any = getattr(part, "position_grids", None)
        for local in grids_at((1, 1)) if grids_at is not None else ():
            key = f"{name}.{local}"
            if key not in found:
                found.add(key)
                owner = modules[key.rpartition(".")[0]]
                yield Positions(key, owner, _at_stage(grids_at, local, stage))


def _at_stage(
    grids_at: Callable[[Grid], dict[str, list[Grid]]], local: str, stage: int
) -> Callable[[Grid], list[Grid]]:
    return lambda stem: grids_at(stage_maps(stem, stage + 1)[stage])[local]


def resize_table(table: Tensor, window: Grid, new: Grid) -> Tensor:
    """Swin's table of relative positions ((2h - 1)(2w - 1), heads) for other windows, as timm resizes it."""
    height, width = (2 * side - 1 for side in window)
    # timm takes a flat table for that of a square window.
    image = table.T.unflatten(1, (height, width))
    shape = (len(image), 2 * new[0] - 1, 2 * new[1] - 1)
    resized = resize_rel_pos_bias_table(image, new_window_size=new, new_bias_shape=shape)
    return resized.reshape(len(image), -1).T.contiguous()  # older releases lay the heads below each other


def resample_positions(
    state_dict: dict[str, Tensor],
    model: Any,
    metadata: Mapping[str, Any],
    *,
    published: bool,
    grid: Grid | None = None,
    hint: Grid | None = None,
    own: bool = True,
) -> dict[str, Tensor]:
    """Brings every learned position in `state_dict` to the model's size.

    The map that it was learned on is, in this order:

    1. what the metadata of the state_dict says, which torch.save keeps (`flatten_ext._grids`);
    2. what `grid` says;
    3. square, if the checkpoint has the public code's names: that code knows no other maps;
    4. what `hint` says, if it agrees with every number of tokens;
    5. the only one there is: a single token, and keys pooled to 7 x 7.

    Any other number of tokens fits more than one map, one of them not square, and is asked for; without `own`
    even where it is the model's own: 64 x 64 positions are as many as 32 x 128.

    Args:
        state_dict: parameters by the model's names.
        model: has a method `positions`.
        metadata: of the state_dict, by the names of modules.
        published: whether the checkpoint had the names of the public code.
        grid: height and width of the map of patches (stride 4 in pyramids, the patch size in DeiT).
        hint: the same, not of this file but of the configuration that came with it.
        own: take what is not known for a state of this very model where it has as many positions, as
            `load_state_dict` does; so timm's tests call a filter.

    Raises:
        ValueError: the map is not known, or what is known disagrees; it names parameter, tokens and maps.
    """
    entries = [entry for entry in model.positions() if entry.key in state_dict]
    lengths = {entry.key: entry.length(state_dict[entry.key]) for entry in entries}
    known = _written(entries, lengths, metadata)
    if grid is not None:
        for entry in entries:
            known[entry.key] = _asserted(entry, lengths[entry.key], grid, known.get(entry.key), model)
    unknown = [entry for entry in entries if entry.key not in known]
    maps = _square(unknown, lengths) if published else None
    if maps is None and hint is not None:
        maps = _all_fit(unknown, lengths, hint)
    known |= maps or {}
    for entry in entries:
        if entry.key not in known:
            length, built = lengths[entry.key], tuple(entry.owner.positions_grid())
            only = _only(entry, length)
            if only is None and own and entry.count(built) == length:
                only = built
            if only is None:
                raise ValueError(_question(entry, length, model))
            known[entry.key] = only
    out = dict(state_dict)
    for entry in entries:
        out[entry.key] = entry.resample(out[entry.key], known[entry.key])
    return out


def _written(
    entries: list[Positions], lengths: dict[str, int], metadata: Mapping[str, Any]
) -> dict[str, Grid]:
    """The maps that the state_dict's metadata has."""
    known = {}
    for entry in entries:
        written = metadata.get(entry.key.rpartition(".")[0], {}).get("grid")
        if written is None:
            continue
        height, width = written
        if entry.count((height, width)) != lengths[entry.key]:
            raise ValueError(
                f"{entry.key} has {lengths[entry.key]} tokens, but the checkpoint's metadata says that they "
                f"tile a map of {(height, width)}"
            )
        known[entry.key] = (height, width)
    return known


def _fit(entry: Positions, length: int, stem: Grid) -> Grid | None:
    fitting = [maps for maps in entry.grids(stem) if entry.count(maps) == length]
    return fitting[0] if fitting else (_only(entry, length) if entry.is_table else None)


def _all_fit(entries: list[Positions], lengths: dict[str, int], stem: Grid) -> dict[str, Grid] | None:
    known = {}
    for entry in entries:
        fitting = _fit(entry, lengths[entry.key], stem)
        if fitting is None:
            return None
        known[entry.key] = fitting
    return known


def _asserted(entry: Positions, length: int, grid: Grid, written: Grid | None, model: Any) -> Grid:
    """The map that the caller's grid gives, unless it disagrees with the checkpoint."""
    fitting = _fit(entry, length, grid) if written is None else written
    if fitting is None or (written is not None and not entry.is_table and written not in entry.grids(grid)):
        says = f"{length} tokens" if written is None else f"a map of {written} by its metadata"
        maps = " or ".join(str(found) for found in entry.grids(grid))
        raise ValueError(
            f"grid {grid} does not fit the checkpoint: {entry.key} would have a map of {maps}, and has {says}"
        )
    return fitting


def _square(entries: list[Positions], lengths: dict[str, int]) -> dict[str, Grid] | None:
    """The maps of the public code, whose stem tiles a square; None if it does not."""
    if not entries:
        return {}
    found: list[dict[str, Grid]] = []
    for side in range(1, _STRIDE * max(lengths.values(), default=0) + 1):
        maps = _all_fit(entries, lengths, (side, side))
        if maps is not None and maps not in found:
            found.append(maps)
        if found and maps is None:
            break
    return found[0] if len(found) == 1 else None


def _only(entry: Positions, length: int) -> Grid | None:
    """The one map there can be, or None."""
    if entry.is_table:
        # As in timm's models: a square window's, unless the model has another window of as many positions.
        root = math.isqrt(length)
        square = ((root + 1) // 2,) * 2 if root * root == length and root % 2 else None
        own = tuple(entry.owner.positions_grid())
        if entry.count(own) == length:
            return own if square in (None, own) else None
        return square
    if entry.count((1, 1)) == length:
        return (1, 1)
    # Pooled keys have the same map whatever the stem's is.
    tall, wide = (entry.grids(stem) for stem in ((1 << 12, 1 << 10), (1 << 10, 1 << 12)))
    return tall[0] if tall == wide and entry.count(tall[0]) == length else None


def _question(entry: Positions, length: int, model: Any) -> str:
    if entry.is_table:
        return (
            f"{entry.key} has {length} rows, which is no table of a square window, nor of the model's "
            f"{tuple(entry.owner.positions_grid())}"
        )
    tokens = length - entry.count((1, 1)) + 1
    pairs = [
        (side, tokens // side) for side in range(1, math.isqrt(max(tokens, 0)) + 1) if tokens % side == 0
    ]
    fits = ", ".join(f"{a} x {b}" for a, b in reversed(pairs))
    example = stem_grid(model, (224, 224))
    return (
        f"{entry.key} has {tokens} tokens: a map of {fits} or the other way round? The checkpoint does not "
        "say; files of torch.save(model.state_dict()) do, other formats and programs lose it. Pass "
        f"grid=(height, width), the map of patches that it was trained for: {example} for 224 x 224 pixels."
    )


def metadata_of(state_dict: Any) -> Mapping[str, Any]:
    """The metadata of a state_dict, by the names of modules."""
    return getattr(state_dict, "_metadata", None) or {}
