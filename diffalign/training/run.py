"""A run: its folder, its accelerator, its randomness and its metrics."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from omegaconf import OmegaConf
from torch import Tensor, nn

from diffalign.config import Config, read, too_small
from diffalign.data import KeyedLoader, PreferenceGroups, PreferenceLatents, Prompts
from diffalign.data.fingerprint import check_same_data, check_same_prompts
from diffalign.data.loader import KeyedDataset
from diffalign.draws import Draws
from diffalign.networks.placement import Placement, deterministic_only, placement_of, prepare
from diffalign.training.metrics import MetricsFile
from reward_models.files import read_lines, write_whole, writing

Latents = TypeVar("Latents", bound=PreferenceLatents)

MAY_CHANGE = ("run.", "hooks.", "trainer.steps", "trainer.grad_accum", "data.num_workers")
MAY_NOT_CHANGE = ("run.seed", "run.deterministic", "hooks.ema_decay")
"""What a resumed run may set differently from how it began, and what of that it may not. The checkpoint looks after
trainer.grad_accum: it may change with the number of processes, so that a turn stays as many micro-batches."""


class Run:
    """Where a training run happens. Every rank has one; rank 0 writes.

    Args:
        folder: receives config.yaml, metrics.jsonl, checkpoints/, samples/ and export/
        seed: of every random draw of the run
        mixed_precision: what networks that train compute their matrices in; what `accelerate launch` says when left out
        tracker: sends the metrics to this tracker of accelerate's as well
        log_every: steps between two writes of the metrics, which hold every step
        resume: continue from the last checkpoint in `folder`
        deterministic: the same bits at each run on a GPU too, at some cost in speed; what cannot be so stops the run
    """

    def __init__(
        self,
        config: Config,
        *,
        folder: str,
        seed: int = 0,
        mixed_precision: Literal["no", "fp16", "bf16"] | None = None,
        tracker: Literal["none", "tensorboard", "wandb"] = "none",
        log_every: int = 10,
        resume: bool = False,
        deterministic: bool = False,
    ):
        if deterministic:
            deterministic_only()
        self.folder = Path(folder)
        trackers = None if tracker == "none" else tracker
        self.accelerator = Accelerator(mixed_precision=mixed_precision, log_with=trackers, project_dir=self.folder)
        self.draws, self.log_every, self.resume = Draws(seed), log_every, resume
        self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.accelerator, log_every)
        if self.main:
            self._claim(config)
        self.accelerator.wait_for_everyone()
        if trackers:
            self.accelerator.init_trackers(
                "diffalign", init_kwargs={"wandb": {"dir": str(self.folder), "name": self.folder.name}}
            )

    @staticmethod
    def check(cfg: dict[str, Any]) -> list[str]:
        """What cannot work in a `run` section, one line each."""
        problems = too_small("run", cfg, log_every=1)
        if not cfg["folder"].strip():
            problems.append("'run.folder' is empty; name the folder that receives the run")
        packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}.get(cfg["tracker"], ())
        if packages and not any(find_spec(package) for package in packages):
            problems.append(
                f"'run.tracker' = {cfg['tracker']} needs a package that is missing: pip install {packages[0]}"
            )
        return problems

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def placement(self) -> Placement:
        """Where this run's networks are, and what their matrices are computed in."""
        return placement_of(self.accelerator)

    def _claim(self, config: Config) -> None:
        """Write config.yaml, or compare with the one that is there when resuming."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        path, begun = self.folder / "config.yaml", self._begun()
        if begun and not self.resume:
            raise FileExistsError(
                f"'{self.folder}' already holds a run; continue it with run.resume=true or choose another run.folder"
            )
        if begun and path.exists():
            before = read(str(path), self.folder)
            now = OmegaConf.create(config.yaml())
            old, new = _flat(before), _flat(now)
            changed = [k for k in new if new[k] != old.get(k)]
            changed = [k for k in changed if k in MAY_NOT_CHANGE or not k.startswith(MAY_CHANGE)]
            if changed:
                raise ValueError(
                    f"resuming '{self.folder}' with other settings than it began with: {', '.join(changed)}; "
                    "set them back or choose another run.folder"
                )
        write_whole(path, config.yaml())

    def _lock(self) -> None:
        """Keep every other process out of the folder as long as this one lives. Raises FileExistsError where one is in.

        A POSIX record lock, which the kernel drops with the process: unlike flock's, it is not kept by worker processes
        that outlive a killed run for some seconds.
        """
        self._held = (self.folder / ".lock").open("a+")
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                self.print(f"'{self.folder}' cannot be locked ({error.strerror}): see to it that no second run uses it")
                return
            self._held.seek(0)
            raise FileExistsError(
                f"another run is in '{self.folder}' now ({self._held.read().strip()}); wait until it has ended, or "
                "choose another run.folder"
            ) from None
        with writing(self.folder / ".lock"):
            self._held.truncate(0)
            self._held.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._held.flush()

    def _begun(self) -> bool:
        """Whether a step was taken in the folder. One of a run that failed before that is as good as new."""
        rows = read_lines(self.metrics.file) if self.metrics.file.exists() else []
        return any(row["step"] > 0 for row in rows) or any((self.folder / "checkpoints").glob("step-*/state.json"))

    def prepare(self, module: nn.Module) -> nn.Module:
        """The module as accelerate wants it for training (DDP and so on)."""
        return prepare(module, self.accelerator)

    def latents(self, kind: type[Latents], encoder: Any, **config: Any) -> Latents:
        """A preference data set of this run as latents, with its draws, ranks and folder."""
        _check_size(encoder, config["resolution"])
        a, verify = (
            self.accelerator,
            partial(check_same_data, self.folder, kind.__name__, config["path"], main=self.main),
        )
        ranks = (a.process_index, a.num_processes, a.wait_for_everyone)
        return kind(encoder, self.draws, self.folder, *ranks, verify, **config)

    def prompts(self, encoder: Any, **config: Any) -> Prompts:
        """A list of prompts of this run with their text embeddings."""
        _check_size(encoder, config["resolution"])
        a = self.accelerator
        prompts = Prompts(encoder, self.folder, a.process_index, a.num_processes, a.wait_for_everyone, **config)
        found = zip(prompts.ids, prompts.prompts, strict=True)
        check_same_prompts(self.folder, config["path"], found, main=self.main)
        return prompts

    def groups(self, prepare: Any, part: Any, **config: Any) -> PreferenceGroups:
        """The training or validation part of a data set of this run, as groups of images for a scorer."""
        a = self.accelerator
        path = (config.get("validation_path") if part == "validation" else None) or config["path"]
        verify = partial(check_same_data, self.folder, f"groups {part}", path, main=self.main)
        ranks = (a.process_index, a.num_processes, a.wait_for_everyone)
        return PreferenceGroups(prepare, self.folder, *ranks, part, verify, **config)

    def loader(self, dataset: KeyedDataset) -> KeyedLoader:
        """This rank's micro-batches of the data set, on the device."""
        return KeyedLoader(
            dataset,
            self.draws,
            batch_size=dataset.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_workers=dataset.num_workers,
            device=self.device,
        )

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all ranks."""
        return self.accelerator.reduce(value, reduction="mean")

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all ranks as one."""
        return gather_object(values)

    def print(self, *lines: str) -> None:
        """Print once, from the main process."""
        self.accelerator.print("\n".join(lines))

    def log(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of a training step to metrics.jsonl."""
        self.metrics.log(step, values)


def _check_size(encoder: Any, resolution: int) -> None:
    """Raise ValueError for images that a backbone cannot draw, before hours go into encoding them."""
    if hasattr(encoder, "latent_shape"):
        encoder.latent_shape(resolution)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        out |= _flat(value, name + ".") if OmegaConf.is_dict(value) else {name: value}
    return out
