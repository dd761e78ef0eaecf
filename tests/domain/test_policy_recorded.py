"""What an earlier version recorded is taken, whatever today's checks say of it (invariant 7)."""

from datetime import timedelta

import pytest
from pydantic import ValidationError

from domain.clock import RehearsalClock
from domain.messages import PolicySnapshot
from domain.policy import Policy


def test_a_recorded_policy_that_contradicts_todays_is_taken_and_a_new_one_is_not() -> None:
    recorded = PolicySnapshot(policy=Policy(), clock=RehearsalClock()).model_dump(mode="json")
    recorded["policy"]["leases"]["renew_every"] = "PT9H"
    recorded["policy"]["dropped_since"] = 1
    taken = PolicySnapshot.model_validate(recorded)
    assert taken.policy.leases.renew_every == timedelta(hours=9)
    assert PolicySnapshot.model_validate_json(taken.model_dump_json()) == taken
    with pytest.raises(ValidationError, match="renew_every < model_routing"):
        Policy.model_validate(recorded["policy"])
