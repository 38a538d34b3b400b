"""Start-up cost of a data set of a million pairs: seconds, memory and open files, with an empty and a full cache.

    python benchmarks/million_pairs.py --records 1000000 --images 200000

Writes a JSONL of pairs of tiny images in a temporary folder, and opens it twice, each time in a new process that may
open 1024 files, with an encoder that takes no time; then in several processes at once, as the ranks of one machine.
Prints one JSON object, and writes it with --out.

  start_s, start_cpu_s     time to open the data set, and CPU time of all threads: what counts on a busy machine
  peak_rss_gb, import_gb   peak memory of the process, and what imports had taken of it
  added_gb                 memory that the data added, anonymous and mapped, after reading a part as in training;
                           pages shared with other processes count as their share, so ranks can be summed
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES = 1024


class Pool:
    """Encoder by averages: latents [3, 2, 2], embeddings of one number."""

    fingerprint = "pool"

    def encode_pixels(self, pixels: Any) -> Any:
        import torch

        return torch.nn.functional.adaptive_avg_pool2d(pixels, 2)

    def encode_text(self, prompts: Sequence[str]) -> Any:
        import torch

        from diffalign.types import Cond

        return Cond(torch.tensor([[[float(len(p))]] for p in prompts]))


def png(number: int) -> bytes:
    """PNG bytes of 2 x 2 pixels with the number as colour, without Pillow: a million of them take seconds."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    line = b"\0" + 2 * number.to_bytes(3, "big")
    head = (2).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(2 * line, 1)) + chunk(b"IEND", b"")
    )


def make(folder: Path, records: int, images: int, prompts: int) -> Path:
    """Write the data set: pair k has images 2 k and 2 k + 1, modulo their number; the second round differs."""
    for k in range(images):
        if k % 1000 == 0:
            (folder / f"images/{k // 1000:05d}").mkdir(parents=True)
        (folder / f"images/{k // 1000:05d}/{k:07d}.png").write_bytes(png(k))
    with (folder / "pairs.jsonl").open("w") as file:
        for k in range(records):
            w, l_ = 2 * k % images, (2 * k + 1 + 2 * (2 * k // images)) % images
            names = [f"images/{i // 1000:05d}/{i:07d}.png" for i in (w, l_)]
            file.write(json.dumps({"prompt": f"prompt {k % prompts}", "chosen": names[0], "rejected": names[1]}) + "\n")
    return folder / "pairs.jsonl"


def proportional_gb() -> float:
    """Memory of this process; shared pages are divided by the number of processes that share them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 2**20


def start(path: Path, rank: int, barrier: Any, found: Any) -> None:
    """Open the data set in this process, read a part as in training, and put time and memory into a queue."""
    work, world = path.parent, barrier.parties
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    begun = time.perf_counter()
    import torch

    from diffalign.data import PreferencePairs, records
    from diffalign.draws import Draws

    torch.set_num_threads(1)
    read, most = [0], [0]
    whole = records.read_file

    def counted(name: str) -> bytes:
        read[0] += 1
        return whole(name)

    def watch() -> None:
        while not done.wait(0.05):
            most[0] = max(most[0], len(os.listdir("/proc/self/fd")))

    records.read_file = counted  # type: ignore[assignment]
    done = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    imported = time.perf_counter() - begun
    barrier.wait()
    before, peak = proportional_gb(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    barrier.wait()
    begun, cpu = time.perf_counter(), time.process_time()
    ranks = (rank, world, barrier.wait)
    pairs = PreferencePairs(
        Pool(), Draws(0), work / "run", *ranks, path=str(path), resolution=8, cache=str(work / "cache")
    )
    opened, used = time.perf_counter() - begun, time.process_time() - cpu
    begun = time.perf_counter()
    order = Draws(0).permutation(len(pairs), key=0, stream="order")[:20_000].tolist()
    for index in order:
        pairs[0, index]
    seconds = time.perf_counter() - begun
    done.set()
    watcher.join()
    barrier.wait()
    added = proportional_gb() - before
    barrier.wait()
    row = {
        "pairs": len(pairs),
        "import_s": round(imported, 1),
        "start_s": round(opened, 1),
        "start_cpu_s": round(used, 1),
        "images_read": read[0],
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "import_gb": round(peak, 2),
        "added_gb": round(added, 2),
        "open_files": most[0],
        "random_pairs_per_s": round(len(order) / seconds),
    }
    found.put(row)


def run(path: Path, ranks: int) -> list[dict[str, Any]]:
    """`start` in new processes, as the ranks of one machine."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(ranks), context.Queue()
    processes = [context.Process(target=start, args=(path, rank, barrier, found)) for rank in range(ranks)]
    for process in processes:
        process.start()
    rows = [found.get() for _ in processes]
    for process in processes:
        process.join()
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=200_000, help="number of distinct images, each in several pairs")
    parser.add_argument("--prompts", type=int, default=50_000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, default=4, help="processes of the third start")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        path = make(Path(name), args.records, args.images, args.prompts)
        time.sleep(2.5)  # modification times of recently changed files are not trusted
        found: dict[str, Any] = {"records": args.records, "images": args.images, "prompts": args.prompts}
        (Path(name) / "run").mkdir()
        for which in ("first", "second"):
            (found[which],) = run(path, 1)
        rows = run(path, args.ranks)
        found["ranks"] = {
            "processes": args.ranks,
            "start_cpu_s": [row["start_cpu_s"] for row in rows],
            "images_read": sum(row["images_read"] for row in rows),
            "added_gb_together": round(sum(row["added_gb"] for row in rows), 2),
        }
    print(json.dumps(found, indent=1))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
