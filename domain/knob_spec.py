"""What a knob's declaration is made of: the kind of its values, how overlapping leases merge, and who may change it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from domain.people import Role

KnobValue = (
    StrictBool
    | StrictInt
    | StrictFloat
    | None
    | dict[str, StrictStr]
    | dict[str, StrictBool]
    | dict[str, StrictInt]
    | dict[str, dict[str, StrictInt] | None]
)
"""A plain value, or one for each intent or feature; a name that is absent keeps what it has. None: no limit."""

Ranks = Mapping[str, int]
"""Models by quality: a lower rank is a smaller model."""


@dataclass(frozen=True)
class Whole:
    """A whole number within bounds."""

    minimum: int
    maximum: int

    def takes(self, value: object, ranks: Ranks) -> bool:
        """Whether `value` is one."""
        return isinstance(value, int) and not isinstance(value, bool) and self.minimum <= value <= self.maximum

    def allowed(self, unit: str, ranks: Ranks) -> str:
        """What is, in words."""
        return f"a whole number of {unit} from {self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class Number:
    """A number within bounds."""

    minimum: float
    maximum: float

    def takes(self, value: object, ranks: Ranks) -> bool:
        """Whether `value` is one."""
        return isinstance(value, int | float) and not isinstance(value, bool) and self.minimum <= value <= self.maximum

    def allowed(self, unit: str, ranks: Ranks) -> str:
        """What is, in words."""
        return f"a number of {unit} from {self.minimum:g} to {self.maximum:g}"


@dataclass(frozen=True)
class Switch:
    """On or off."""

    def takes(self, value: object, ranks: Ranks) -> bool:
        """Whether `value` is one."""
        return isinstance(value, bool)

    def allowed(self, unit: str, ranks: Ranks) -> str:
        """What is, in words."""
        return "true or false"


@dataclass(frozen=True)
class Model:
    """The name of a model in the policy."""

    def takes(self, value: object, ranks: Ranks) -> bool:
        """Whether `value` is one."""
        return isinstance(value, str) and value in ranks

    def allowed(self, unit: str, ranks: Ranks) -> str:
        """What is, in words."""
        return f"one of the models {', '.join(sorted(ranks)) or 'of the policy'}"


@dataclass(frozen=True)
class Counts:
    """A whole number within bounds for each of some names."""

    names: tuple[str, ...]
    each: Whole

    def takes(self, value: object, ranks: Ranks) -> bool:
        """Whether `value` is one."""
        return (
            isinstance(value, dict)
            and set(value) == set(self.names)
            and all(self.each.takes(count, ranks) for count in value.values())
        )

    def allowed(self, unit: str, ranks: Ranks) -> str:
        """What is, in words."""
        return f"{' and '.join(self.names)}, each {self.each.allowed(unit, ranks)},"


@dataclass(frozen=True)
class Merge:
    """How the values of overlapping leases become one: associative, commutative, and idempotent."""

    name: str
    of: Callable[[Sequence[Any], Ranks], Any]


LARGEST = Merge("largest wins", lambda values, _: max(values))
SMALLEST = Merge("smallest wins", lambda values, _: min(values))
ON_WINS = Merge("on wins", lambda values, _: any(values))
OFF_WINS = Merge("off wins", lambda values, _: all(values))
SMALLEST_MODEL = Merge("model of the lowest rank wins", lambda values, ranks: min(values, key=lambda m: (ranks[m], m)))
STRICTEST = Merge(
    "smallest of each count wins", lambda values, _: {name: min(one[name] for one in values) for name in values[0]}
)

KEEPS_LAST_KNOWN = "keeps each last known lease to its own end, then uses the baseline"


@dataclass(frozen=True, kw_only=True)
class KnobSpec:
    """One knob's declaration."""

    meaning: str
    unit: str = ""
    """What one of its numbers counts."""
    kind: Whole | Number | Switch | Model | Counts
    by: Literal["intent", "feature"] | None = None
    """Values are maps with one such value for each of these; None: the value is a plain one."""
    merge: Merge
    """Which value holds while several leases ask for different ones; of a map, for each name by itself."""
    baseline: KnobValue
    """The configured value where the policy says nothing else: of a knob by intent the value for each intent. None:
    no limit, and for `cache_ttl_seconds` and `model_routing` what the policy's fields of their own say."""
    role: Role = Role.ENGINEER
    """Who may change it; a pin needs `PIN_ROLE` as well."""
    needs_approval: bool = False
    """Whether a change by a person waits for an approver."""
    unreadable: str = KEEPS_LAST_KNOWN
    """What the data plane does while it cannot read the knob."""


PIN_ROLE = Role.APPROVER
"""Who may pin a value above the merge."""
