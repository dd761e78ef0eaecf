"""What can go wrong with a system we call, and what each kind deserves."""

from enum import StrEnum


class ErrorKind(StrEnum):
    """Carried as the type of Temporal's ApplicationError."""

    THROTTLED = "Throttled"
    """Too many calls: tried again, by the step's own back-off."""
    UNAVAILABLE = "Unavailable"
    """Away, slow or failing on its own: tried again."""
    ACCESS_DENIED = "AccessDenied"
    """A permission is missing: not tried again; the message has the statement to add."""
    QUOTA_EXCEEDED = "QuotaExceeded"
    """Not tried again: only AWS Support can help."""
    NOT_FOUND = "NotFound"
    CONFLICT = "Conflict"
    INVALID = "Invalid"
    """A call that can never work: not tried again."""
    UNKNOWN = "Unknown"


RETRYABLE = frozenset({ErrorKind.THROTTLED, ErrorKind.UNAVAILABLE, ErrorKind.UNKNOWN})
