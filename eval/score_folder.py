"""Score a folder of images with any scorers on several processes: `reward-score` on multiple GPUs.

    accelerate launch eval/score_folder.py images --scorer clip --out scores.csv
    accelerate launch --multi_gpu --num_machines 2 --machine_rank 0 --main_process_ip HOST --num_processes 16 ...
    diffalign eval score_folder images --scorer clip --scorer diffalign.playground:Judge --out scores.parquet

Takes the arguments of `reward-score` and writes the same table, byte for byte on the same kind of device, and --resume
goes on with any number of processes. All processes need access to the images and the folder of the table. --device auto
assigns a GPU to each process. Launchers report exit code 2 ("some images are not scored") as a failed process,
although the table is complete.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from diffalign.commands import program
from reward_models.folder import cli
from reward_models.folder.evaluation import launched


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    if {"-h", "--help"} & {*(sys.argv[1:] if argv is None else argv)}:
        return cli.main(argv)
    rank, world, wait = launched()
    return cli.main(argv, rank=rank, world=world, wait=wait)


if __name__ == "__main__":
    program.run(main)
