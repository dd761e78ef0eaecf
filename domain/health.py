"""The health check (S4, prevention; every 15 minutes): what it reads, what it finds, and how that is told. Pure."""

from datetime import datetime, timedelta
from enum import StrEnum

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from domain.alarm_rules import IncidentTarget
from domain.alarms import AlarmChange, AlarmState
from domain.capacity import ProvisionedModel
from domain.incident import utc
from domain.messages import CapacityState, Message, PolicySnapshot
from domain.permissions import PermissionFinding
from domain.policy import RepairKind

HEALTH_CHECK_WORKFLOW = "HealthCheckWorkflow"
HEALTH_SCHEDULE = "health-check"
ALARM_NAME = "health-check "
"""With the finding's id: the name under which a finding is an alarm of its incident."""


class Area(StrEnum):
    """What a finding is about."""

    CAPACITY = "capacity"
    ROUTES = "routes"
    QUOTA = "quota"
    ORPHANS = "orphans"
    SCHEDULES = "schedules"
    PERMISSIONS = "permissions"
    READING = "reading"
    """A system could not be read, so nothing is known of what it holds."""


class Severity(StrEnum):
    """How bad it is."""

    NOTICE = "notice"
    """Meant so by somebody; shown, and no incident's."""
    WARNING = "warning"
    CRITICAL = "critical"
    """Users feel it, or soon will."""


class Source(StrEnum):
    """A system that is read, apart from the others."""

    BEDROCK = "Bedrock"
    WRITERS = "the capacity workflows"
    REDIS = "Redis"
    SCHEDULES = "Temporal's schedules"
    PERMISSIONS = "IAM"


NEEDS: dict[Area, tuple[Source, ...]] = {
    Area.CAPACITY: (Source.BEDROCK, Source.WRITERS),
    Area.ROUTES: (Source.BEDROCK, Source.WRITERS, Source.REDIS),
    Area.QUOTA: (Source.WRITERS,),
    Area.ORPHANS: (Source.BEDROCK, Source.WRITERS),
    Area.SCHEDULES: (Source.SCHEDULES,),
    Area.PERMISSIONS: (Source.PERMISSIONS,),
}
"""What an area cannot be judged without."""


# ---------------------------------------------------------------- facts


class FoundModel(ProvisionedModel):
    """A provisioned model, and whose it is."""

    model: str | None
    """The policy's name of its base model; None: the policy has none."""
    base_model_id: str


class Writer(Message):
    """The workflow that writes one model's capacity."""

    running: bool
    state: CapacityState | None = None
    """None: there is no such workflow, or it does not answer."""
    unanswered: str = ""
    """Why it does not answer."""


class ScheduleSeen(Message):
    """One schedule that should be there."""

    schedule_id: str
    every: timedelta
    exists: bool
    as_wanted: bool = True
    """It says what the policy says."""
    paused: str | None = None
    """The note of whoever paused it; None: it is not paused."""
    changed_at: AwareDatetime | None = None
    """Made, or last changed."""
    last_run_at: AwareDatetime | None = None
    runs: tuple[str, ...] = ()
    """How the last runs ended (`completed`, `failed`, `timed_out`, ... or `running`), oldest first."""


class Facts(Message):
    """Everything that the check has read."""

    now: AwareDatetime
    fleet: tuple[FoundModel, ...] = ()
    writers: dict[str, Writer] = Field(default_factory=dict)
    """By model."""
    routes: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Published routes by model: ARN to units."""
    schedules: tuple[ScheduleSeen, ...] = ()
    permissions: tuple[PermissionFinding, ...] = ()
    """Of our own role; those that are denied."""
    unread: dict[Source, str] = Field(default_factory=dict)
    """What could not be read, and why; the fields above are empty then."""


# ---------------------------------------------------------------- findings


class Repair(BaseModel):
    """What the check does itself."""

    model_config = ConfigDict(frozen=True)

    kind: RepairKind
    about: str
    """A model, an ARN, a schedule's id."""


class Finding(BaseModel):
    """Something that is not as it should be."""

    model_config = ConfigDict(frozen=True)

    finding_id: str
    """The same for as long as it stands, e.g. `capacity-short:sonnet`."""
    area: Area
    model: str | None = None
    severity: Severity
    what: str
    why: str
    """Why it matters."""
    do: str
    """What to do, with the command."""
    since: AwareDatetime
    """When a check first found it."""
    repair: Repair | None = None
    """Allowed by the policy, and to be done now."""
    repaired: str = ""
    """What the repair did; empty: there was none, or it failed."""
    repair_error: str = ""
    """Why the repair failed."""
    may_pass: bool = False
    """By itself: told only if it still stands at the next check."""
    incident: str | None = None
    """Key of the incident that was told."""

    @property
    def incident_key(self) -> str:
        """The incident it belongs to: what is broken."""
        if self.area in (Area.SCHEDULES, Area.PERMISSIONS, Area.READING):
            return f"control-health:{self.area}"
        return f"capacity-health:{self.model or self.area}"

    def news(self, state: AlarmState, at: datetime) -> "TellIncident":
        """The finding as its incident is told of it: an alarm that went on, or that is OK again."""
        return TellIncident(
            target=IncidentTarget(key=self.incident_key, runbook=None, model=self.model),
            change=AlarmChange(
                alarm_name=f"{ALARM_NAME}{self.finding_id}",
                state=state,
                reason=f"{self.what} {self.do}" if state is AlarmState.ALARM else f"over: {self.what}",
                changed_at=at,
                source="health-check",
                message_id=f"{self.finding_id}@{at.isoformat()}",
            ),
        )


class HealthReport(Message):
    """What a check found and did; the next check begins from it."""

    checked_at: AwareDatetime
    findings: tuple[Finding, ...] = ()
    over: tuple[Finding, ...] = ()
    """Told to an incident by a check before, and gone now."""
    to_tell: tuple[str, ...] = ()
    """Ids of the findings that an incident is to be told of now."""
    failed_provisioning: dict[str, int] = Field(default_factory=dict)
    """By model: provisioned models that AWS failed to create, and orders that it refused."""
    checked: tuple[Area, ...] = ()
    """Areas that could be judged."""

    @property
    def open(self) -> list[Finding]:
        """What is still wrong as far as is known, the worst first."""
        worst_first = list(Severity)[::-1]
        return sorted(
            (finding for finding in self.findings if not finding.repaired or finding.incident),
            key=lambda finding: (worst_first.index(finding.severity), finding.finding_id),
        )


class TellIncident(Message):
    """Asks to start or join an incident with a finding, or to tell it that the finding is over."""

    target: IncidentTarget
    change: AlarmChange


class HealthMetrics(Message):
    """What the check publishes."""

    at: AwareDatetime
    failed_provisioning: dict[str, int]
    """By model."""


class JudgeHealth(Message):
    """Asks for the judgement."""

    facts: Facts
    snapshot: PolicySnapshot
    before: HealthReport | None = None


# ---------------------------------------------------------------- words


def details(report: HealthReport) -> str:
    """The report as Markdown, for the Temporal UI."""
    lines = [
        f"# {headline(report)}",
        "",
        f"Checked {utc(report.checked_at)}: {', '.join(report.checked) or 'nothing'}.",
    ]
    for finding in report.open:
        lines += ["", f"## {_line(finding.severity)}: {_line(finding.what)}", "", f"{_line(finding.why)}", ""]
        lines += [f"- **Do**: {_line(finding.do)}", f"- **Since**: {utc(finding.since)}"]
        lines += [f"- **Told**: incident `{finding.incident}`"] if finding.incident else []
        lines += [f"- **Repair failed**: {_line(finding.repair_error)}"] if finding.repair_error else []
    done = [finding for finding in report.findings if finding not in report.open]
    lines += ["", "## Repaired", ""] if done else []
    lines += [f"- {_line(finding.what)} {_line(finding.repaired)}" for finding in done]
    return "\n".join(lines)


def headline(report: HealthReport) -> str:
    """The result in one line."""
    if not report.open:
        return "Healthy" if len(report.checked) == len(NEEDS) else "Nothing wrong found, not everything could be read"
    counts = [(severity, sum(finding.severity is severity for finding in report.open)) for severity in Severity]
    return f"{len(report.open)} open: " + ", ".join(f"{count} {severity}" for severity, count in counts[::-1] if count)


def _line(text: str) -> str:
    """`text` from anywhere on one inert line of Markdown."""
    return " ".join(text.split()).replace("<", "&lt;").replace("`", "'")
