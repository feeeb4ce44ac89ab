"""The map that learned positions tile, kept in the metadata of a state_dict.

(1, H * W, C) does not say what H and W are: 64 x 64 positions are as many as 32 x 128. A state_dict has room
for such facts beside its tensors: `state_dict()._metadata`, a dictionary for each module, which torch.save
keeps. Its keys stay those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["KeepsGrid"]


class KeepsGrid:
    """Before nn.Module among the bases of a module that owns learned positions: it writes
    their map into a state_dict, and refuses to load those of another map.

    A subclass names the parameter and gives the map.
    """

    positions_name: str

    def positions_grid(self) -> Sequence[int] | None:
        """Height and width of the map that the positions tile; None if there are no positions."""
        raise NotImplementedError

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        grid, metadata = self.positions_grid(), getattr(destination, "_metadata", None)
        if grid is not None and metadata is not None:
            metadata.setdefault(prefix[:-1], {})["grid"] = [int(side) for side in grid]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        grid, saved = self.positions_grid(), local_metadata.get("grid")
        key = prefix + self.positions_name
        if grid is not None and saved is not None and tuple(saved) != tuple(grid):
            *_, error_msgs = args
            positions, loaded = getattr(self, self.positions_name), state_dict.get(key)
            if loaded is not None and loaded.shape == positions.shape:
                error_msgs.append(
                    f"grid mismatch for {key}: the checkpoint learned it on a map of {tuple(saved)}, here it "
                    f"is for one of {tuple(grid)}. Load into a module built for that map (set_input_size "
                    "comes after loading), or by flatten_ext.load_official, which resamples."
                )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[misc]
