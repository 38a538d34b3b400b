"""Signals that ask a program to end: who hears them, and how a loop sees that one came."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

ENDING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def handled(signals: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Inside, `handler` hears the signals, but for those that this process was started to ignore (`nohup`, jobs in the
    background of a script). Outside the main thread nothing changes: Python handles signals there alone."""
    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.getsignal(s) for s in signals if main and signal.getsignal(s) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


class Interruption:
    """The first SIGTERM or SIGINT that came inside `caught()`. A second one ends the process at once.

    said  what to write to stderr when it comes; nothing when empty
    """

    def __init__(self, said: str = ""):
        self.said = said
        self.signum = 0  # of the signal; 0 as long as none came

    def caught(self) -> AbstractContextManager[None]:
        """Inside, the first signal is kept for whoever looks."""
        return handled(ENDING, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        for each in ENDING:
            signal.signal(each, signal.SIG_DFL)
        if self.said:  # unbuffered: print() may be what was interrupted
            os.write(2, f"\n{signal.Signals(signum).name}: {self.said}\n".encode())
