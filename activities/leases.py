"""Leases of knobs, taken and given back for workflows. Every call may run twice: the ledger is idempotent by id."""

from datetime import UTC, datetime, timedelta

from temporalio import activity
from temporalio.exceptions import ApplicationError

from dataplane.ledger import LeaseRefusedError, Ledger
from domain.errors import ErrorKind
from domain.knobs import Lease, LeaseRequest, Refusal, baseline_value, effective_value
from domain.messages import KnobState, KnobStates, ReadKnobs, ReleaseLeases, TakeLeases


class LeaseActivities:
    """The ledger in Redis. Redis away: the error is mapped to Unavailable and the step is tried again."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @activity.defn
    def take_leases(self, request: TakeLeases) -> list[Lease]:
        """Take several leases at once, all or none; one that is already held is renewed."""
        leases = within(request)
        try:
            return self._ledger.acquire(leases)
        except LeaseRefusedError as error:
            raise ApplicationError(str(error), type=ErrorKind.CONFLICT, non_retryable=True) from error

    @activity.defn
    def renew_leases(self, request: TakeLeases) -> list[str]:
        """Renew several leases, putting back what Redis lost; answers in words what was not simply renewed."""
        return [
            f"{result.lease_id}: {result.outcome}"
            for result in self._ledger.renew(within(request))
            if result.outcome != "renewed"
        ]

    @activity.defn
    def release_leases(self, request: ReleaseLeases) -> None:
        """End leases; those that are gone already are a success."""
        self._ledger.release(request.lease_ids, request.holder, request.reason)

    @activity.defn
    def record_refusal(self, refusal: Refusal) -> None:
        """Put on record that somebody tried what they may not."""
        self._ledger.record_refusal(refusal)

    @activity.defn
    def read_knobs(self, request: ReadKnobs) -> KnobStates:
        """The value in force of each knob, its baseline and who holds it."""
        view = self._ledger.leases()
        return KnobStates(
            knobs=[
                KnobState(
                    knob=knob,
                    value=effective_value(knob, view.leases, request.baseline),
                    baseline=baseline_value(knob, request.baseline),
                    leases=[lease for lease in view.leases if lease.knob is knob],
                )
                for knob in request.knobs
            ],
            epoch=view.epoch,
        )


def within(request: TakeLeases) -> list[LeaseRequest]:
    """The leases, none of them longer than what is left until the stated end.

    Raises:
        ApplicationError: Conflict, when nothing is left.
    """
    if request.until is None:
        return request.leases
    left_ms = round((request.until - datetime.now(UTC)) / timedelta(milliseconds=1))
    if left_ms <= 0:
        raise ApplicationError(
            f"its end, {request.until.isoformat()}, has passed", type=ErrorKind.CONFLICT, non_retryable=True
        )
    return [lease.model_copy(update={"duration_ms": min(lease.duration_ms, left_ms)}) for lease in request.leases]
