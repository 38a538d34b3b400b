"""Fixtures shared by several test files."""

from __future__ import annotations

import os

# Set before torch loads: two threads each in a few test processes slow each other more than they help.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
