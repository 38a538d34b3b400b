"""Score images from Python: a folder of image files against one prompt, the best first.

    python examples/score.py photos "large red circle on white"

`playground_hps` ships with the package and is trained on the captions of the playground. Replace it with `hps_v2.1`,
`pickscore`, `clip` or your own scorer folder. `reward-score` does the same for a million images and can resume.
"""

from __future__ import annotations

import sys
from pathlib import Path

from reward_models import load_scorer, score_files
from reward_models.images import is_image


def rank(folder: str, prompt: str, scorer: str = "playground_hps") -> list[tuple[float, Path]]:
    """Score and file of every image in the folder, the best first. Raises ValueError for one that cannot be read."""
    files = sorted(path for path in Path(folder).iterdir() if is_image(path.name))
    scores = score_files(load_scorer(scorer), files, [prompt] * len(files))  # float32 [N]
    return sorted(zip(scores.tolist(), files, strict=True), reverse=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/score.py FOLDER PROMPT")
    for score, file in rank(*sys.argv[1:]):
        print(f"{score:8.4f}  {file}")
