"""Every setting, in one place: `LLMRUN_*` variables (docs/settings.md lists them).

Not imported by `import llmrun`, which stays light.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_URL = "http://127.0.0.1:8000"


class Settings(BaseSettings):
    """What may be set, by the environment, for the command line and for a cluster's head. Times in seconds."""

    model_config = SettingsConfigDict(env_prefix="LLMRUN_", extra="ignore", frozen=True)

    home: Path = Field(
        default=Path("~/.llmrun"), description="Where a node keeps its state: database, keys, logs, environments."
    )
    url: str = Field(
        default="",
        description=f"The ingress. By default the one that this home's `llmrun up` started, else {DEFAULT_URL}.",
    )
    admin_key: str = Field(default="", description="The key for control. By default the one in the home's `admin.key`.")
    weights_dir: Path | None = Field(
        default=None, description="Where a node keeps weights. By default `weights` in the home."
    )
    weights_max_bytes: int = Field(
        default=0, ge=0, description="What weights may take of a node's disk. 0: as much as there is room."
    )
    database_url: str = Field(
        default="", description="Any SQLAlchemy URL. By default SQLite in the home (`llmrun.db`)."
    )
    wake_timeout: float = Field(
        default=540, gt=0, description="How long a request may wait for its model to wake, before it gets a 503."
    )
    start_timeout: float = Field(
        default=3600, gt=0, description="How long an engine may take from its start to its first answer."
    )
    forkserver: bool = Field(
        default=True,
        description="Whether a node keeps a process with the engine's code loaded, which new engines are forked from.",
    )
    node_idle_timeout: float = Field(
        default=300,
        gt=0,
        description="How long a node that an autoscaler could give back stays without a replica.",
    )
    place_timeout: float = Field(
        default=60, gt=0, description="How long a deploy waits for Ray to place the proof where there is room."
    )
    drain_timeout: float = Field(
        default=600, gt=0, description="How long a replica that ends waits for its requests in flight."
    )
    hook_timeout: float = Field(default=30, gt=0, description="How long a user's hook may take for one request.")
    max_body_bytes: int = Field(
        default=32 * 2**20, gt=0, description="The largest request body that the ingress takes (413 above)."
    )

    cors_origins: str = Field(
        default="", description="Web pages that may call the ingress: origins with commas between, or `*`."
    )
    ingresses: int = Field(
        default=1, ge=1, le=64, description="How many processes on the head are the ingress, on one port."
    )
    connect_timeout: float = Field(default=5, gt=0, description="How long the ingress tries to reach an engine.")
    first_byte_timeout: float = Field(
        default=0, ge=0, description="How long an engine may take to begin its answer. 0: as long as it wants."
    )
    idle_stream_timeout: float = Field(
        default=0, ge=0, description="How long an engine's answer may pause. 0: as long as it wants."
    )
    request_timeout: float = Field(
        default=0, ge=0, description="How long a request may take in all, waiting included. 0: as long as it wants."
    )
    api_key: str = Field(default="", description="The key that `llmrun chat` sends. By default the admin key.")

    @property
    def root(self) -> Path:
        """The home, absolute."""
        return self.home.expanduser().absolute()

    @property
    def weights_root(self) -> Path:
        """Where this node's weights lie, absolute."""
        return (self.weights_dir or self.root / "weights").expanduser().absolute()

    @property
    def admin_key_file(self) -> Path:
        """Where the head keeps the admin key."""
        return self.root / "admin.key"

    @property
    def cluster_file(self) -> Path:
        """Where a running cluster says how it can be reached."""
        return self.root / "cluster.json"

    def resolved_url(self) -> str:
        """The ingress's URL: as set, else the running local cluster's, else the default."""
        if self.url:
            return self.url.rstrip("/")
        try:
            return str(json.loads(self.cluster_file.read_text())["url"])
        except (OSError, ValueError, KeyError):
            return DEFAULT_URL

    def resolved_admin_key(self) -> str:
        """The admin key as set, else the home's; "" where there is none."""
        if self.admin_key:
            return self.admin_key
        try:
            return self.admin_key_file.read_text().strip()
        except OSError:
            return ""

    def resolved_database_url(self) -> str:
        """The database as set, else SQLite in the home."""
        return self.database_url or f"sqlite:///{self.root / 'llmrun.db'}"

    def make_home(self) -> None:
        """Make the home (mode 0700) and, once, its admin key (mode 0600)."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        secret_file(self.admin_key_file)


def secret_file(path: Path) -> str:
    """The secret in `path`, made there (mode 0600, 256 random bits) if it does not exist."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(handle, "w") as file:
        secret = secrets.token_hex(32)
        file.write(secret)
    return secret
