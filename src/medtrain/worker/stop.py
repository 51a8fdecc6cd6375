"""A request to stop, noticed from the first moment on: imports nothing that takes time."""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopFlag:
    """Whether someone asked this process to stop. A second request ends it at once."""

    def __init__(self) -> None:
        self.signum = 0
        self.raises = False
        """Whether the request interrupts what is being done, instead of waiting to be asked."""

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self.signum != 0

    def listen(self) -> None:
        """Take over the stop signals."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, self.note)

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Handle a stop signal."""
        if self.signum:
            os._exit(200)
        self.signum = signum
        if self.raises:
            raise StopRequested

    def interrupt(self) -> None:
        """From now on a request interrupts; one that came before does so at once."""
        self.raises = True
        if self.signum:
            raise StopRequested


class StopRequested(BaseException):
    """The parent was asked to stop before or after its ranks ran."""


STOP = StopFlag()
