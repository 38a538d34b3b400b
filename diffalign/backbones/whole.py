"""A whole pipeline on disk, of which training has changed the network alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffalign.backbones.base import Backbone


def kept_parts(backbone: Backbone) -> list[str]:
    """The names of the parts that training leaves as they are."""
    own = {backbone.network_name, "scheduler", *backbone.left_out}
    return [k for k, v in backbone.index.items() if isinstance(v, list) and v[0] is not None and k not in own]


def save_whole(backbone: Backbone, folder: Path) -> None:
    """Write the network and the scheduler, and the files of all other parts as they are: nothing else is loaded."""
    backbone.denoiser.network.save_pretrained(folder / backbone.network_name)
    scheduler = backbone.scheduler()
    scheduler.save_pretrained(folder / "scheduler")
    for part in kept_parts(backbone):
        shutil.copytree(backbone.path / part, folder / part)
    without = {name: [None, None] if value is None else value for name, value in backbone.left_out.items()}
    index = backbone.index | without | {"scheduler": ["diffusers", type(scheduler).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
