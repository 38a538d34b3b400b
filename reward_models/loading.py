"""`name[,key=value,...]` -> a scorer. A new one is a class and a row in SCORERS."""

from __future__ import annotations

import inspect
import types
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    import torch

    from reward_models.protocol import Scorer

SCORERS = {
    "clip": "reward_models.clip_scorers:CLIPScore",
}
"""Name -> `package.module:Class`. The class's keyword-only constructor parameters are what the name can be given."""


def load_scorer(spec: str, device: str | torch.device = "auto") -> Scorer:
    """A scorer, frozen, in eval mode and on the device.

    spec    a name of SCORERS or `package.module:Class`, and settings: `clip,model=ViT-L-14,pretrained=openai`
    device  `auto` is a GPU if there is one, else the CPU

    Raises ValueError for unknown names, keys, values and devices, with the nearest known one, and what the scorer
    raises.
    """
    import torch  # not above: `reward-score --help` lists SCORERS and must not wait for it

    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda, cuda:1, ...; got '{device}'") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device} asks for a GPU, but torch sees none here; use cpu")
    name, _, settings = spec.partition(",")
    build = _find(name)
    scorer: Any = build(**_settings(spec, settings, build))
    missing = [part for part in ("differentiable", "unit", "score") if not hasattr(scorer, part)]
    if missing:
        raise ValueError(f"'{name}' is no scorer: it has no attribute {', '.join(missing)}")
    if isinstance(scorer, torch.nn.Module):
        scorer.to(where).eval().requires_grad_(False)
    return scorer


def _find(name: str) -> Any:
    """The class behind a name."""
    module_name, colon, attribute = SCORERS.get(name, name).partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(
            f"no scorer '{name}'{_nearest(name, SCORERS)}; known: {', '.join(SCORERS)}, or your own "
            "package.module:Class"
        )
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it imports is not
        raise ValueError(f"scorer '{name}': no module '{module_name}'; is its folder on PYTHONPATH?") from error
    if not hasattr(module, attribute):
        raise ValueError(f"scorer '{name}': '{module_name}' has no {attribute}{_nearest(attribute, vars(module))}")
    return getattr(module, attribute)


def _settings(spec: str, settings: str, build: Any) -> dict[str, Any]:
    """The text `key=value,...` as keyword arguments, typed as the constructor says."""
    parameters = inspect.signature(build).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    hints = get_type_hints(build.__init__ if inspect.isclass(build) else build)
    values: dict[str, Any] = {}
    for part in filter(None, settings.split(",")):
        key, equals, text = part.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"scorer '{spec}': no setting '{key}'{_nearest(key, known)}; "
                + (f"known: {', '.join(known)}" if known else "this scorer takes none")
            )
        values[key] = _typed(f"scorer '{spec}': '{key}'", text, hints.get(key, str))
    return values


def _typed(where: str, text: str, hint: Any) -> Any:
    """The text as a value of the type. Raises ValueError."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in choices and text == "none":
            return None
        return _typed(where, text, next(x for x in choices if x is not type(None)))
    if origin is Literal or hint is bool:
        values = {str(x): x for x in choices} or {"true": True, "false": False}
        if text not in values:
            raise ValueError(f"{where} must be one of {', '.join(values)}; got '{text}'")
        return values[text]
    if hint not in (int, float, str):
        raise ValueError(f"{where} can be set from Python only: it is a {hint}")
    try:
        return hint(text)
    except ValueError as error:
        raise ValueError(f"{where} must be {hint.__name__}; got '{text}'") from error


def _nearest(word: str, known: Any) -> str:
    close = get_close_matches(word, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""
