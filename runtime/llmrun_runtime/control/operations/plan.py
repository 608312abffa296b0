"""The changes that a deploy would make: the app as in its file, compared with the active versions. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llmrun.errors import Refused
from llmrun.spec import ModelSpec, Secret
from llmrun.wire import Change, DeployRequest, Plan
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.operation import Operation


@dataclass(frozen=True)
class Claim:
    """A deploy, and the names and aliases of its models."""

    operation: Operation
    names: frozenset[str]

    @staticmethod
    def of(request: DeployRequest, operation: Operation) -> Claim:
        """Return the claim of a request and the operation that runs it."""
        return Claim(operation, frozenset(name for spec in request.specs for name in spec.served_names))


def check_claims(request: DeployRequest, claims: Iterable[Claim]) -> None:
    """Raise Refused if a running deploy of another app has a model with the same name or alias."""
    for claim in claims:
        for spec in request.specs:
            for served in spec.served_names:
                other = claim.operation
                if served in claim.names and other.app != request.app:
                    raise Refused(
                        f"{spec.name}: the name {served!r} is being deployed by app {other.app} "
                        f"(deploy {other.id}): choose another name= or alias",
                        409,
                    )


def check(request: DeployRequest, deployed: Mapping[str, Deployed], sources: Mapping[str, str]) -> None:
    """Raise Refused if the app was deployed from another source, or a name is in use."""
    source = sources.get(request.app)
    if source is not None and source != request.source and not request.adopt:
        raise Refused(
            f"app {request.app} was last deployed from {source}, not from {request.source}: "
            f"choose another --name, or take the app over with --adopt",
            409,
        )
    _check_names(request, deployed)


def make_plan(request: DeployRequest, deployed: Mapping[str, Deployed], rows: Mapping[str, Deployed]) -> Plan:
    """Return the changes in the file's order, then the removals. `rows`: each requested model as it would become."""
    changes = [_change(rows[spec.name], deployed.get(spec.name)) for spec in request.specs]
    if not request.only:
        requested = {spec.name for spec in request.specs}
        missing = sorted(name for name, row in deployed.items() if row.app == request.app and name not in requested)
        changes += [Change(model=name, kind="remove") for name in missing]
    text = "\n".join([request.app, *(change.model_dump_json() for change in changes)])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return Plan(app=request.app, changes=tuple(changes), fingerprint=fingerprint)


def _check_names(request: DeployRequest, deployed: Mapping[str, Deployed]) -> None:
    """Check that names and aliases are unique on the cluster. Models that the request replaces or prunes are exempt."""
    requested = {spec.name for spec in request.specs}
    missing = {
        name for name, row in deployed.items() if row.app == request.app and name not in requested and not request.only
    }
    taken: dict[str, tuple[str, str]] = {}
    for name, row in deployed.items():
        if (name in requested and row.app == request.app) or (name in missing and request.prune):
            continue
        for served in row.spec.served_names:
            taken[served] = (name, row.app)
    for spec in request.specs:
        for served in spec.served_names:
            if served in taken:
                model, app = taken[served]
                owner = f"model {model} of app {app}" if app != request.app else f"model {model}"
                if model in missing:
                    owner += ", which is no longer in the file (--prune removes it)"
                raise Refused(
                    f"{spec.name}: the name {served!r} belongs to {owner}: choose another name= or alias", 409
                )
            taken[served] = (spec.name, request.app)


def _change(new: Deployed, old: Deployed | None) -> Change:
    spec, placement = new.spec, str(new.placement)
    pinned = f" ({new.pin.short})" if new.pin else ""
    if old is None:
        return Change(model=spec.name, kind="add", lines=(f"{spec.model}{pinned}",), placement=placement)
    lines = [
        f"{field} {_show(getattr(old.spec, field))} → {_show(getattr(spec, field))}"
        for field in ModelSpec.model_fields
        if getattr(old.spec, field) != getattr(spec, field)
    ]
    restarts = spec.fingerprint(soft=False) != old.spec.fingerprint(soft=False)
    if new.placement != old.placement:
        restarts = True
        lines.append(f"runs on {old.placement} → {new.placement}")
    if new.pin and spec.model == old.spec.model and (old.pin is None or new.pin.id != old.pin.id):
        restarts = True
        lines.append(f"weights {old.pin.short if old.pin else 'not pinned'} → {new.pin.short}")
    kind = "change" if restarts else "tune" if lines else "same"
    return Change(model=spec.name, kind=kind, lines=tuple(lines), placement=placement)


def _show(value: object) -> str:
    """Format a field's value for the diff as in an app file; secrets by their names."""
    if isinstance(value, Secret):
        return f"Secret({value.secret!r})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    package = getattr(value, "package", None)
    if package:
        return f"package {package[:12]}"
    return f"{value:g}" if isinstance(value, float) else str(value)
