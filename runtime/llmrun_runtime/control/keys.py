"""API keys: control creates, lists and revokes them; every ingress checks them by the digests in its routing table."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from llmrun.errors import Refused
from llmrun.identity import ADMIN_NAME, digest_of
from llmrun.wire import KeyInfo, NewKey
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.stored_json import read_stored
from llmrun_runtime.control.state.tables import KeyRow, MetaRow

log = logging.getLogger("llmrun.control")
PREFIX = "sk-llmrun-"
SECRET_BYTES = 32
# In the table of facts about the database, once a key has been created.
HAD_KEY = "had_key"
EXPIRED = 1.0  # a Unix time in the past


class Keys:
    """The keys, in the database and in memory. `on_change` is called when the routing table must be published."""

    def __init__(self, database: Database, required: bool | None = None) -> None:
        """`required`: LLMRUN_REQUIRE_KEY; None: from the first key on."""
        self._database = database
        self._setting = required
        self._had_key = False
        self._routes: dict[str, KeyInfo] = {}
        self.on_change: Callable[[], None] = lambda: None

    def load(self) -> None:
        """Read the stored keys. A key that cannot be read counts as expired: without any key, none is required."""
        with self._database.session() as session, session.begin():
            for row in session.scalars(select(KeyRow)):
                try:
                    self._routes[row.digest] = read_stored(KeyInfo, row.facts)
                except ValueError as error:
                    log.warning("key %s cannot be read, so it is not valid: %s", row.name, error)
                    self._routes[row.digest] = KeyInfo.model_construct(name=row.name, expires=EXPIRED)
            if self._routes:  # earlier releases did not record it
                session.merge(MetaRow(key=HAD_KEY, value="1"))
            self._had_key = bool(self._routes) or session.get(MetaRow, HAD_KEY) is not None

    @property
    def required(self) -> bool:
        """Whether requests need a key although none may exist: an endpoint that was closed stays closed."""
        return self._had_key if self._setting is None else self._setting

    @property
    def routes(self) -> dict[str, KeyInfo]:
        """The keys by digest, for the routing table."""
        return self._routes

    def create(self, info: KeyInfo) -> NewKey:
        """Create a key. Raises Refused if the name is taken or the expiry is in the past."""
        now = time.time()
        if info.expires and info.expires <= now:
            raise Refused(f"cannot create key {info.name!r}: its expiry is in the past", 422)
        if info.name == ADMIN_NAME:
            raise Refused(f"cannot create key {info.name!r}: the admin key has this name. Choose another one", 422)
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        created = info.model_copy(update={"created": now})
        digest = digest_of(secret)
        try:
            with self._database.session() as session, session.begin():
                session.merge(MetaRow(key=HAD_KEY, value="1"))
                session.add(KeyRow(name=created.name, digest=digest, facts=created.model_dump_json()))
        except IntegrityError:
            raise Refused(f"key {info.name!r} already exists. Revoke it first, or choose another name", 409) from None
        self._had_key = True
        self._routes = {**self._routes, digest: created}
        self.on_change()
        return NewKey(key=secret, facts=created)

    def rows(self) -> list[KeyInfo]:
        """Return all keys, sorted by name."""
        return sorted(self._routes.values(), key=lambda info: info.name)

    def revoke(self, name: str) -> None:
        """Delete a key. Raises Refused if it is not found."""
        remaining = {digest: info for digest, info in self._routes.items() if info.name != name}
        if len(remaining) == len(self._routes):
            available = ", ".join(sorted(info.name for info in self._routes.values())) or "none"
            raise Refused(f"key {name!r} not found; available: {available}", 404)
        with self._database.session() as session, session.begin():
            session.execute(delete(KeyRow).where(KeyRow.name == name))
        self._routes = remaining
        self.on_change()
