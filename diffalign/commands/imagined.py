"""Run, data and trainer of a recipe that is traced without data and without a device; see planning.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from diffalign.commands.ledger import Ledger
from diffalign.config import Config
from diffalign.data.prompts import find_prompts
from diffalign.networks.ema import Ema
from diffalign.networks.placement import trained_parameters
from diffalign.networks.reference import FrozenReference
from diffalign.training.run import Run
from diffalign.types import Cond, LatentBatch, PromptBatch

RECORDS = 64
"""Records of the data set that are read for the trace."""


class Traced(Exception):
    """Leaves the recipe when its steps are traced."""


class ImaginedRun(Run):
    """A run whose data has no pixels and no embeddings."""

    def __init__(self, ledger: Ledger, cfg: Config, **settings: Any):
        self.ledger = ledger
        super().__init__(cfg, **settings)

    def latents(self, kind: Any, encoder: Any, **settings: Any) -> Any:
        """The first records of the data set; encoding them is traced."""
        resolution = settings["resolution"]
        self._encode(encoder, resolution, max(1, min(64, 8 * 512**2 // resolution**2)))
        few = {"limit": RECORDS, "cache": "off", "resolution": 8, "num_workers": 0, "max_dropped": 1.0}
        few |= {"crop": "center", "buckets": None}  # no bucket has more pixels than the square
        data = kind(None, self.draws, self.folder, **{**settings, **few})
        data.imagined = (encoder.latent_shape(resolution), self.cond, settings["batch_size"])
        return data

    def prompts(self, encoder: Any, **settings: Any) -> Any:
        """The prompts of a file; encoding them is traced."""
        self._encode(encoder, settings["resolution"], 0)
        return _Prompts([*find_prompts(settings["path"]).values()], settings["batch_size"], self.cond)

    def _encode(self, encoder: Any, resolution: int, images: int) -> None:
        self.ledger.phase("encoding")
        with self.ledger.imagining(), torch.no_grad():
            if images:
                encoder.encode_pixels(torch.zeros(images, 3, resolution, resolution))
            cond = encoder.encode_text([""] * 32)
        self.cond = Cond._make(None if x is None else torch.zeros(x.shape[1:]) for x in cond)

    def print(self, *lines: str) -> None:
        """Nothing: the plan is what is printed."""

    def loader(self, dataset: Any) -> Any:
        return _Loader(self.ledger, dataset)


class _Prompts:
    """Prompts without embeddings."""

    draws_per_sample, num_workers = None, 0

    def __init__(self, prompts: Sequence[str], batch_size: int, cond: Cond):
        self.prompts, self.batch_size, self.cond = prompts, batch_size, cond

    def __len__(self) -> int:
        return len(self.prompts)


class _Loader:
    """Endless micro-batches of fake latents or prompts, drawn as those of a run."""

    def __init__(self, ledger: Ledger, dataset: Any):
        self.ledger, self.dataset, self.batch_size = ledger, dataset, dataset.batch_size

    def start(self, micro: int, draw: Callable[[Any], Any] = lambda batch: batch) -> Iterator[Any]:
        while True:
            batch = draw(self._prompts() if isinstance(self.dataset, _Prompts) else self._latents())
            yield tree_map_only(torch.Tensor, self._faked, batch)

    def _faked(self, x: torch.Tensor) -> Any:
        found = self.ledger.fake.from_tensor(x)
        self.ledger.add(found)
        return found

    def _prompts(self) -> PromptBatch:
        data, keys = self.dataset, [(0, str(k)) for k in range(self.batch_size)]
        return PromptBatch([data.prompts[0]] * self.batch_size, _batch(data.cond, self.batch_size), keys)

    def _latents(self) -> LatentBatch:
        data = self.dataset
        items = [data[0, k % len(data)] for k in range(self.batch_size)]
        found = data.collate(items)
        inner = next(x for x in (data, *vars(data).values()) if hasattr(x, "imagined"))
        shape, cond, _ = inner.imagined
        return LatentBatch(torch.zeros(len(found.x0), *shape), _batch(cond, len(items)), *found[2:])


def _batch(cond: Cond, n: int) -> Cond:
    return Cond._make(None if x is None else x.expand(n, *x.shape) for x in cond)


class ImaginedTrainer:
    """Takes a training step with the optimizer's state, which one with zero gradients makes first."""

    def __init__(self, ledger: Ledger, run: Any, algorithm: Any, players: Any, hooks: Any = (), **settings: Any):
        self.ledger, self.algorithm, self.players, self.hooks = ledger, algorithm, players, hooks
        self.norm = settings["max_grad_norm"]

    def fit(self, loader: Any) -> None:
        """Trace the step. Raises Traced."""
        ledger, algorithm = self.ledger, self.algorithm
        for player in self.players.values():
            trained = trained_parameters(player.module)
            ledger.label(trained, "trained weights")
            for p in trained:
                p.register_post_accumulate_grad_hook(lambda p: ledger.label([p.grad], "gradients"))
            for group in player.optimizer.param_groups:
                group["foreach"] = None if group.get("fused") else True  # the default on a GPU
        if isinstance(reference := getattr(algorithm, "reference", None), FrozenReference):
            ledger.label(reference.denoiser.parameters(), "reference")
        for hook in self.hooks:
            if isinstance(ema := getattr(hook, "ema", None), Ema):
                ledger.label(ema.model.shadow_params, "moving average")
        batches = algorithm.batches(loader.start(0, algorithm.draw))
        ledger.phase("training")
        for player in self.players.values():
            with ledger.imagining():
                for p in trained_parameters(player.module):
                    p.grad = torch.zeros_like(p)
            self._update(player)
        turns = algorithm.turns(0)
        for turn in [*turns] * min(2, len(turns)):  # what one turn loads, such as the decoder, stays beside the others
            player = self.players[turn.player]
            with ledger.imagining():
                for part in algorithm.split(next(batches)):
                    loss, metrics = turn.loss(part)
                    loss.backward()
                    del loss, metrics, part
            self._update(player)
        raise Traced

    def _update(self, player: Any) -> None:
        with self.ledger.imagining():
            torch.nn.utils.clip_grad_norm_(trained_parameters(player.module), self.norm, foreach=True)
            player.optimizer.step()
            player.optimizer.zero_grad()
        for state in player.optimizer.state.values():
            self.ledger.label(state.values(), "optimizer")
