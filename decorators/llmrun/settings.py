"""All settings: `LLMRUN_*` environment variables (docs/reference/settings.md is generated from them).

`import llmrun` does not import this module, to stay fast.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from llmrun.errors import ClusterError

DEFAULT_URL = "http://127.0.0.1:8000"
# Of these, an LLMRUN_HOME has at least one.
HOME_ENTRIES = frozenset(
    {"admin.key", "ray.token", "cluster.json", "llmrun.db", "logs", "weights", "packages", "environments"}
)
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseSettings):
    """Settings of the command line, the cluster's head and its nodes. Times are in seconds."""

    model_config = SettingsConfigDict(env_prefix="LLMRUN_", extra="ignore", frozen=True)

    home: Path = Field(
        default=Path("~/.llmrun"), description="Directory of a node's state: database, keys, logs, environments."
    )
    url: str = Field(
        default="",
        description=f"URL of the ingress. By default that of the cluster that `llmrun up` started from this home, "
        f"otherwise {DEFAULT_URL}.",
    )
    admin_key: str = Field(
        default="",
        description="Key for control. By default the content of the file `admin.key` in the home, which commands send "
        "only to the cluster of this home.",
    )
    weights_dir: Path | None = Field(
        default=None, description="Directory of a node's weights. By default `weights` in the home."
    )
    weights_max_bytes: int = Field(
        default=0, ge=0, description="Largest size of a node's weights, in bytes. 0: limited only by the disk."
    )
    database_url: str = Field(
        default="",
        description="SQLAlchemy URL of control's database. By default the SQLite file `llmrun.db` in the home.",
    )
    wake_timeout: float = Field(
        default=540, gt=0, description="Longest wait of a request for its model to start. After that it gets a 503."
    )
    start_timeout: float = Field(
        default=3600, gt=0, description="Longest time from an engine's start until it is ready."
    )
    forkserver: bool = Field(
        default=True,
        description="Whether each node runs a fork server: a process with the engine's code loaded, from which engines "
        "are forked.",
    )
    node_idle_timeout: float = Field(
        default=300,
        gt=0,
        description="Time without a replica after which a node is released, so that an autoscaler can remove it.",
    )
    place_timeout: float = Field(
        default=60,
        gt=0,
        description="Longest wait of a deploy for Ray to place the first replica when there is enough capacity.",
    )
    drain_timeout: float = Field(
        default=600,
        gt=0,
        description="Longest wait for requests in flight, of a replica that stops, `llmrun down` and `llmrun restart`.",
    )
    hook_timeout: float = Field(default=30, gt=0, description="Longest time of a user's hook for one request.")
    max_body_bytes: int = Field(
        default=32 * 2**20,
        gt=0,
        description="Largest request body that the ingress accepts, in bytes. Larger ones get a 413.",
    )
    max_held_bytes: int = Field(
        default=2**30,
        gt=0,
        description="Largest size of the request bodies that an ingress process holds, in bytes: those that are being "
        "read, that wait, or that have no response yet. One API key may hold half of it. Beyond that, requests get a "
        "503, or a 429.",
    )
    body_timeout: float = Field(
        default=60,
        gt=0,
        description="Longest pause while a request body arrives. A body that is slower than 16 KiB per second for "
        "longer than this also gets a 408.",
    )

    keepalive_timeout: float = Field(
        default=620,
        gt=0,
        description="How long an idle connection of a client stays open. It must be longer than the client, or a proxy "
        "in between, keeps it, who would otherwise send a request into a connection that closes. Go keeps 90 s, "
        "Google's load balancer 600 s.",
    )
    stream_comments: bool = Field(
        default=True,
        description="Whether a stream that waits for its model for 10 s gets a 200 and comments, so that no proxy "
        "times out. `X-LLMRun-Comments: off` turns them off for one request.",
    )

    cors_origins: str = Field(
        default="",
        description="Origins of web pages that may call the ingress: comma-separated, or `*` for all. By default none.",
    )
    tls_cert: str = Field(
        default="",
        description="PEM file with the certificate, and its chain, that the ingress presents; with it, clients use "
        "`https://`. A renewed file is used within 10 seconds.",
    )
    tls_key: str = Field(default="", description="PEM file with the certificate's key, if it is not in the same file.")
    ca_file: str = Field(
        default="",
        description="PEM file with the authorities that commands trust for `https://` URLs, instead of public ones.",
    )
    admin_host: str = Field(
        default="",
        description="Address of this machine at which llmrun's own API can be reached from other machines, or "
        "`0.0.0.0` for all. By default it can be reached from this machine only.",
    )
    allowed_hosts: str = Field(
        default="",
        description="Names, comma-separated, under which an endpoint without API keys may be called, besides "
        "`localhost` and IP addresses.",
    )
    require_key: bool | None = Field(
        default=None,
        description="Whether requests need an API key. By default with `--host` beyond this machine, and from the "
        "first key on, also when the last one has been revoked. `false`: only while there are keys.",
    )
    metrics_token: str = Field(
        default="",
        description="Token with which Prometheus reads `/metrics`. Without it, an endpoint beyond this machine, or "
        "one that requires keys, asks for the admin key.",
    )
    engine_env: str = Field(
        default="",
        description="Names of further environment variables of a node that its engines and hooks get, separated by "
        "commas; `NAME_*` stands for all that begin so. By default they get those of devices and libraries, but no "
        "secrets.",
    )
    trusted_network: bool = Field(
        default=False,
        description="Whether only trusted machines can reach the nodes' network. `nodes=` requires it: the members of "
        "an engine on several nodes run what arrives there, without a credential.",
    )
    ingresses: int = Field(
        default=1, ge=1, le=64, description="Number of ingress processes on the head. They share one port."
    )
    connect_timeout: float = Field(default=5, gt=0, description="Longest time to connect to an engine.")
    first_byte_timeout: float = Field(
        default=0, ge=0, description="Longest wait for the first byte of an engine's response. 0: no limit."
    )
    idle_stream_timeout: float = Field(
        default=0, ge=0, description="Longest pause in an engine's response. 0: no limit."
    )
    request_timeout: float = Field(
        default=0, ge=0, description="Longest time of a request, including its wait for a replica. 0: no limit."
    )
    api_key: str = Field(default="", description="API key that `llmrun chat` sends. By default the admin key.")
    insecure: bool = Field(
        default=False, description="Whether commands send keys over `http://` to other machines, unencrypted."
    )

    @property
    def root(self) -> Path:
        """The absolute path of the home."""
        return self.home.expanduser().absolute()

    @property
    def weights_root(self) -> Path:
        """The absolute path of this node's weights."""
        return (self.weights_dir or self.root / "weights").expanduser().absolute()

    @property
    def admin_key_file(self) -> Path:
        """The file with the admin key, on the head."""
        return self.root / "admin.key"

    @property
    def cluster_file(self) -> Path:
        """The file with the addresses of the cluster that runs from this home."""
        return self.root / "cluster.json"

    @property
    def stopped_file(self) -> Path:
        """The file that says when (Unix time) and why the cluster of this home stopped by itself, as JSON."""
        return self.root / "stopped.json"

    def stop_reason(self) -> str:
        """Return when and why the cluster of this home stopped by itself, "" if it did not."""
        try:
            stopped = json.loads(self.stopped_file.read_text())
            at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stopped["at"]))
            return f"the cluster stopped at {at}: {stopped['cause']}. See {self.root / 'logs' / 'cluster.log'}."
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def resolved_url(self) -> str:
        """Return the ingress's URL: the setting, else that of the running local cluster, else the default."""
        return self.url.rstrip("/") if self.url else self._own_url()

    def _own_url(self) -> str:
        try:
            return str(json.loads(self.cluster_file.read_text())["url"])
        except (OSError, ValueError, KeyError, TypeError):
            return DEFAULT_URL

    def own_certificate(self) -> str:
        """Return the path of the certificate of the cluster that runs from this home, "" if it has none."""
        try:
            return str(json.loads(self.cluster_file.read_text()).get("tls_cert", ""))
        except (OSError, ValueError, AttributeError):
            return ""

    def is_own(self, url: str) -> bool:
        """Whether `url` is that of the cluster that runs, or would be started, from this home."""
        return _place(url) == _place(self._own_url())

    def resolved_admin_key(self) -> str:
        """Return the admin key: the setting, else the one in the home, else ""."""
        return self.admin_key or self.stored_admin_key()

    def stored_admin_key(self) -> str:
        """Return the admin key in the home, or ""."""
        try:
            return self.admin_key_file.read_text().strip()
        except OSError:
            return ""

    def resolved_database_url(self) -> str:
        """Return the database's URL: the setting, else SQLite in the home."""
        return self.database_url or f"sqlite:///{self.root / 'llmrun.db'}"

    def make_home(self) -> None:
        """Open the home of a head: `open_home`, and create its admin key (mode 0600). Raises ClusterError."""
        self.open_home()
        read_or_create_secret(self.admin_key_file)

    def open_home(self) -> None:
        """Create the home if it does not exist, and keep this process's files from other users. Raises ClusterError.

        1. What this process and its children create is for this user alone, whatever the umask was.
        2. A home of an earlier release, and an empty directory, get the mode 0700.
        3. Another directory that others can enter is refused: they may need what else is in it.
        """
        # 1.
        os.umask(0o077)
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
            mode = stat.S_IMODE(self.root.stat().st_mode)
            if not mode & 0o077:
                return
            # 2.
            entries = {entry.name for entry in self.root.iterdir()}
            if not entries or entries & HOME_ENTRIES:
                self.root.chmod(0o700)
                return
        except OSError as error:
            text = f"cannot open LLMRUN_HOME {self.root}: {error.strerror or error}. Set LLMRUN_HOME to a directory of"
            raise ClusterError(f"{text} this user") from error
        # 3.
        raise ClusterError(
            f"other users can enter LLMRUN_HOME {self.root} (mode {mode:04o}), and it has files that are not of "
            f"llmrun: set LLMRUN_HOME to a directory of its own, or run `chmod 700 {self.root}`"
        )


def _place(url: str) -> tuple[str, str, int | None]:
    """Return a URL's scheme, host and port; all names of the loopback interface are one."""
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = None
    host = parts.hostname or ""
    return parts.scheme, LOOPBACK[0] if host in LOOPBACK else host, port


def replace_secret(path: Path) -> str:
    """Write a new secret (mode 0600, 256 random bits) to `path` in one step, and return it. Raises OSError."""
    secret = secrets.token_hex(32)
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secret)
            file.flush()
            os.fsync(descriptor)
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    return secret


def read_or_create_secret(path: Path) -> str:
    """Return the secret in `path`; create it (mode 0600, 256 random bits) if it does not exist."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text().strip()
    with os.fdopen(descriptor, "w") as file:
        secret = secrets.token_hex(32)
        file.write(secret)
    return secret
