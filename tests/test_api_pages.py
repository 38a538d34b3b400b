"""The API pages are built from the docstrings, one per module, without warnings."""

from __future__ import annotations

from pathlib import Path

import forks as forking

import reward_models

ROOT = Path(__file__).parent.parent
BUILD = (
    "import runpy, sys; script = sys.argv[1]; sys.argv[:] = sys.argv[1:]; runpy.run_path(script, run_name='__main__')"
)


def test_every_module_has_a_page(forks: forking.Server, tmp_path: Path) -> None:
    done = forks.run(BUILD, str(ROOT / "docs" / "build_api.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    for package in ("diffalign", "reward_models"):
        for file in (ROOT / package).rglob("*.py"):
            if file.stem != "__main__":
                page = file.parent if file.stem == "__init__" else file
                assert tmp_path.joinpath(page.relative_to(ROOT)).with_suffix(".html").stat().st_size > 0, page
    assert "PreferencePairs" in (tmp_path / "diffalign/data/pairs.html").read_text()


def test_what_warns_fails(forks: forking.Server, tmp_path: Path) -> None:
    """A type that does not resolve, in a separate package."""
    (tmp_path / "faulty").mkdir()
    (tmp_path / "faulty" / "__init__.py").write_text("def f(x: 'Nowhere') -> None:\n    '''Do nothing.'''\n")
    code = BUILD.replace("; runpy.run_path(", "; script = runpy.run_path(").replace(", run_name='__main__')", ")")
    code += "; script['build'].__globals__['PACKAGES'] = ('faulty',); from pathlib import Path"
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}; script['build'](Path({str(tmp_path / 'out')!r}))"
    )
    done = forks.run(code, str(ROOT / "docs" / "build_api.py"))
    assert done.returncode == 1 and "Nowhere" in done.stderr


def test_every_public_name_of_reward_models_resolves() -> None:
    for name in reward_models.__all__:
        assert getattr(reward_models, name).__doc__, name
