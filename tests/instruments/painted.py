"""Folders of rendered playground images in the layout of `diffalign generate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torchvision.transforms.functional import to_pil_image

from diffalign.playground.world import imagine, parse


def folder(path: Path, looks: Sequence[tuple[float, float]], prompts: Sequence[str]) -> Path:
    """One image for each prompt and each look: vividness (1: as asked), and pixels away from the right place."""
    (path / "images").mkdir(parents=True)
    scene, rows = imagine([parse(p) for p in prompts], seed=0), []
    for k, (vivid, away) in enumerate(looks):
        images = scene._replace(colour=(scene.colour - 0.55) * vivid + 0.55, x=scene.x + away).render().clamp(0, 1)
        for i, image in enumerate(images):
            to_pil_image(image).save(path / "images" / f"{i:05d}_{k}.png", compress_level=1)
            row = {"prompt": prompts[i], "prompt_id": f"{i:05d}", "seed": 0, "sample": k}
            rows.append(json.dumps({"image": f"images/{i:05d}_{k}.png", **row}))
    (path / "manifest.jsonl").write_text("\n".join(rows) + "\n")
    return path
