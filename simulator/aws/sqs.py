"""SQS: one message wakes one poller, and a poller that has gone away takes none with it.

In moto two pollers that wait on one queue both receive the message that wakes them, and a long poll goes on, and
receives, after its client was killed. A long queue is slow there.
"""

import socket
import threading
import time
from datetime import datetime
from typing import Any

from moto.core.responses import ActionResult
from moto.sqs import models, urls
from moto.sqs.responses import SQSResponse

from simulator.aws.world import ENVIRON_KEY

_receiving = threading.Lock()
"""Held while messages are taken, never while waiting for one."""
_MAX_WAIT_SECONDS = 20
_LOOK_EVERY_SECONDS = 1


class OneReceiverResponse(SQSResponse):
    """moto's SQS with receiving made atomic."""

    def receive_message(self) -> ActionResult:
        """As moto's; the waiting is done here, between takes."""
        queue: Any = self.sqs_backend.get_queue(self._get_queue_name())
        asked: Any = self._get_param("WaitTimeSeconds")
        wait = float(queue.receive_message_wait_time_seconds or 0) if asked is None else float(asked)
        if not 0 <= wait <= _MAX_WAIT_SECONDS:
            return super().receive_message()
        self.params["WaitTimeSeconds"] = 0
        deadline = time.monotonic() + wait
        while True:
            with _receiving:
                answer = super().receive_message()
            left = deadline - time.monotonic()
            if answer.result or left <= 0:
                return answer
            queue.wait_for_messages(min(_LOOK_EVERY_SECONDS, left))
            if self._nobody_waits():
                raise ConnectionAbortedError("the poller has gone away")

    def _nobody_waits(self) -> bool:
        environ = self.normalized_request.environ
        connection: socket.socket = environ["werkzeug.socket"]
        if environ[ENVIRON_KEY].stopping.is_set():
            return True
        try:
            return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False


def _unix_time_millis(dt: datetime | None = None) -> float:
    """moto's goes by way of two datetimes, for each message of the queue at each message sent."""
    return (time.time() if dt is None else dt.timestamp()) * 1000


def install() -> None:
    """Put it in moto's place. Before the server starts."""
    models.unix_time_millis = _unix_time_millis  # type: ignore[attr-defined]
    for path in urls.url_paths:
        urls.url_paths[path] = OneReceiverResponse.dispatch
