"""What every knob is at now, who holds it, and what happened to it: read from the ledger, for whoever presents it."""

from datetime import UTC, datetime, timedelta

from dataplane.ledger import Ledger
from dataplane.ledger_scripts import AUDIT_ENTRIES
from domain.knobs import AuditEntry, KnobName, baseline_value, effective_value
from domain.messages import KnobState
from domain.policy import Policy


class KnobView(KnobState):
    """One knob now, and what may be done with it."""

    meaning: str
    unit: str
    merge: str
    """Which value holds while several leases ask for different ones."""
    allowed: str
    """What may be asked for; of a knob by intent or feature for each of them."""
    by: str | None
    """`intent` or `feature`, where values are maps with one value for each."""
    needed_role: str
    needs_approval: bool


def knobs_now(ledger: Ledger, policy: Policy) -> list[KnobView]:
    """Every knob at one moment. Redis's errors pass."""
    leases, baseline = ledger.leases().leases, policy.baseline
    return [
        KnobView(
            knob=knob,
            value=effective_value(knob, leases, baseline),
            baseline=baseline_value(knob, baseline),
            leases=[lease for lease in leases if lease.knob is knob],
            meaning=knob.spec.meaning,
            unit=knob.spec.unit,
            merge=knob.spec.merge.name,
            allowed=knob.spec.kind.allowed(knob.spec.unit, baseline.model_ranks),
            by=knob.spec.by,
            needed_role=knob.spec.role,
            needs_approval=knob.spec.needs_approval,
        )
        for knob in KnobName
    ]


def knob_history(ledger: Ledger, knob: KnobName, within: timedelta, limit: int) -> list[AuditEntry]:
    """The newest `limit` changes of one knob's leases `within` so long, oldest first. Redis's errors pass."""
    ledger.sweep()
    entries = ledger.history(datetime.now(UTC) - within, AUDIT_ENTRIES)
    return [entry for entry in entries if entry.knob is knob][-limit:]
