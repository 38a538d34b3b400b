"""The scorer `judge`: a model behind an HTTP server rates images, or compares two, in both orders."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from reward_models.judges.chat import ChatClient
from reward_models.protocol import Unscored, check_images
from reward_models.vlm.replies import read_all, read_answer, read_template

RATE = """You see an image that was generated for this prompt: {prompt}

Rate how well the image shows the prompt, and how good the image is. Answer with these two lines only:
Match (1-10): X
Quality (1-10): Y"""
COMPARE = """Image A and Image B were generated for this prompt: {prompt}

Which of the two shows the prompt better and is the better image? If neither is better, say tie. Do not prefer an image
because it is shown first. Answer with one line only: Answer: A, Answer: B or Answer: tie"""
JPEG_QUALITY = 95
GRID = 400
"""Values of each accuracy over which `position_posterior` integrates."""


class Judge:
    """A model behind a server in the OpenAI chat schema (vLLM, SGLang, hosted models) as a scorer, greedily decoded.

    Replies are kept in a cache with address, model, text and image bytes as the key, so no answer is paid twice, also
    not after a kill. A reply that cannot be read is a failure of that image, with its text.

    Args:
        url: address of the API, such as http://127.0.0.1:8000/v1
        model: name of the model on the server
        template: question for one image, in quotes, or a file with it. {prompt} stands for the prompt; each line
            `NAME (LOW-HIGH): X` asks for a number. Default: match and quality, 1 to 10
        pair_template: question for two images; it asks for the line `Answer: A`, `Answer: B` or `Answer: tie`
        encoding: how images are sent. Scores differ, so it is stored with results
        key_env: environment variable with the key; default: JUDGE_API_KEY, if it is set
        concurrency: requests at once
        timeout: seconds for a whole answer
        retries: further tries of a request
        backoff: seconds before the first further try, then doubled
        max_tokens: length after which a reply is cut off
        price_in: price of a million tokens of requests, for the cost that is printed
        price_out: price of a million tokens of replies
        cache: folder of the cache; off for none. Default: $DIFFALIGN_CACHE/judge or ~/.cache/diffalign/judge
    """

    differentiable = False
    remote = True

    def __init__(
        self,
        *,
        url: str,
        model: str,
        template: str = RATE,
        pair_template: str = COMPARE,
        encoding: Literal["png", "jpeg"] = "png",
        key_env: str = "",
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 1.0,
        max_tokens: int = 512,
        price_in: float = 0.0,
        price_out: float = 0.0,
        cache: str = "",
    ):
        self.template, self.pair_template = read_template(template).need_aspects(), read_template(pair_template)
        self.model, self.encoding, self.max_tokens, self.prices = model, encoding, max_tokens, (price_in, price_out)
        folder = Path(cache or Path(os.environ.get("DIFFALIGN_CACHE") or "~/.cache/diffalign") / "judge").expanduser()
        how: dict[str, Any] = {"key_env": key_env, "concurrency": concurrency, "timeout": timeout, "retries": retries}
        self.client = ChatClient(url, backoff=backoff, cache=None if cache == "off" else folder, **how)
        self.unit = self.template.unit

    @property
    def record(self) -> dict[str, Any]:
        """What the scores depend on; stored with results."""
        return {
            "url": self.client.url,
            "model": self.model,
            "template": self.template.sha256,
            "readout": "text",
            "encoding": self.encoding,
            "max_tokens": self.max_tokens,
        }

    @property
    def pair_record(self) -> dict[str, Any]:
        """What the votes on pairs depend on."""
        return {**self.record, "template": self.pair_template.sha256, "readout": "votes"}

    @property
    def spent(self) -> str:
        """Requests, tokens, cost and rate so far, in one line."""
        x = self.client.spent
        cost = (x.tokens_in * self.prices[0] + x.tokens_out * self.prices[1]) / 1e6
        line = (
            f"judge {self.model}: {x.answered} answers, {x.cached} from the cache, {x.failed} failed, {x.tries} tries"
        )
        line += f", {x.tokens_in} + {x.tokens_out} tokens"
        line += f", cost {cost:.4g}" if any(self.prices) else ""
        return line + (f", {x.answered / x.seconds:.1f} answers/s" if x.answered and x.seconds else "")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] and B prompts -> float32 [B], the mean over the aspects of each reply.

        Raises Unscored for replies that cannot be read, and JudgeError if the server cannot be used.
        """
        return self._rated(images, prompts, mean=True)

    def score_aspects(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[B, 3, H, W] float in [0, 1] and B prompts -> float32 [B, A], each number of a reply. Raises as `score`."""
        return self._rated(images, prompts, mean=False)

    def answers(self, images: Tensor, prompts: Sequence[str]) -> list[str | Exception]:
        """[B, 3, H, W] float in [0, 1] and B prompts -> the text of each reply, or why there is none.

        Raises JudgeError if the server cannot be used.
        """
        check_images(images, prompts)
        asked = [
            self._request([_picture(url), _text(self.template.fill(prompt))])
            for url, prompt in zip(self._urls(images), prompts, strict=True)
        ]
        return self.client.ask(asked)

    def _rated(self, images: Tensor, prompts: Sequence[str], *, mean: bool) -> Tensor:
        scores, reasons = read_all(self.answers(images, prompts), self.template)
        scores = scores.mean(1) if mean else scores
        if reasons:
            raise Unscored(scores, reasons)
        return scores

    def votes(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        """Both orders of B pairs -> float32 [B, 2] in {0, 1/2, 1}: whether `first` is better when shown first, and
        when shown second; 1/2 is a tie.

        first, second  [B, 3, H, W] float in [0, 1]

        Raises Unscored, with scores [B, 2], for replies that cannot be read, and JudgeError.
        """
        check_images(first, prompts)
        check_images(second, prompts)
        asked = []
        for a, b, prompt in zip(self._urls(first), self._urls(second), prompts, strict=True):
            for one, other in ((a, b), (b, a)):
                shown = [_text("Image A:"), _picture(one), _text("Image B:"), _picture(other)]
                asked.append(self._request([*shown, _text(self.pair_template.fill(prompt))]))
        found, reasons = torch.full((len(prompts), 2), torch.nan), {}
        for i, reply in enumerate(self.client.ask(asked)):
            try:
                if isinstance(reply, Exception):
                    raise reply
                answer = read_answer(reply)
                found[i // 2, i % 2] = 1 - answer if i % 2 else answer
            except (ValueError, OSError) as error:
                reasons[i // 2] = str(error)
        if reasons:
            raise Unscored(found, reasons)
        return found

    def prefer(self, first: Tensor, second: Tensor, prompts: Sequence[str]) -> Tensor:
        """The share of both orders in which `first` is better, float32 [B]: a judge that decides by position gives 1/2.

        Raises as `votes`. `label_probabilities` makes calibrated probabilities of the votes on many pairs.
        """
        return self.votes(first, second, prompts).mean(1)

    def _request(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        turn = {"role": "user", "content": content}
        return {"model": self.model, "messages": [turn], "temperature": 0, "max_tokens": self.max_tokens}

    def _urls(self, images: Tensor) -> list[str]:
        levels = (images.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
        return [_data_url(image, self.encoding) for image in levels]


def label_probabilities(votes: Tensor) -> Tensor:
    """Votes of a judge on N pairs in both orders, [N, 2] as `Judge.votes` -> the probability that the first image of
    each pair is better, float32 [N].

    Agreement of both orders is right with p q / (p q + (1 - p)(1 - q)), in the mean over `position_posterior`. Votes
    for one position say nothing: 1/2, whatever the bias. With a tie in one order the other vote is right with
    p / (p + 1 - q) if it prefers the first position, else with q / (q + 1 - p); two ties are 1/2. Few votes that never
    disagree give no certainty: one pair gives 5/6. Errors that both orders share (hard pairs) are not seen, so the
    probabilities are upper bounds. nan stays nan.
    """
    p, q, weight = position_posterior(votes)
    both = p * q
    agreed = (weight * both / (both + (1 - p) * (1 - q))).sum()
    right, other = (weight * p).sum(), (weight * q).sum()
    first, second = right / (right + 1 - other), other / (other + 1 - right)
    found = votes.double().mean(1) * 0 + 0.5  # nan stays nan
    decided = {(1, 1): agreed, (1, 0.5): first, (0.5, 1): second}  # the image shown first, then second
    decided |= {(0, 0): 1 - agreed, (0, 0.5): 1 - second, (0.5, 0): 1 - first}  # the other image
    for (x, y), probability in decided.items():
        found[(votes[:, 0] == x) & (votes[:, 1] == y)] = probability
    return found.float()


def position_accuracy(votes: Tensor) -> tuple[float, float]:
    """How often a judge is right when the better image is shown first, and when it is shown second: the means of
    `position_posterior`. Votes as in `label_probabilities`."""
    p, q, weight = position_posterior(votes)
    return float((weight * p).sum()), float((weight * q).sum())


def described(votes: Tensor) -> str:
    """What the votes on pairs [N, 2] say about their judge, in words; nan where there is no answer."""
    answered = votes[~votes.isnan().any(1)]
    position = int(((answered.sum(1) == 1) & (answered[:, 0] != 0.5)).sum())
    first, second = position_accuracy(answered)
    return (
        f"{len(answered)} of {len(votes)} pairs answered in both orders; in {position} of them only a position was "
        f"preferred. Estimated accuracy: {first:.1%} when the better image is shown first, {second:.1%} when second, "
        "if errors in both orders are independent."
    )


def position_posterior(votes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Votes [N, 2] -> values p and q of a judge's accuracy, float64 [G, G] in (0, 1), and their probabilities [G, G].

    A judge that is right with probability p when the better image is shown first and q when it is shown second,
    independently, votes twice for the first position with p (1 - q), twice for the second with (1 - p) q, and for one
    image with p q + (1 - p)(1 - q). So the counts of these give p and q without any label. Before the votes, all p and
    q with p + q >= 1 are equally likely: a judge is not worse than chance.
    """
    decided = votes[((votes == 0) | (votes == 1)).all(1)]
    position = decided[:, 0] - decided[:, 1]  # 1: twice the first position, -1: twice the second, 0: one image
    first, second, both = (int((position == k).sum()) for k in (1, -1, 0))
    place = torch.arange(GRID)
    p = ((place + 0.5) / GRID).double().expand(GRID, GRID).T
    q = p.T
    log = first * (p * (1 - q)).log() + second * ((1 - p) * q).log() + both * (p * q + (1 - p) * (1 - q)).log()
    sums = place[:, None] + place + 1
    weight = (log - log[sums >= GRID].max()).exp() * ((sums > GRID) + 0.5 * (sums == GRID))
    return p, q, weight / weight.sum()


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _data_url(image: Tensor, encoding: str) -> str:
    data = io.BytesIO()
    to_pil_image(image).save(data, encoding.upper(), **({"quality": JPEG_QUALITY} if encoding == "jpeg" else {}))
    return f"data:image/{encoding};base64,{base64.b64encode(data.getvalue()).decode()}"
