"""What became of each request, and whether a kill explains it. Pure; times are monotonic, in seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["answered", "refused", "broken", "unreachable", "lost"]
# A kill explains what happens to a request until everything that was killed is back.
ENGINE_S, INGRESS_S, CLUSTER_S = 20.0, 20.0, 90.0
# A dead node takes Ray some seconds to notice.
NODE_S = 40.0


@dataclass(frozen=True)
class Outcome:
    """One try of one request.

    `answered`: the whole answer. `refused`: an error with a code, before the first token. `broken`: an error event or
    the end of the connection after the first token. `unreachable`: no answer at all, because the connection was refused
    or ended. `lost`: anything else, such as silence, or an answer that is not whole.
    """

    kind: Kind
    model: str
    started: float
    ended: float
    detail: str = ""


@dataclass(frozen=True)
class Kill:
    """One fault: what was killed, and the model that it served ("" for what serves all)."""

    what: str
    at: float
    model: str = ""


@dataclass(frozen=True)
class Scope:
    """What a kind of kill may do to requests that run within `seconds` after it."""

    seconds: float
    breaks: bool = False
    """Whether streams that run there may break off."""
    disconnects: bool = False
    """Whether clients may find nothing that listens."""


SCOPES = {
    "engine core": Scope(ENGINE_S, breaks=True),
    "API server": Scope(ENGINE_S, breaks=True),
    "replica": Scope(ENGINE_S, breaks=True),
    "node agent": Scope(ENGINE_S),
    "fork server": Scope(ENGINE_S),
    "control": Scope(ENGINE_S),
    "Serve's controller": Scope(ENGINE_S),
    "ingress": Scope(INGRESS_S, breaks=True, disconnects=True),
    "node": Scope(NODE_S, breaks=True),
    "cluster": Scope(CLUSTER_S, breaks=True, disconnects=True),
}


@dataclass
class Ledger:
    """All outcomes and kills of one run."""

    outcomes: list[Outcome] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)

    def explanation(self, outcome: Outcome) -> str:
        """Return the kill that explains a broken or unreachable outcome; "" if none does."""
        for kill in self.kills:
            scope = SCOPES[kill.what]
            allowed = scope.breaks if outcome.kind == "broken" else scope.disconnects
            concerned = kill.model in ("", outcome.model)
            if allowed and concerned and outcome.started - scope.seconds <= kill.at <= outcome.ended:
                return kill.what
        return ""

    def tally(self) -> Counter[str]:
        """Count the outcomes by kind."""
        return Counter(outcome.kind for outcome in self.outcomes)

    def shortcomings(self) -> list[str]:
        """Return what fell short, a line each: lost requests, and those that no kill explains."""
        lines = []
        for outcome in self.outcomes:
            what = f"{outcome.kind} after {outcome.ended - outcome.started:.1f} s, of {outcome.model}: {outcome.detail}"
            if outcome.kind == "lost":
                lines.append(what)
            elif outcome.kind in ("broken", "unreachable") and not self.explanation(outcome):
                lines.append(f"no kill explains: {what}")
        if not any(outcome.kind == "answered" for outcome in self.outcomes):
            lines.append("no request was answered")
        return lines
