"""API keys: made, listed and revoked by control, checked by every ingress, which has their hashes in its table."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from llmrun.errors import Refused
from llmrun.wire import KeyInfo, NewKey
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.tables import KeyRow
from llmrun_runtime.wire.routing_table import digest_of

PREFIX = "sk-llmrun-"
SECRET_BYTES = 32


class Keys:
    """The keys, in the database and in memory. `on_change` is called when an ingress must hear of it."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._routes: dict[str, KeyInfo] = {}
        self.on_change: Callable[[], None] = lambda: None

    def load(self) -> None:
        """Read what is stored."""
        with self._database.session() as session:
            for row in session.scalars(select(KeyRow)):
                self._routes[row.digest] = KeyInfo.model_validate_json(row.facts)

    @property
    def routes(self) -> dict[str, KeyInfo]:
        """By digest, for the table."""
        return self._routes

    def create(self, facts: KeyInfo) -> NewKey:
        """Make a key. Raises Refused if the name is taken or the time is over already."""
        now = time.time()
        if facts.expires and facts.expires <= now:
            raise Refused(f"the key {facts.name!r} would have expired already: name a time to come", 422)
        key = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        made = facts.model_copy(update={"created": now})
        digest = digest_of(key)
        try:
            with self._database.session() as session, session.begin():
                session.add(KeyRow(name=made.name, digest=digest, facts=made.model_dump_json()))
        except IntegrityError:
            raise Refused(f"there is a key {facts.name!r}: revoke it first, or choose another name", 409) from None
        self._routes = {**self._routes, digest: made}
        self.on_change()
        return NewKey(key=key, facts=made)

    def rows(self) -> list[KeyInfo]:
        """All keys, by name."""
        return sorted(self._routes.values(), key=lambda facts: facts.name)

    def revoke(self, name: str) -> None:
        """Remove a key. Raises Refused if there is none of that name."""
        kept = {digest: route for digest, route in self._routes.items() if route.name != name}
        if len(kept) == len(self._routes):
            names = ", ".join(sorted(route.name for route in self._routes.values())) or "none"
            raise Refused(f"there is no key {name!r}; there are: {names}", 404)
        with self._database.session() as session, session.begin():
            session.execute(delete(KeyRow).where(KeyRow.name == name))
        self._routes = kept
        self.on_change()
