"""The pairs of a data set whose annotators have embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffalign.data.latents import Item
from diffalign.data.pairs import PreferencePairs
from diffalign.draws import Draws


class UserPairs:
    """Preference pairs together with the users who chose.

    Positional: the pairs and the draws of the run.

    Args:
        path: users.safetensors, which `diffalign user embed` writes: each user's embeddings [M, T, D] from M drawn sets
            of their choices
        most: pairs of one user; of those who have more, so many are drawn, that few do not decide everything

    Raises FileNotFoundError or ValueError for the file, and where no pair's annotator is in it.
    """

    def __init__(self, pairs: PreferencePairs, draws: Draws, *, path: str, most: int | None = 256):
        self.pairs, self.users = pairs, read_users(path)
        self.batch_size, self.num_workers = pairs.batch_size, pairs.num_workers
        self.draws_per_sample = pairs.draws_per_sample
        mine: dict[str, list[int]] = {}
        for i, name in enumerate(pairs.annotators):
            if name in self.users:
                mine.setdefault(str(name), []).append(i)
        if not mine:
            raise ValueError(
                f"no annotator of the pairs has an embedding in '{path}' (the pairs name "
                f"{', '.join(sorted({str(x) for x in pairs.annotators})[:3])}, the file {', '.join(self.users)[:60]}); "
                "embed the users of the same data set"
            )
        self.indices: list[int] = []
        for name, own in mine.items():
            order = draws.permutation(len(own), key=name, stream="pairs of a user").tolist()
            self.indices += sorted(own[k] for k in order[:most])
        self.users_of = {pairs.ids[i]: str(pairs.annotators[i]) for i in self.indices}

    @property
    def width(self) -> int:
        """D of the embeddings [M, T, D]."""
        return next(iter(self.users.values())).shape[-1]

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in a `users` section."""
        few = cfg["most"] is not None and cfg["most"] < 1
        problems = [f"'users.most' = {cfg['most']} must be 1 or more"] if few else []
        if not Path(cfg["path"]).is_file():
            problems.append(f"'users.path': no file '{cfg['path']}'; `diffalign user embed` writes it")
        return problems

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: tuple[int, int]) -> Item:
        """Pair `index` in `epoch`, from place = (epoch, index)."""
        epoch, index = place
        return self.pairs[epoch, self.indices[index]]

    def collate(self, items: Sequence[Item]) -> Any:
        return self.pairs.collate(items)

    def encode(self, batch: Any) -> Any:
        return self.pairs.encode(batch)


def read_users(path: str | Path) -> dict[str, Tensor]:
    """The embeddings [M, T, D] of every user in a file. Raises FileNotFoundError or ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no users file '{path}'; `diffalign user embed` writes it")
    try:
        users = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged, or no safetensors file ({error}); embed the users again") from error
    shapes = {tuple(x.shape[1:]) for x in users.values()}
    if len(shapes) != 1 or any(x.ndim != 3 for x in users.values()):
        raise ValueError(f"'{path}' must hold embeddings [M, T, D] with one T and D; got {sorted(shapes)}")
    return users
