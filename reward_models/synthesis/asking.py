"""Asks scorers and judges what has no record yet, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reward_models.folder.decoding import Decoder
from reward_models.folder.engine import Processes
from reward_models.folder.scoring import Scored, score_items
from reward_models.placement import upload
from reward_models.protocol import Unscored, device_of
from reward_models.synthesis.records import Answer, Picture, Question, Records
from reward_models.vlm.replies import read_all

Reply = Callable[[Any, Sequence[Tensor], Sequence[str]], list[Answer]]
"""(judge, images of each side [B, 3, H, W] in [0, 1], B prompts) -> B answers."""


class Asking(NamedTuple):
    """Where answers go, and how they are computed. All processes have the same records when they start."""

    records: Records
    decoder: Decoder
    batch_size: int
    processes: Processes = Processes()

    def batches(self, questions: Sequence[Question], missing: set[int]) -> list[list[Question]]:
        """The missing questions of this process. The last bits of a score depend on its batch, so batches are formed of
        all questions before any is left out."""
        size, (rank, world, _) = self.batch_size, self.processes
        whole = (range(i, min(i + size, len(questions))) for i in range(0, len(questions), size))
        work = [found for batch in whole if (found := [questions[i] for i in batch if i in missing])]
        return work[len(work) * rank // world : len(work) * (rank + 1) // world]

    def bar(self, title: str, work: Sequence[Sequence[Question]], unit: str) -> Any:
        """Progress over the questions of this process."""
        return tqdm(total=sum(map(len, work)), desc=title, unit=unit, disable=self.processes.rank > 0 or not work)


def score_pictures(pictures: Sequence[Picture], scorers: Mapping[str, tuple[str, Any]], asking: Asking) -> None:
    """Score pictures by scorers, key -> spec and scorer. Those that lack the same pictures share each decoded image.

    Judges with `answers` keep every aspect and the text of the reply. Raises JudgeError if a server cannot be used.
    """
    questions = [(one,) for one in pictures]
    missing = {by: asking.records.unanswered(by, questions) for by in scorers}
    plain = [by for by, (_, scorer) in scorers.items() if not hasattr(scorer, "answers")]
    for lacking in dict.fromkeys(frozenset(missing[by]) for by in plain):
        together = [by for by in plain if missing[by] == lacking]
        work = asking.batches(questions, set(lacking))
        named = dict(scorers[by] for by in together)
        results = score_items(([one.item for (one,) in batch] for batch in work), named, asking.decoder)
        with asking.bar("score", work, "image") as bar:
            for batch, found in zip(work, results, strict=True):
                for k, by in enumerate(together):
                    answers = [
                        Answer((x.scores[k],)) if isinstance(x, Scored) else Answer(failed=x.reason) for x in found
                    ]
                    asking.records.add(by, zip(batch, answers, strict=True))
                bar.update(len(batch))
    if asking.processes.rank:  # one process asks servers, and knows what they cost
        return
    asking = asking._replace(processes=Processes())
    for by, (_, judge) in scorers.items():
        if by not in plain:
            _ask(by, judge, asking.batches(questions, missing[by]), _rated, asking, "rate")


def compare_pictures(pairs: Sequence[Question], judges: Mapping[str, Any], asking: Asking) -> None:
    """Ask judges, key -> judge, for `votes` on pairs in both orders. Raises JudgeError if a server cannot be used."""
    for by, judge in judges.items():
        _ask(by, judge, asking.batches(pairs, asking.records.unanswered(by, pairs)), _voted, asking, "compare")


def _ask(by: str, judge: Any, work: list[list[Question]], reply: Reply, asking: Asking, title: str) -> None:
    flat = ([one.item for question in batch for one in question] for batch in work)
    with asking.bar(title, work, "pair" if title == "compare" else "image") as bar:
        for batch, decoded in zip(work, asking.decoder.batches(flat, None), strict=True):
            sides = len(batch[0])
            rows = [decoded.images[i : i + sides] for i in range(0, len(decoded.images), sides)]
            for part, answers in _replies(judge, batch, rows, reply):
                asking.records.add(by, zip(part, answers, strict=True))
            bar.update(len(batch))


def _replies(
    judge: Any, batch: Sequence[Question], rows: Sequence[Sequence[Any]], reply: Reply
) -> Iterator[tuple[list[Question], list[Answer]]]:
    """The answers to a batch, in parts of equal image sizes."""
    sizes: dict[tuple[Any, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if bad := [image for image in row if isinstance(image, str)]:
            yield [batch[i]], [Answer(failed=bad[0])]
        else:
            sizes.setdefault(tuple(image.shape for image in row), []).append(i)
    device = device_of(judge)
    for part in sizes.values():
        sides = [
            upload(torch.from_numpy(np.stack(side)), device).permute(0, 3, 1, 2).float() / 255
            for side in zip(*(rows[i] for i in part), strict=True)
        ]
        yield [batch[i] for i in part], reply(judge, sides, [batch[i][0].item.prompt for i in part])


@torch.no_grad()
def _rated(judge: Any, images: Sequence[Tensor], prompts: Sequence[str]) -> list[Answer]:
    replies = judge.answers(images[0], prompts)
    scores, reasons = read_all(replies, judge.template)
    return [
        Answer(failed=reasons[i]) if i in reasons else Answer(tuple(row), str(replies[i]))
        for i, row in enumerate(scores.tolist())
    ]


@torch.no_grad()
def _voted(judge: Any, images: Sequence[Tensor], prompts: Sequence[str]) -> list[Answer]:
    reasons: Mapping[int, str] = {}
    try:
        votes = judge.votes(*images, prompts)
    except Unscored as error:
        votes, reasons = error.scores, error.reasons
    fits = isinstance(votes, Tensor) and votes.shape == (len(prompts), 2)
    if not fits or not ((votes == 0) | (votes == 0.5) | (votes == 1) | votes.isnan()).all():
        found = f"{[*votes.shape]} of {votes.unique().tolist()}" if isinstance(votes, Tensor) else type(votes).__name__
        expected = f"{type(judge).__name__}.votes must return [{len(prompts)}, 2] of 0, 1/2 (a tie) and 1"
        raise ValueError(f"{expected}; got {found[:100]}")
    reasons = dict.fromkeys(votes.isnan().any(1).nonzero()[:, 0].tolist(), "the judge gave no vote") | dict(reasons)
    return [
        Answer(failed=reasons[i]) if i in reasons else Answer(tuple(map(float, row)))
        for i, row in enumerate(votes.tolist())
    ]
