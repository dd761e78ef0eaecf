"""Leases of knobs, taken and given back for workflows. Every call may run twice: the ledger is idempotent by id."""

from temporalio import activity
from temporalio.exceptions import ApplicationError

from dataplane.ledger import LeaseRefusedError, Ledger
from domain.errors import ErrorKind
from domain.knobs import Lease, baseline_value, effective_value
from domain.messages import KnobState, KnobStates, ReadKnobs, ReleaseLeases, TakeLeases


class LeaseActivities:
    """The ledger in Redis. Redis away: the error is mapped to Unavailable and the step is tried again."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    @activity.defn
    def take_leases(self, request: TakeLeases) -> list[Lease]:
        """Take several leases at once, all or none; one that is already held is renewed."""
        try:
            return self._ledger.acquire(request.leases)
        except LeaseRefusedError as error:
            raise ApplicationError(str(error), type=ErrorKind.CONFLICT, non_retryable=True) from error

    @activity.defn
    def renew_leases(self, request: TakeLeases) -> list[str]:
        """Renew several leases, putting back what Redis lost; answers in words what was not simply renewed."""
        return [
            f"{result.lease_id}: {result.outcome}"
            for result in self._ledger.renew(request.leases)
            if result.outcome != "renewed"
        ]

    @activity.defn
    def release_leases(self, request: ReleaseLeases) -> None:
        """End leases; those that are gone already are a success."""
        self._ledger.release(request.lease_ids, request.holder, request.reason)

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
