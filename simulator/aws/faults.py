"""Faults on demand: AWS refuses, breaks, hangs, or does what was asked and never says so."""

import threading
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


class FaultKind(StrEnum):
    """What goes wrong."""

    THROTTLING = "throttling"
    """Refused with ThrottlingException; nothing is done."""
    ACCESS_DENIED = "access_denied"
    """Refused with AWS's sentence that names the missing permission; nothing is done."""
    NOT_FOUND = "not_found"
    """Refused with ResourceNotFoundException; nothing is done."""
    TIMEOUT = "timeout"
    """No answer for `delay_ms`, then the connection is dropped; nothing is done."""
    SERVER_ERROR = "server_error"
    """500; nothing is done."""
    LOST_ANSWER = "lost_answer"
    """The operation is done, and the connection is dropped instead of an answer."""


class Fault(BaseModel):
    """Which calls go wrong, how, and how often. Body of `POST /_simulator/faults`."""

    model_config = ConfigDict(extra="forbid")

    service: str
    """boto3's name, e.g. `bedrock`, `dynamodb`."""
    operation: str | None = None
    """E.g. `CreateProvisionedModelThroughput`; every operation of the service when absent."""
    kind: FaultKind
    count: int | None = Field(default=1, ge=1)
    """Calls that fail; without end when null."""
    after: int = Field(default=0, ge=0)
    """Calls let through first."""
    delay_ms: float = Field(default=0, ge=0)
    """Real time before the fault shows."""


class Faults:
    """The faults in force, first come first served. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """From the next call on."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self._faults = []

    def pending(self) -> list[Fault]:
        """What is still in force, with the counts that are left."""
        with self._lock:
            return [fault.model_copy() for fault in self._faults]

    def take(self, service: str, operation: str) -> Fault | None:
        """The fault that this call suffers, if any; counts it."""
        if not self._faults:
            return None
        with self._lock:
            for fault in self._faults:
                if fault.service != service or fault.operation not in (None, operation):
                    continue
                if fault.after > 0:
                    fault.after -= 1
                    continue
                if fault.count is not None:
                    fault.count -= 1
                    if fault.count == 0:
                        self._faults.remove(fault)
                return fault
        return None
