"""What is configured: the policy (a snapshot for workflows) and the roster (read at the moment of a decision)."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedBase
from ruamel.yaml.error import YAMLError
from temporalio import activity
from temporalio.exceptions import ApplicationError

from domain.clock import RehearsalClock, compress
from domain.errors import ErrorKind
from domain.messages import Authorise, Authorised, PolicySnapshot
from domain.people import Roster
from domain.policy import Policy

M = TypeVar("M", bound=BaseModel)


class ConfigurationError(ValueError):
    """A file that cannot be used; the message names the file, the line, the field and what is allowed."""


def load_yaml(model: type[M], path: Path | None) -> M:
    """`model` from a YAML file, or its defaults without one.

    Raises:
        ConfigurationError: not readable, not YAML, or not what the model allows.
    """
    if path is None:
        return model()
    try:
        content = YAML(typ="rt").load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigurationError(f"{path}: {error}") from error
    try:
        return model.model_validate(content, extra="forbid")  # a typo is an error
    except ValidationError as error:
        raise ConfigurationError("\n".join(_wrong(path, content, item) for item in error.errors())) from None


def _wrong(path: Path, content: object, item: ErrorDetails) -> str:
    """One line; without the value where the whole file is it: the message names the field then."""
    where = f"{path}:{_line(content, item['loc'])}"
    if not item["loc"]:
        return f"{where}: {item['msg']}"
    return f"{where}: {'.'.join(map(str, item['loc']))}: {item['input']!r} is not allowed: {item['msg']}"


def _line(content: object, location: tuple[int | str, ...]) -> int:
    line = 1
    for part in location:
        if not isinstance(content, CommentedBase):
            break
        try:
            position = content.lc.key(part) if isinstance(part, str) else content.lc.item(part)
            line, content = position[0] + 1, content[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            break
    return line


def _version(path: Path | None) -> object:
    """Changes when the file does; None: there is no file, or it cannot be looked at."""
    try:
        status = path.stat() if path else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size, status.st_ino)


def load_policy(path: Path | None, clock: RehearsalClock) -> Policy:
    """The policy with its business durations divided by the clock's speed.

    Raises:
        ConfigurationError: as `load_yaml`.
    """
    return compress(load_yaml(Policy, path), clock.speed)


class SettingsActivities:
    """Configuration files, looked at again at each call so that an edit needs no restart."""

    def __init__(self, *, policy_file: Path | None, roster_file: Path | None, clock: RehearsalClock) -> None:
        self._policy_file = policy_file
        self._roster_file = roster_file
        self._clock = clock
        self._parsed: tuple[object, PolicySnapshot] | None = None

    def snapshot(self) -> PolicySnapshot:
        """The policy as it is configured now. A file that was broken since is said, and the last good one serves on.

        Raises:
            ApplicationError: Unavailable, tried again: the file has been broken since this process began.
        """
        version = _version(self._policy_file)
        if self._parsed is None or self._parsed[0] != version:
            # Parsed once: YAML with line numbers takes 5 ms for a few lines, and this stands before every lever.
            try:
                policy = load_policy(self._policy_file, self._clock)
            except ConfigurationError as error:
                if self._parsed is None:
                    raise ApplicationError(str(error), type=ErrorKind.UNAVAILABLE) from error
                return self._parsed[1].model_copy(update={"broken": str(error)})
            self._parsed = version, PolicySnapshot(policy=policy, clock=self._clock)
        return self._parsed[1]

    @activity.defn
    async def load_policy(self) -> PolicySnapshot:
        """A snapshot for one workflow. A broken file fails the activity with its line and is tried again."""
        return self.snapshot()

    @activity.defn
    async def authorise(self, request: Authorise) -> Authorised:
        """Whether the person holds the role at this moment. Without a roster nobody does."""
        roster = load_yaml(Roster, self._roster_file)
        role = roster.people.get(request.who)
        if roster.may(request.who, request.needed):
            return Authorised(may=True, message=f"{request.who} is {role}")
        held = f"is {role}" if role else "is not in the roster"
        return Authorised(may=False, message=f"{request.who} {held}; {request.needed} is needed")
