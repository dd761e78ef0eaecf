"""Decision trees as data: the runbooks' root-cause charts, walked over evidence, rendered from the same source."""

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from domain.evidence import Evidence, EvidenceKey


@dataclass(frozen=True)
class Leaf:
    """A cause, or what to investigate."""

    id: str
    sentence: str


@dataclass(frozen=True)
class Question:
    """A question that evidence answers; `answer` is only called when every key in `needs` has a value."""

    id: str
    text: str
    needs: tuple[EvidenceKey, ...]
    answer: Callable[[Evidence], str]
    branches: dict[str, "Question | Leaf"]


class Step(BaseModel):
    """One question on the path, with its answer."""

    question: str
    answer: str
    """The branch taken, or `unknown`."""
    because: str
    """The readings it rests on, in words."""


class Cause(BaseModel):
    """One cause found."""

    id: str
    sentence: str


class Diagnosis(BaseModel):
    """What a tree found."""

    causes: list[Cause]
    """Empty when evidence is missing."""
    path: list[Step]
    missing: list[str]
    """What could not be read, and why."""

    @property
    def sentence(self) -> str:
        """The finding in one or more sentences."""
        if self.causes:
            return " ".join(cause.sentence for cause in self.causes)
        return "Unknown: could not read " + "; ".join(self.missing) + "."


def diagnose(tree: Question, evidence: Evidence) -> Diagnosis:
    """Walk `tree` over `evidence`. Missing evidence ends the walk with `unknown`, never with a guess."""
    path: list[Step] = []
    node: Question | Leaf = tree
    while isinstance(node, Question):
        missing = [f"{key}: {evidence.why_missing(key)}" for key in node.needs if evidence.value(key) is None]
        if missing:
            path.append(Step(question=node.text, answer="unknown", because="; ".join(missing)))
            return Diagnosis(causes=[], path=path, missing=missing)
        answer = node.answer(evidence)
        because = ", ".join(f"{key} = {evidence.value(key)}" for key in node.needs)
        path.append(Step(question=node.text, answer=answer, because=because))
        node = node.branches[answer]
    return Diagnosis(causes=[Cause(id=node.id, sentence=node.sentence)], path=path, missing=[])


def needed(tree: Question | Leaf) -> set[EvidenceKey]:
    """Every key that any path of `tree` may ask for."""
    if isinstance(tree, Leaf):
        return set()
    return set(tree.needs).union(*(needed(branch) for branch in tree.branches.values()))


def mermaid(tree: Question) -> str:
    """The chart of `tree`, as Mermaid source."""
    lines = ["flowchart TD"]

    def draw(node: Question | Leaf) -> None:
        if isinstance(node, Leaf):
            lines.append(f'    {node.id}["{node.sentence}"]')
            return
        lines.append(f'    {node.id}{{"{node.text}"}}')
        for answer, branch in node.branches.items():
            lines.append(f"    {node.id} -->|{answer}| {branch.id}")
            draw(branch)

    draw(tree)
    return "\n".join(lines) + "\n"
