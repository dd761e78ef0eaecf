"""Keeping an override's lease while it is in force: put back when Redis lost it, and a standing one renewed."""

import contextlib

from temporalio import workflow
from temporalio.exceptions import ActivityError, is_cancelled_exception

from activities.leases import LeaseActivities
from activities.standing import StandingActivities
from domain.messages import RenewStanding, TakeLeases
from workflows._override import PROMPT, Override
from workflows._step import failure, load_policy, mutate


async def keep_lease(override: Override) -> None:
    """Put the lease back whenever Redis lost it, with the time left. Runs until cancelled.

    A standing one's is renewed, and compared with the configured baseline at that moment, until that has caught up: a
    timer and an activity, 11 events each time.
    """
    renew_every = override.now_snapshot.policy.leases.renew_every if override.standing else None
    while not override.caught_up:
        with contextlib.suppress(TimeoutError):
            await workflow.wait_condition(
                lambda: override.redis_lost,
                timeout=renew_every,
                timeout_summary="Next renewal of the lease, and look at the configured baseline",
            )
        lost, override.redis_lost = override.redis_lost, False
        try:
            if lost:
                await _release_former(override)
            changed = await (_renew_standing(override) if override.standing else _put_back(override))
        except ActivityError as error:
            if is_cancelled_exception(error):
                raise
            override.page(override.record.owner, f"the lease could not be put back: {failure(error)[1]}")
            continue
        if changed:
            why = "Redis lost writes" if lost else "the lease had lapsed while nobody renewed it"
            override.note("lever", f"{why}: {', '.join(changed)}")


async def _release_former(override: Override) -> None:
    """Of former owners: a replica that had lost the last writes may have brought them back."""
    current = override.record.lease
    for lease in override.record.undo:
        if current is not None and lease.lease_id != current.lease_id:
            await override.release_lease(lease, "handed over", PROMPT)


async def _put_back(override: Override) -> list[str]:
    record = override.record
    assert record.lease is not None
    return await mutate(
        LeaseActivities.renew_leases,
        TakeLeases(leases=[record.lease], until=record.ends_at),
        summary="Put the lease back",
    )


async def _renew_standing(override: Override) -> list[str]:
    assert override.record.lease is not None
    renewed = await mutate(
        StandingActivities.renew_standing,
        RenewStanding(lease=override.record.lease),
        summary="Renew the lease; has the configured baseline caught up?",
    )
    if renewed.unread:
        override.note("note", f"the configured baseline could not be read: {renewed.unread}")
    if renewed.caught_up:
        override.snapshot = await load_policy()
        override.caught_up = True
    return renewed.changed
