"""Prompts beyond the token limit: one warning with their number, the limit and the first of them."""

import json
import logging
import warnings

import pytest
import torch
from PIL import Image

from diffalign.data import LatentCache
from diffalign.networks.loading import load_backbone
from diffalign.playground import BASE, FLOW
from reward_models import load_scorer
from reward_models.folder.cli import main
from reward_models.folder.report import longer_prompts

LONG = "small red circle on white, " * 30
SHORT = "small red circle on white"


@pytest.mark.parametrize("model", [BASE, FLOW])
def test_training_warns_once_about_truncated_prompts(tmp_path, caplog, capfd, model):
    backbone = load_backbone(torch.device("cpu"), path=str(model))
    limit = backbone.token_counts([])[0]
    longest = [LONG + "a", SHORT, LONG + LONG + LONG + "b"]
    for prompts in (longest, longest):  # with an empty cache, and with a full one
        caplog.clear()
        with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
            warnings.simplefilter("error")
            LatentCache(tmp_path, backbone, 32).add_prompts(prompts)
        (record,) = caplog.records
        said = record.getMessage()
        counts = backbone.token_counts(prompts)[1]
        longer = [p for p, n in zip(prompts, counts, strict=True) if n > limit]
        assert said.startswith(f"{len(longer)} of 3 prompts exceed the token limit of the text encoder") and longer
        assert f"the first: '{longer[0][:80]}...'" in said and f"tokens, {limit} are read)" in said
    assert "Token indices" not in capfd.readouterr().err


def test_no_warning_for_prompts_within_the_limit(tmp_path, caplog):
    LatentCache(tmp_path, load_backbone(torch.device("cpu"), path=str(BASE)), 32).add_prompts([SHORT, "a " * 9])
    assert not caplog.records


@pytest.mark.parametrize("name", ["playground_hps", "playground_vp_score"])
def test_scoring_warns_and_writes_the_count_to_the_meta_file(tmp_path, capsys, name):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "prompt": p} for p in (SHORT, LONG + "x", LONG + "x", LONG + "y")]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "s.csv"
    assert main([str(tmp_path / "list.jsonl"), "--scorer", name, "--out", str(out), "--device", "cpu"]) == 0
    limit = load_scorer(name, "cpu").token_counts([])[0]
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "longer" in x)
    assert line.startswith(f"reward-score: 2 of 3 prompts are longer than the {limit} tokens that '{name}' reads")
    found = json.loads((tmp_path / "s.csv.meta.json").read_text())["scorers"][name]["longer_prompts"]
    assert found == {"limit": limit, "count": 2, "of": 3, "first": LONG + "x"}
    (tmp_path / "list.jsonl").write_text(json.dumps(rows[0]))
    assert main([str(tmp_path / "list.jsonl"), "--scorer", name, "--out", str(out), "--device", "cpu"]) == 0
    assert "longer" not in capsys.readouterr().err
    assert json.loads((tmp_path / "s.csv.meta.json").read_text())["scorers"][name]["longer_prompts"] is None


def test_prompts_of_exactly_the_limit_are_not_truncated():
    """Ten more words are ten more tokens."""
    scorer = load_scorer("playground_hps", "cpu")
    limit, (n,) = scorer.token_counts(["red " * 10])
    words = limit - (n - 10)
    assert scorer.token_counts(["red " * words])[1] == [limit]
    assert longer_prompts(scorer, ["red " * words]) is None
    assert longer_prompts(scorer, ["red " * (words + 1)])["count"] == 1
    assert longer_prompts(object(), [LONG]) is None


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sdxl", "tiny_sd3"])
def test_chunks_of_a_long_prompt_are_encoded_one_by_one(request, family):
    """The tiny encoders read 10 words. 13 words are a chunk of 10 and one of 3, as two prompts of their own; the pooled
    embedding is that of the first. In SD3 the tokens of T5 follow.
    """
    path, cpu = str(request.getfixturevalue(family)), torch.device("cpu")
    short, long = load_backbone(cpu, path=path), load_backbone(cpu, path=path, prompt_chunks=2)
    words = ("red circle on white " * 4).split()[:13]  # without a, which is a token of its own for the second encoder
    expected = short.encode_text([" ".join(words[:10]), " ".join(words[10:])])
    found, empty = long.encode_text([" ".join(words)]), long.encode_text([""])
    first, second = expected.tokens[:, :12]
    torch.testing.assert_close(found.tokens[0, :24], torch.cat([first, second]))
    assert found.tokens.shape == empty.tokens.shape == (1, 12 + expected.tokens.shape[1], first.shape[1])
    if expected.pooled is not None:
        torch.testing.assert_close(found.pooled, expected.pooled[:1])
    x_t, t = torch.randn(1, *long.latent_shape(32)), long.schedule.at(torch.tensor([0.5]))
    with torch.no_grad():
        assert torch.isfinite(long.denoiser(x_t, t, found)).all()
    assert long.fingerprint != short.fingerprint
    if family != "tiny_sd3":  # whose T5 reads more
        assert (short.token_counts([" ".join(words)]), long.token_counts([])[0]) == ((12, [15]), 22)


def test_chunks_need_a_network_that_reads_clip(tiny_z_image, tiny_flux):
    """FLUX.1 reads the pooled embedding of CLIP alone, which is that of the first chunk."""
    for path in (tiny_z_image, tiny_flux):
        with pytest.raises(ValueError, match=r"'backbone\.prompt_chunks' = 2 is for CLIP.*max_sequence_length"):
            load_backbone(torch.device("cpu"), path=str(path), prompt_chunks=2)
