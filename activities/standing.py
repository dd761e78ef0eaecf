"""Standing overrides: everything that is done for one each hour, in one step, because each step is history."""

from temporalio import activity
from temporalio.exceptions import ApplicationError

from activities.leases import LeaseActivities
from activities.settings import SettingsActivities
from domain.messages import RenewedStanding, RenewStanding, TakeLeases
from domain.override import has_caught_up


class StandingActivities:
    """Their leases, and the configured baseline that they wait for."""

    def __init__(self, settings: SettingsActivities, leases: LeaseActivities) -> None:
        self._settings = settings
        self._leases = leases

    @activity.defn
    def renew_standing(self, request: RenewStanding) -> RenewedStanding:
        """Renew the lease, or put it back; and whether the configured baseline is what it asks for.

        A policy file that cannot be read stops no renewal. Redis away: the step is tried again.
        """
        lease, caught_up, unread = request.lease, False, ""
        try:
            caught_up = has_caught_up(lease.knob, lease.value, self._settings.snapshot().policy.baseline)
        except ApplicationError as error:
            unread = error.message
        changed = self._leases.renew_leases(TakeLeases(leases=[lease]))
        return RenewedStanding(changed=changed, caught_up=caught_up, unread=unread)
