"""An image with its prompt, and where the encoded image is."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Protocol

from reward_models.files import read_file


class Source(Protocol):
    """Anything that gives an encoded image."""

    def read(self) -> bytes:
        """The bytes. Raises OSError, or FileNotFoundError if there is no such image."""


class Item(NamedTuple):
    """One image with its prompt. Repeated items are scored again and get their own rows."""

    image: str  # name in the table, relative to the folder
    prompt: str
    source: Path | bytes | Source  # where the encoded image is
    fault: str = ""  # reason why it cannot be scored, if known before reading

    def read(self) -> bytes:
        """The encoded image. Raises OSError."""
        if isinstance(self.source, bytes):
            return self.source
        return read_file(self.source) if isinstance(self.source, Path) else self.source.read()
