"""Small objects on their way to the run directory, written by one thread."""

from __future__ import annotations

import logging
import threading
import time

from medtrain.errors import StorageError
from medtrain.storage.uri import Store

log = logging.getLogger(__name__)

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0


class Uploads:
    """Writes objects in the order given while training goes on; keeps them while the store is away.

    A newer object of the same key replaces one that still waits.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._is_closing = False
        self._is_away = False
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def put(self, key: str, data: bytes) -> None:
        """Write `data` at `key`, soon."""
        with self._changed:
            self._waiting[key] = data
            self._changed.notify_all()

    def settle(self, *, timeout_s: float) -> bool:
        """Wait until nothing is waiting; False after `timeout_s`, or at once while the store is
        away."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting or self._is_away, timeout_s)
            return not self._waiting

    def close(self, *, timeout_s: float) -> None:
        """Try until everything is written.

        Raises:
            StorageError: Something is left after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, deadline - time.monotonic())
            left = sorted(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        if left:
            raise StorageError(
                f"{self._store.uri} must take {len(left)} files of metrics, but does not answer in "
                f"time: {', '.join(left[:3])}{' …' if len(left) > 3 else ''}"
            )

    def _run(self) -> None:
        pause_s = _SHORTEST_PAUSE_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    return
                key, data = next(iter(self._waiting.items()))
            try:
                self._store.write(key, data)
            except (StorageError, OSError) as error:
                if not self._is_away:
                    log.warning("metrics wait on the local disk until storage is back: %s", error)
                with self._changed:
                    self._is_away = True
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._is_closing, pause_s)
                if self._is_closing:
                    time.sleep(_SHORTEST_PAUSE_S)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            if self._is_away:
                log.info("storage is back; metrics are stored again")
            pause_s = _SHORTEST_PAUSE_S
            with self._changed:
                self._is_away = False
                if self._waiting.get(key) is data:
                    del self._waiting[key]
                self._changed.notify_all()
