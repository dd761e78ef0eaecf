"""Who may do what. Who acts is always the verified subject of a token, never a name somebody typed."""

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Role(StrEnum):
    """What a person is trusted with; each role includes the ones before it."""

    VIEWER = "viewer"
    ENGINEER = "engineer"
    APPROVER = "approver"
    ADMIN = "admin"


class AwsRole(StrEnum):
    """A process of the product that holds an IAM role of its own."""

    WORKER = "worker"
    INTAKE = "intake"
    API = "api"
    """The ops API, and the command line on a machine of one's own."""
    BATCHER = "batcher"


_ORDER = tuple(Role)


def highest(*roles: Role) -> Role:
    """The one of these that includes the others."""
    return max(roles, key=_ORDER.index)


class Roster(BaseModel):
    """Who may. Read at the moment of each decision, so that a person removed since is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    people: dict[str, Role] = Field(default_factory=dict)
    """Token subject to role."""
    api_tokens: dict[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], str] = Field(default_factory=dict)
    """SHA-256 of an opaque token (hex) to its subject, for programs that cannot renew a signed one."""

    def may(self, subject: str, needed: Role) -> bool:
        """Whether `subject` holds `needed` or a higher role."""
        role = self.people.get(subject)
        return role is not None and _ORDER.index(role) >= _ORDER.index(needed)


def needed_role(action: str, *, recovered: bool) -> Role:
    """The role that an action on an incident or on capacity needs. What spends less or changes nothing is an
    engineer's."""
    if action in ("approve_revert", "approve_keep", "reject", "release_lever", "approve_capacity", "resume_capacity"):
        return Role.APPROVER
    if action == "abort" and not recovered:
        return Role.APPROVER
    return Role.ENGINEER
