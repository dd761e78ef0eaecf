"""The search attributes of the workflows: one key each, for those who say them and those who search by them."""

from typing import Any

from temporalio.common import SearchAttributeKey

INCIDENT_KEY = SearchAttributeKey.for_keyword("IncidentKey")
PHASE = SearchAttributeKey.for_keyword("IncidentPhase")
SEVERITY = SearchAttributeKey.for_keyword("Severity")
CAUSE = SearchAttributeKey.for_keyword("Cause")
"""Id of the cause found, or `unknown`."""
SERVICE = SearchAttributeKey.for_keyword("Service")
HOLDS_LEASES = SearchAttributeKey.for_bool("HoldsLeases")
"""Whoever notices a lost Redis signals the workflows that say so."""
KNOB = SearchAttributeKey.for_keyword("Knob")
ENDS_AT = SearchAttributeKey.for_datetime("OverrideEndsAt")
"""An override's end, or its review date."""

_KEYS: tuple[SearchAttributeKey[Any], ...] = (
    INCIDENT_KEY,
    PHASE,
    SEVERITY,
    CAUSE,
    SERVICE,
    HOLDS_LEASES,
    KNOB,
    ENDS_AT,
)
SEARCH_ATTRIBUTES = {key.name: key.indexed_value_type.name.title().replace("_", "") for key in _KEYS}
"""Name to type, as the server registers them."""
