"""What a deploy would do: the app as its file has it, against what is in force. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from llmrun.errors import Refused
from llmrun.spec import ModelSpec, Secret
from llmrun.wire import Change, DeployRequest, Plan
from llmrun_runtime.control.state.models import Deployed


def check(request: DeployRequest, deployed: Mapping[str, Deployed], sources: Mapping[str, str]) -> None:
    """Raise Refused for an app of another place, or a name that is taken."""
    known = sources.get(request.app)
    if known is not None and known != request.source and not request.adopt:
        raise Refused(
            f"app {request.app} was last deployed from {known}, not from {request.source}: "
            f"give this one another --name, or take it over with --adopt",
            409,
        )
    _check_names(request, deployed)


def make_plan(request: DeployRequest, deployed: Mapping[str, Deployed], rows: Mapping[str, Deployed]) -> Plan:
    """The changes, in the file's order, then removals. `rows` holds each model of the request as it would be."""
    changes = [_change(rows[spec.name], deployed.get(spec.name)) for spec in request.specs]
    if not request.only:
        said = {spec.name for spec in request.specs}
        missing = sorted(name for name, row in deployed.items() if row.app == request.app and name not in said)
        changes += [Change(model=name, kind="remove") for name in missing]
    text = "\n".join([request.app, *(change.model_dump_json() for change in changes)])
    fingerprint = hashlib.sha256(text.encode()).hexdigest()
    return Plan(app=request.app, changes=tuple(changes), fingerprint=fingerprint)


def _check_names(request: DeployRequest, deployed: Mapping[str, Deployed]) -> None:
    """Every name and alias is unique on the cluster. Models that the request replaces or prunes do not count."""
    said = {spec.name for spec in request.specs}
    left = {n for n, row in deployed.items() if row.app == request.app and n not in said and not request.only}
    taken: dict[str, tuple[str, str]] = {}
    for name, row in deployed.items():
        if (name in said and row.app == request.app) or (name in left and request.prune):
            continue
        for served in row.spec.served_names:
            taken[served] = (name, row.app)
    for spec in request.specs:
        for served in spec.served_names:
            if served in taken:
                model, app = taken[served]
                owner = f"model {model} of app {app}" if app != request.app else f"model {model}"
                if model in left:
                    owner += ", which is no longer in the file (--prune removes it)"
                raise Refused(
                    f"{spec.name}: the name {served!r} belongs to {owner}: choose another name= or alias", 409
                )
            taken[served] = (spec.name, request.app)


def _change(new: Deployed, row: Deployed | None) -> Change:
    spec, where = new.spec, str(new.placement)
    pinned = f" ({new.pin.short})" if new.pin else ""
    if row is None:
        return Change(model=spec.name, kind="add", lines=(f"{spec.model}{pinned}",), placement=where)
    lines = [
        f"{field} {_show(getattr(row.spec, field))} → {_show(getattr(spec, field))}"
        for field in ModelSpec.model_fields
        if getattr(row.spec, field) != getattr(spec, field)
    ]
    restarts = spec.fingerprint(soft=False) != row.spec.fingerprint(soft=False)
    if new.placement != row.placement:
        restarts = True
        lines.append(f"runs on {row.placement} → {new.placement}")
    if new.pin and spec.model == row.spec.model and (row.pin is None or new.pin.id != row.pin.id):
        restarts = True
        lines.append(f"weights {row.pin.short if row.pin else 'not pinned'} → {new.pin.short}")
    kind = "change" if restarts else "tune" if lines else "same"
    return Change(model=spec.name, kind=kind, lines=tuple(lines), placement=where)


def _show(value: object) -> str:
    """A field's value for the diff: as it would be written, secrets by their names."""
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
