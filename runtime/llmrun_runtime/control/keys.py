"""API keys and the admin key: control stores them; every ingress checks them by the digests in its routing table."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError

from llmrun.errors import ClusterError, Refused
from llmrun.identity import ADMIN_NAME, digest_of
from llmrun.settings import Settings, replace_secret
from llmrun.wire import ADMIN, KeyChange, KeyInfo, NewKey
from llmrun_runtime.control.state.database import Database
from llmrun_runtime.control.state.stored_json import read_stored
from llmrun_runtime.control.state.tables import KeyRow, MetaRow

log = logging.getLogger("llmrun.control")
PREFIX = "sk-llmrun-"
SECRET_BYTES = 32
# In the table of facts about the database, once a key has been created.
HAD_KEY = "had_key"
EXPIRED = 1.0  # a Unix time in the past
MIN_ADMIN_KEY = 32


class StoredKey(KeyInfo):
    """A key in the database."""

    previous_digest: str = ""
    """The digest of the secret before the last rotation."""
    previous_until: float = 0
    """Unix time until which that secret is accepted, too."""


class AdminSecret:
    """The admin key of this home: LLMRUN_ADMIN_KEY, else the content of `admin.key`."""

    def __init__(self, settings: Settings) -> None:
        """Raises ClusterError for a key that could be guessed: whoever has it can run code."""
        self._settings = settings
        key = settings.resolved_admin_key()
        if not key:
            raise ClusterError(f"{settings.admin_key_file} is empty. Remove the file to have a new key created")
        if len(key) < MIN_ADMIN_KEY:
            where = "LLMRUN_ADMIN_KEY" if settings.admin_key else settings.admin_key_file
            raise ClusterError(
                f"{where} has {len(key)} characters, but needs {MIN_ADMIN_KEY}, because it allows to run code. "
                f"Create one with `openssl rand -hex 32`"
            )
        self.digest = digest_of(key)

    def rotate(self) -> str:
        """Replace the key and return the new one. Raises Refused."""
        if self._settings.admin_key:
            text = "LLMRUN_ADMIN_KEY sets the admin key. Change it where the cluster is started, then `llmrun restart`"
            raise Refused(f"cannot rotate the admin key: {text}", 409)
        try:
            key = replace_secret(self._settings.admin_key_file)
        except OSError as error:
            raise Refused(f"cannot rotate the admin key: {error}", 503) from error
        self.digest = digest_of(key)
        return key


class Keys:
    """The keys, in the database and in memory. `on_change` is called when the routing table must be published."""

    def __init__(self, database: Database, required: bool | None = None, admin: AdminSecret | None = None) -> None:
        """`required`: LLMRUN_REQUIRE_KEY; None: from the first key on. `admin`: None without an admin key."""
        self._database = database
        self._admin = admin
        self._setting = required
        self._had_key = False
        self._stored: dict[str, StoredKey] = {}
        """By digest."""
        self._routes: dict[str, KeyInfo] = {}
        self.on_change: Callable[[], None] = lambda: None

    def load(self) -> None:
        """Read the stored keys. A key that cannot be read counts as expired: without any key, none is required."""
        with self._database.session() as session, session.begin():
            for row in session.scalars(select(KeyRow)):
                try:
                    self._stored[row.digest] = read_stored(StoredKey, row.facts)
                except ValueError as error:
                    log.warning("key %s cannot be read, so it is not valid: %s", row.name, error)
                    self._stored[row.digest] = StoredKey.model_construct(name=row.name, expires=EXPIRED)
            self._routes = _routes(self._stored)
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

    @property
    def admin_digest(self) -> str:
        """The digest of the admin key, "" if there is none."""
        return self._admin.digest if self._admin else ""

    def find(self, secret: str, now: float) -> KeyInfo | None:
        """Return the valid key with this secret."""
        digest = digest_of(secret)
        if digest == self.admin_digest:
            return ADMIN
        key = self._routes.get(digest)
        return key if key and not key.disabled and not 0 < key.expires <= now else None

    def create(self, info: KeyInfo) -> NewKey:
        """Create a key. Raises Refused if the name is taken or the expiry is in the past."""
        now = time.time()
        _check_expiry(info.name, info.expires, now)
        if info.name == ADMIN_NAME:
            raise Refused(f"cannot create key {info.name!r}: the admin key has this name. Choose another one", 422)
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        created = StoredKey(**info.model_dump() | {"created": now})
        digest = digest_of(secret)
        try:
            with self._database.session() as session, session.begin():
                session.merge(MetaRow(key=HAD_KEY, value="1"))
                session.add(KeyRow(name=created.name, digest=digest, facts=_dumped(created)))
        except IntegrityError:
            raise Refused(f"key {info.name!r} already exists. Revoke it first, or choose another name", 409) from None
        self._had_key = True
        self._replace({**self._stored, digest: created})
        return NewKey(key=secret, facts=_shown(created))

    def change(self, name: str, change: KeyChange) -> KeyInfo:
        """Change a key's fields, not its secret. Raises Refused if it is not found or the expiry is in the past."""
        digest, key = self._get(name)
        _check_expiry(name, change.expires or 0, time.time())
        changed = key.model_copy(update=change.model_dump(exclude_none=True))
        with self._database.session() as session, session.begin():
            session.execute(update(KeyRow).where(KeyRow.name == name).values(facts=_dumped(changed)))
        self._replace({**self._stored, digest: changed})
        return _shown(changed)

    def rotate(self, name: str, keep_s: float) -> NewKey:
        """Give a key a new secret; the old one stays valid for `keep_s` seconds. Raises Refused.

        The admin key's old secret ends at once.
        """
        if name == ADMIN_NAME and self._admin:
            secret = self._admin.rotate()
            self.on_change()
            return NewKey(key=secret, facts=ADMIN)
        old, key = self._get(name)
        secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
        previous = {"previous_digest": old if keep_s else "", "previous_until": time.time() + keep_s if keep_s else 0}
        digest, rotated = digest_of(secret), key.model_copy(update=previous)
        with self._database.session() as session, session.begin():
            session.execute(update(KeyRow).where(KeyRow.name == name).values(digest=digest, facts=_dumped(rotated)))
        self._replace({each: key for each, key in self._stored.items() if each != old} | {digest: rotated})
        return NewKey(key=secret, facts=_shown(rotated))

    def rows(self) -> list[KeyInfo]:
        """Return all keys, sorted by name."""
        return sorted((_shown(key) for key in self._stored.values()), key=lambda info: info.name)

    def revoke(self, name: str) -> None:
        """Delete a key. Raises Refused if it is not found."""
        digest, _ = self._get(name)
        with self._database.session() as session, session.begin():
            session.execute(delete(KeyRow).where(KeyRow.name == name))
        self._replace({each: key for each, key in self._stored.items() if each != digest})

    def _get(self, name: str) -> tuple[str, StoredKey]:
        for digest, key in self._stored.items():
            if key.name == name:
                return digest, key
        available = ", ".join(sorted(key.name for key in self._stored.values())) or "none"
        raise Refused(f"key {name!r} not found; available: {available}", 404)

    def _replace(self, stored: dict[str, StoredKey]) -> None:
        self._stored, self._routes = stored, _routes(stored)
        self.on_change()


def _check_expiry(name: str, expires: float, now: float) -> None:
    if expires and expires <= now:
        raise Refused(f"cannot set key {name!r}: its expiry is in the past", 422)


def _routes(stored: Mapping[str, StoredKey]) -> dict[str, KeyInfo]:
    """Return the keys by each digest that is, or for some time was, one of theirs."""
    routes: dict[str, KeyInfo] = {}
    for digest, key in stored.items():
        routes[digest] = shown = _shown(key)
        if key.previous_digest:
            until = min(key.expires or key.previous_until, key.previous_until)
            routes[key.previous_digest] = shown.model_copy(update={"expires": until})
    return routes


def _shown(key: StoredKey) -> KeyInfo:
    return KeyInfo.model_construct(**{name: getattr(key, name) for name in KeyInfo.model_fields})


def _dumped(key: StoredKey) -> str:
    """Without what has its default value: an earlier release does not take a key with a field that it does not know."""
    return key.model_dump_json(exclude_defaults=True)
