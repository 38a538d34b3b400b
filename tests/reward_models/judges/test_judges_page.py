"""Every command and the code of docs/judges.md run, with a stand-in for the server and a tiny model."""

from __future__ import annotations

import os
import re
import shlex
import threading
from pathlib import Path
from typing import Any

import pytest
import stand_in
import tiny_vlm
from PIL import Image

from reward_models.folder import cli
from reward_models.folder.serve import Server

PAGE = (Path(__file__).parents[3] / "docs" / "judges.md").read_text()


def _answer(images: list[Any], texts: list[str]) -> str:
    return "Answer: A" if len(images) == 2 else "Match: 7\nColours: 4\nScore: 4"


def test_every_command_and_the_code_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    tiny_vlm.save("qwen3_vl", tmp_path / "my-model")
    (tmp_path / "images").mkdir()
    for k in range(2):
        Image.new("RGB", (32, 32), (90 * k, 9, 9)).save(tmp_path / f"images/{k}.png")
        (tmp_path / f"images/{k}.txt").write_text("large red circle on white")
    (question,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "rubric.txt").write_text(question)
    with stand_in.judge(_answer) as server:
        page = PAGE.replace("http://127.0.0.1:8000/v1", server.url)
        served: Any = None
        lines = [x for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for x in block.splitlines()]
        for line in lines:
            words = shlex.split(os.path.expandvars(line))
            if words[1:2] == ["serve"]:
                served = _serve([*words[1:-1], "0"])
                continue
            words = [word.replace("http://127.0.0.1:8001/v1", served.url) if served else word for word in words]
            if words[0] == "export" or "=" in words[0]:
                monkeypatch.setenv(*words[-1].split("=", 1))
            else:
                # A random model writes no numbers: every image is a failure, listed with the reply.
                assert cli.main(words[1:]) == (2 if "rubric,model" in " ".join(words) else 0), words
        made: dict[str, Any] = {}
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        exec(code.replace('my-model"', 'my-model,template=rubric.txt"'), made)
    served.shutdown()
    served.server_close()
    assert made["votes"].tolist() == [[1, 0]] * 4 and made["probability"].tolist() == [0.5] * 4
    scores = [(tmp_path / f"{name}.csv").read_text().splitlines()[1].split(",")[-1] for name in ("judged", "priced")]
    assert scores == ["5.5", "4.0"]
    assert re.search(r"judge my-model: 2 answers, .* tries, 2000 \+ 20 tokens, cost 3e-05", capsys.readouterr().out)


def _serve(words: list[str]) -> Server:
    """The server that the command starts; it goes on in a thread."""
    started: list[Server] = []
    context = pytest.MonkeyPatch()
    context.setattr(Server, "serve_forever", lambda self: started.append(self))
    context.setattr(Server, "server_close", lambda self: None)
    assert cli.main(words) == 0
    context.undo()
    threading.Thread(target=started[0].serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    return started[0]
