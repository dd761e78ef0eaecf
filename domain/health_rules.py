"""The health check's rules: is what stands what should stand? Pure.

`judge` compares facts that activities have read: the fleet, the capacity workflows, the published routes, schedules,
permissions. Each finding says what is wrong, why it matters and what to do. What the policy allows is repaired first
and told to people only if it stands at the next check; everything else goes to an incident at once, and is told once
for as long as it stands. What could not be read is never taken for well, nor for over.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta

from domain.capacity import Situation, StepKind
from domain.health import NEEDS, Area, Facts, Finding, FoundModel, HealthReport, Repair, ScheduleSeen, Severity, Writer
from domain.incident import cut, span, utc
from domain.messages import AT_REST, CapacityState, PolicySnapshot
from domain.planner import plan
from domain.policy import HealthPolicy, ModelPolicy, RepairKind
from domain.wishes import wanted_at

MAX_TEXT = 600
"""Characters of another system's words that a finding repeats."""
_SLACK = timedelta(seconds=30)
"""Technical: what a loaded server may be late."""


def judge(facts: Facts, snapshot: PolicySnapshot, before: HealthReport | None = None) -> HealthReport:
    """Every finding in `facts`, which of them to repair, which to tell to an incident, and which are over."""
    known = {finding.finding_id: finding for finding in before.findings} if before else {}
    judged = [area for area, needs in NEEDS.items() if not facts.unread.keys() & set(needs)]
    look = _Look(facts, snapshot)
    found = [finding for area in judged for finding in look.findings(area)]
    found += _unread(facts)
    current = {finding.finding_id: _continued(finding, known.get(finding.finding_id), snapshot) for finding in found}
    # Not judged: it stands until somebody can look.
    kept = {
        finding_id: finding.model_copy(update={"repair": None, "repaired": "", "repair_error": ""})
        for finding_id, finding in known.items()
        if finding.area not in (*judged, Area.READING)
    }
    findings = tuple((kept | current).values())
    return HealthReport(
        checked_at=facts.now,
        findings=findings,
        over=tuple(
            finding for finding_id, finding in known.items() if finding.incident and finding_id not in kept | current
        ),
        to_tell=tuple(
            finding.finding_id for finding in findings if _must_be_told(finding, known.get(finding.finding_id))
        ),
        failed_provisioning=look.failed_provisioning() if Area.CAPACITY in judged else {},
        checked=tuple(judged),
    )


def _continued(finding: Finding, before: Finding | None, snapshot: PolicySnapshot) -> Finding:
    policy = snapshot.policy.health
    since = before.since if before else finding.since
    repair = finding.repair
    if repair is not None and not _may_repair(repair, since, finding.since, policy):
        repair = None
    return finding.model_copy(
        update={"since": since, "repair": repair, "incident": before.incident if before else None}
    )


def _may_repair(repair: Repair, since: datetime, now: datetime, policy: HealthPolicy) -> bool:
    if repair.kind not in policy.repairs:
        return False
    return repair.kind != "delete-orphan" or now - since >= policy.delete_orphans_after


def _must_be_told(finding: Finding, before: Finding | None) -> bool:
    """Once. What is repaired, or may pass by itself, only when it still stands at the next check."""
    if finding.incident is not None or finding.severity is Severity.NOTICE:
        return False
    return before is not None or (finding.repair is None and not finding.may_pass)


def _unread(facts: Facts) -> Iterator[Finding]:
    for source, why in facts.unread.items():
        areas = ", ".join(area for area, needs in NEEDS.items() if source in needs)
        yield Finding(
            finding_id=f"unread:{source.name.lower()}",
            area=Area.READING,
            severity=Severity.WARNING,
            what=f"{source} could not be read: {cut(why, MAX_TEXT)}.",
            why=f"Nothing is known of {areas} until it can be read again.",
            do="Mend what the message says, then: runbooks health --now",
            since=facts.now,
            may_pass=True,
        )


class _Look:
    """The rules, one method for each area."""

    def __init__(self, facts: Facts, snapshot: PolicySnapshot) -> None:
        self.facts = facts
        self.now = facts.now
        self.snapshot = snapshot
        self.policy = snapshot.policy
        self.health = snapshot.policy.health

    def findings(self, area: Area) -> Iterator[Finding]:
        rules: Mapping[Area, Callable[[], Iterator[Finding]]] = {
            Area.CAPACITY: lambda: self._each_model(self._capacity),
            Area.ROUTES: lambda: self._each_model(self._routes),
            Area.QUOTA: lambda: self._each_model(self._quota),
            Area.ORPHANS: self._orphans,
            Area.SCHEDULES: self._schedules,
            Area.PERMISSIONS: self._permissions,
        }
        return rules[area]()

    def _each_model(self, rule: Callable[[str, ModelPolicy], Iterator[Finding]]) -> Iterator[Finding]:
        for name, spec in self.policy.models.items():
            yield from rule(name, spec)

    def _finding(
        self,
        finding_id: str,
        area: Area,
        severity: Severity,
        what: str,
        why: str,
        do: str,
        *,
        model: str | None = None,
        repair: tuple[RepairKind, str] | None = None,
        may_pass: bool = False,
    ) -> Finding:
        return Finding(
            finding_id=finding_id,
            area=area,
            model=model,
            severity=severity,
            what=what,
            why=why,
            do=do,
            since=self.now,
            repair=Repair(kind=repair[0], about=repair[1]) if repair else None,
            may_pass=may_pass,
        )

    def _fleet(self, model: str) -> list[FoundModel]:
        return [found for found in self.facts.fleet if found.model == model]

    def _state(self, model: str) -> CapacityState:
        writer = self.facts.writers.get(model)
        return (writer and writer.state) or CapacityState(model=model)

    def _wanted(self, model: str, spec: ModelPolicy) -> int:
        """Units that timetable and demands want in service now, within floor, ceiling and quota. Reckoned here once
        more, as the plan of a writer that hangs is an old one."""
        demands = self._state(model).demands
        return spec.clamped(wanted_at(self.policy, model, self.snapshot.clock, demands, self.now))

    # ------------------------------------------------------------ capacity

    def failed_provisioning(self) -> dict[str, int]:
        """By model: creations that AWS failed, and the orders it has not answered or has refused."""
        return {
            name: sum(found.status == "Failed" and found.ours for found in self._fleet(name))
            + bool(self._state(name).last_error)
            for name in self.policy.models
        }

    def _capacity(self, model: str, spec: ModelPolicy) -> Iterator[Finding]:
        writer = self.facts.writers.get(model)
        if writer is not None and writer.unanswered:
            yield self._finding(
                f"capacity-writer:{model}",
                Area.CAPACITY,
                Severity.CRITICAL,
                f"The capacity workflow of {model} runs and does not answer: {cut(writer.unanswered, MAX_TEXT)}.",
                "Perhaps nobody buys, releases or routes capacity for this model.",
                f"temporal workflow describe --workflow-id capacity-{model}, and the runbook worker's log",
                model=model,
                may_pass=True,
            )
            return  # what is wanted of it is not known
        short = list(self._short(model, spec))
        yield from self._writer(model, is_short=bool(short))
        yield from short
        yield from self._failed(model)
        if writer is not None and writer.running:
            yield from self._surplus(model, spec)

    def _writer(self, model: str, *, is_short: bool) -> Iterator[Finding]:
        writer = self.facts.writers.get(model, Writer(running=False))
        if not writer.running:
            yield self._finding(
                f"capacity-writer:{model}",
                Area.CAPACITY,
                Severity.CRITICAL,
                f"The capacity workflow of {model} does not run.",
                "Nobody buys, releases or routes capacity for this model.",
                f"It is started by every runbook worker at its start, and by: runbooks health --now. "
                f"Why it ended: temporal workflow show --workflow-id capacity-{model}",
                model=model,
                repair=("start-capacity", model),
            )
        state = self._state(model)
        late = self.health.late_intervals * self.policy.capacity.reconcile_interval
        listed = state.last_reconciled_at
        # At rest it watches, and looks when the fleet, the policy or the routes are other than it knows.
        if listed is not None and state.doing not in ("", AT_REST) and self.now - listed > late:
            yield self._finding(
                f"capacity-stuck:{model}",
                Area.CAPACITY,
                Severity.WARNING,
                f"The capacity workflow of {model} is {state.doing}, and last looked {span(self.now - listed)} ago.",
                f"It should look again every {span(self.policy.capacity.reconcile_interval)}; what was bought or lost "
                "since is not known.",
                f"runbooks capacity reconcile {model} --why '...'; pending steps: temporal workflow describe "
                f"--workflow-id capacity-{model}",
                model=model,
                repair=("reconcile", model),
            )
        if state.paused is not None:
            yield self._finding(
                f"capacity-paused:{model}",
                Area.CAPACITY,
                Severity.NOTICE,
                f"{state.paused.who} paused capacity of {model} at {utc(state.paused.since)}: {state.paused.why}.",
                "Nothing is bought or released until somebody resumes it.",
                f"runbooks capacity resume {model} --why '...'",
                model=model,
            )
        for awaited in state.awaiting:
            yield self._finding(
                f"capacity-approval:{awaited.approval_id}",
                Area.CAPACITY,
                Severity.NOTICE,
                f"Capacity of {model} waits for an approval: {cut(awaited.text, MAX_TEXT)}",
                "What it is for goes without these units until then.",
                f"runbooks capacity approve {model} {awaited.approval_id} --why '...'",
                model=model,
            )
        if state.last_error:
            yield self._finding(
                f"capacity-error:{model}",
                Area.CAPACITY,
                Severity.CRITICAL if is_short else Severity.WARNING,
                f"Capacity of {model} is not what it should be: {cut(state.last_error, MAX_TEXT)}.",
                "Units that somebody asked for are not there, or units that nobody needs are paid for.",
                f"Mend what the message says, then: runbooks capacity reconcile {model} --why '...'",
                model=model,
                # While nothing is missing yet, another try may do.
                repair=None if is_short else ("reconcile", model),
            )

    def _short(self, model: str, spec: ModelPolicy) -> Iterator[Finding]:
        fleet, policy = self._fleet(model), self.policy.capacity
        expected = self._wanted(model, spec)
        units = sum(found.units for found in fleet if found.in_service)
        coming = [found for found in fleet if found.status == "Creating"]
        timely = [found for found in coming if self.now - found.created_at < policy.provisioning_timeout]
        if units + sum(found.units for found in timely) < expected:
            late = [found for found in coming if found not in timely]
            waiting = "".join(f"; {found.name} is in creation since {utc(found.created_at)}" for found in late)
            yield self._finding(
                f"capacity-short:{model}",
                Area.CAPACITY,
                Severity.CRITICAL,
                f"{units} units of {model} are in service, {expected} are expected{waiting}.",
                f"{(expected - units) * spec.tokens_per_second_per_unit:g} tokens/s of demand fall to on-demand quota "
                "or are throttled.",
                f"runbooks capacity show {model} says what is under way; this tries again: "
                f"runbooks capacity reconcile {model} --why '...'",
                model=model,
                repair=("reconcile", model),
            )

    def _failed(self, model: str) -> Iterator[Finding]:
        for found in self._fleet(model):
            if found.status == "Failed" and found.ours:
                yield self._finding(
                    f"provisioning-failed:{found.name}",
                    Area.CAPACITY,
                    Severity.CRITICAL,
                    f"AWS failed to create {found.name} ({found.units} units of {model}): "
                    f"{cut(found.failure or 'no reason given', MAX_TEXT)}.",
                    "These units will not come by themselves.",
                    f"Ask AWS Support with {found.arn}; then: runbooks capacity reconcile {model} --why '...'",
                    model=model,
                    repair=("reconcile", model),
                )

    def _surplus(self, model: str, spec: ModelPolicy) -> Iterator[Finding]:
        """What the planner would release at this moment: it alone knows what is kept for its paid hour."""
        fleet, state = self._fleet(model), self._state(model)
        situation = Situation(
            model=model,
            spec=spec,
            policy=self.policy.capacity,
            timetable=self.policy.timetable,
            clock=self.snapshot.clock,
            now=self.now,
            demands=tuple(state.demands),
            fleet=tuple(fleet),
            routed=frozenset(self.facts.routes.get(model, {})),
            purchases=tuple(state.purchases),
            consents=tuple(state.consents),
        )
        ready = [step for step in plan(situation).steps if step.ready]
        idle = {step.name: step.units for step in ready if step.kind in (StepKind.WITHDRAW, StepKind.DRAIN)}
        if idle and state.paused is None:
            units = sum(idle.values())
            price = "" if spec.usd_per_unit_hour is None else f", {units * spec.usd_per_unit_hour:.2f} USD an hour"
            yield self._finding(
                f"capacity-surplus:{model}",
                Area.CAPACITY,
                Severity.WARNING,
                f"{units} units of {model} could go: {', '.join(sorted(idle))}.",
                f"Nobody asks for these units and they are paid for{price}.",
                f"runbooks capacity show {model}; runbooks capacity reconcile {model} --why '...'",
                model=model,
                repair=("reconcile", model),
            )

    # ------------------------------------------------------------ routes

    def _routes(self, model: str, spec: ModelPolicy) -> Iterator[Finding]:
        published = self.facts.routes.get(model, {})
        in_service = {found.arn: found for found in self._fleet(model) if found.in_service}
        wrong = [
            f"{arn} ({in_service[arn].units} units, {units} in the routes)" if arn in in_service else arn
            for arn, units in published.items()
            if arn not in in_service or in_service[arn].units != units
        ]
        if wrong:
            yield self._finding(
                f"routes-stale:{model}",
                Area.ROUTES,
                Severity.CRITICAL,
                f"The routes of {model} name what is not in service so: {', '.join(sorted(wrong))}.",
                "The chatbot sends calls to models that refuse them.",
                f"runbooks capacity reconcile {model} --why '...' publishes them again",
                model=model,
                repair=("reconcile", model),
            )
        # What is being drained is out of the routes on purpose, and so is what has just come into service.
        intended = self._state(model).routes
        unused = [found for arn, found in in_service.items() if arn not in published]
        lost = [found for found in unused if found.arn in intended or model not in self.facts.routes]
        if lost:
            yield self._finding(
                f"routes-missing:{model}",
                Area.ROUTES,
                Severity.CRITICAL,
                f"{sum(found.units for found in lost)} units of {model} are in service and not in the routes: "
                f"{', '.join(sorted(found.name for found in lost))}.",
                "They are paid for, and the chatbot does not use them.",
                f"runbooks capacity reconcile {model} --why '...' publishes them again",
                model=model,
                repair=("reconcile", model),
            )

    # ------------------------------------------------------------ quota

    def _quota(self, model: str, spec: ModelPolicy) -> Iterator[Finding]:
        # The timetable is within its limits when the policy is loaded; what people and events ask for may not be.
        wanted = [(demand.units, demand.asked_by, demand.start) for demand in self._state(model).demands]
        over = [item for item in wanted if item[0] > spec.most_units]
        if over:
            units, who, start = max(over)
            limit = (
                f"the quota is {spec.quota_units}"
                if spec.most_units == spec.quota_units
                else f"the policy's ceiling is {spec.ceiling_units}"
            )
            yield self._finding(
                f"quota:{model}",
                Area.QUOTA,
                Severity.WARNING,
                f"{who} wants {units} units of {model} from {utc(start)}, and {limit}.",
                f"{units - spec.most_units} of them cannot be bought.",
                f"Ask AWS Support for {units} model units of {spec.provisioned_model_id}, then set "
                f"models.{model}.quota_units and ceiling_units in the policy",
                model=model,
            )

    # ------------------------------------------------------------ orphans

    def _orphans(self) -> Iterator[Finding]:
        for found in self.facts.fleet:
            if not found.ours or self._is_known(found):
                continue
            routed = any(found.arn in routes for routes in self.facts.routes.values())
            deletable = found.status != "Creating" and not found.committed and not routed
            whose = f"of {found.model}" if found.model else f"of {found.base_model_id}, which the policy does not have"
            committed = " It has a commitment: AWS refuses to delete it before its term ends." * found.committed
            after = span(self.health.delete_orphans_after)
            by_itself = (
                f"; the health check deletes it {after} after it first found it"
                if deletable and "delete-orphan" in self.health.repairs
                else ""
            )
            yield self._finding(
                f"orphan:{found.name}",
                Area.ORPHANS,
                Severity.WARNING,
                f"{found.name} ({found.units} units {whose}) carries our tag, and no capacity workflow knows it."
                f"{committed}",
                "It is paid for by the hour, and nobody will release it.",
                f"If nobody needs it: aws bedrock delete-provisioned-model-throughput --provisioned-model-id "
                f"{found.arn}{by_itself}",
                model=found.model,
                repair=("delete-orphan", found.arn) if deletable else None,
            )

    def _is_known(self, found: FoundModel) -> bool:
        if found.model is None:
            return False
        state = self._state(found.model)
        listed = state.last_reconciled_at
        # A writer that does not run, or has not looked since, takes what is ours when it looks.
        not_yet = listed is None or listed <= found.created_at + self.policy.capacity.poll_interval
        return not_yet or any(found.arn == known.arn for known in state.fleet)

    # ------------------------------------------------------------ schedules, permissions

    def _schedules(self) -> Iterator[Finding]:
        for seen in self.facts.schedules:
            finding = self._schedule(seen)
            if finding is not None:
                yield finding

    def _schedule(self, seen: ScheduleSeen) -> Finding | None:
        name = seen.schedule_id

        def finding(kind: str, severity: Severity, what: str, do: str, *, repair: bool = False) -> Finding:
            return self._finding(
                f"schedule-{kind}:{name}",
                Area.SCHEDULES,
                severity,
                what,
                f"Nothing does what {name} does every {span(seen.every)}.",
                do,
                repair=("schedules", name) if repair else None,
            )

        show = f"temporal schedule describe --schedule-id {name}"
        if not seen.exists:
            do = "runbooks health --now makes it again, and so does the start of a runbook worker"
            return finding("missing", Severity.CRITICAL, f"The schedule {name} is missing.", do, repair=True)
        if seen.paused is not None:
            what = f"The schedule {name} is paused: {cut(seen.paused, MAX_TEXT) or 'no note'}."
            do = f"temporal schedule toggle --schedule-id {name} --unpause --reason '...'"
            return finding("paused", Severity.WARNING, what, do)
        if not seen.as_wanted:
            what = f"The schedule {name} is not what the policy says."
            do = f"runbooks health --now writes it again; {show}"
            return finding("differs", Severity.WARNING, what, do, repair=True)
        ended = [how for how in seen.runs if how != "running"]
        bad = ended[-self.health.failed_runs :]
        if len(bad) == self.health.failed_runs and "completed" not in bad:
            what = f"The last {len(bad)} runs of {name} ended as {', '.join(bad)}."
            do = f"temporal workflow list --query \"WorkflowId STARTS_WITH '{name}-'\" and look at the last one"
            return finding("fails", Severity.CRITICAL, what, do)
        last = max((at for at in (seen.last_run_at, seen.changed_at) if at is not None), default=None)
        if last is not None and self.now - last > self.health.late_intervals * seen.every + _SLACK:
            hangs = "the run of then has not ended" if seen.runs[-1:] == ("running",) else "no run has begun since"
            what = f"The schedule {name} last did something {span(self.now - last)} ago: {hangs}."
            return finding("silent", Severity.CRITICAL, what, show)
        return None

    def _permissions(self) -> Iterator[Finding]:
        for missing in self.facts.permissions:
            yield self._finding(
                f"permission:{missing.action}",
                Area.PERMISSIONS,
                Severity.CRITICAL,
                f"Our role may not call {missing.action}.",
                "Every step that needs it fails (S4, root cause 2).",
                f"Add to the role: {missing.statement}; all that is needed: runbooks iam policy --role worker",
            )
