"""Lists the licences of llmrun's dependencies, as installed: `python -m tests.support.licenses`.

tests/unit/test_licenses.py checks that what llmrun itself needs may be used by anyone.
"""

from __future__ import annotations

from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.cluster import REPO

PAGE = REPO / "docs" / "reference" / "licenses.md"
ENGINE = ("cpu", "s3", "gcs", "postgres", "demo")
TEXT = """\
# Licences of dependencies

<!-- Written by `just licenses`. Do not edit. -->

llmrun is licensed under Apache-2.0. It contains no code of its dependencies; the installer fetches them. This is what
their packages declare, for the versions in `.ci/constraints.txt`.

"""


def closure(extras: tuple[str, ...]) -> dict[str, Distribution]:
    """Return the installed packages that `llmrun[extras]` needs, by name, without llmrun."""
    found: dict[tuple[str, str], Distribution] = {}
    todo = [("llmrun", extra) for extra in ("", *extras)]
    while todo:
        name, extra = todo.pop()
        key = (canonicalize_name(name), extra)
        if key in found:
            continue
        try:
            package = distribution(name)
        except PackageNotFoundError:  # for another platform, or left out in [tool.uv]
            continue
        found[key] = package
        for text in package.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                todo += [(requirement.name, more) for more in ("", *requirement.extras)]
    return {name: package for (name, _), package in sorted(found.items()) if name != "llmrun"}


def license_of(package: Distribution) -> str:
    """Return the licence that a package declares: as an SPDX expression, by classifiers, or in words."""
    about = package.metadata.json
    if expression := about.get("license_expression"):
        return str(expression)
    names = [text.rsplit(" :: ", 1)[-1] for text in about.get("classifier", []) if text.startswith("License ::")]
    if names := [name for name in names if name != "OSI Approved"]:
        return "; ".join(names)
    text = str(about.get("license", "")).strip()
    return text.splitlines()[0] if text else "not declared"


def table(packages: dict[str, Distribution]) -> str:
    """Return a table of licences, the most frequent ones first."""
    by_license: dict[str, list[str]] = {}
    for name, package in packages.items():
        by_license.setdefault(license_of(package), []).append(name)
    rows = sorted(by_license.items(), key=lambda row: (-len(row[1]), row[0]))
    return "\n".join(
        ["| licence | packages |", "| --- | --- |", *(f"| {x} | {', '.join(names)} |" for x, names in rows)]
    )


def main() -> None:
    """Write the page."""
    light, cluster, engine = closure(()), closure(("runtime",)), closure(("runtime", *ENGINE))
    sections = [
        ("The command line: `llmrun`", light),
        ("The cluster: also `llmrun[runtime]`", {name: cluster[name] for name in cluster.keys() - light.keys()}),
        (
            f"Engines, stores and the demo: also `llmrun[{','.join(ENGINE)}]`",
            {name: engine[name] for name in engine.keys() - cluster.keys()},
        ),
    ]
    text = "\n\n".join(f"## {title}\n\n{table(dict(sorted(packages.items())))}" for title, packages in sections)
    PAGE.write_text(f"{TEXT}{text}\n")


if __name__ == "__main__":
    main()
