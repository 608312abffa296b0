"""HTTP client of control, and of the ingress for models. Does not know the terminal."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Iterator
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

import llmrun
from llmrun.errors import ControlError, Refused, Unreachable
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.wire import (
    BY_HEADER,
    CONTROL_ROOT,
    VERSION_HEADER,
    AdapterRow,
    AuditRow,
    CancelRequest,
    ColdStart,
    DeployRequest,
    DeployRow,
    Event,
    KeyChange,
    KeyFacts,
    KeyInfo,
    NewKey,
    Plan,
    Status,
    UsageLine,
    WeightsRequest,
    WeightsRow,
)
from llmrun_cli.credentials import admin_credentials, trusted

CONNECT_TIMEOUT_S = 5
READ_TIMEOUT_S = 60
UNPROCESSABLE = 422  # a message with fields that control does not know
# To plan, control resolves sources at their stores, which it bounds itself; a pushed adapter is unpacked.
PLAN_TIMEOUT_S = 330
Answer = TypeVar("Answer", bound=BaseModel)


class Client:
    """Client of the cluster at one URL. Every method raises Unreachable, Refused or ControlError."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.resolved_url()
        self._http = httpx.Client(
            base_url=self.url,
            headers={VERSION_HEADER: llmrun.__version__, BY_HEADER: user().encode("ascii", "replace").decode()},
            auth=admin_credentials(settings),
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
            verify=trusted(settings),
        )
        self._cluster_version = ""

    def status(self) -> Status:
        """Return the status of all deployed models."""
        return self._read(Status, self._call("GET", "/status"))

    def specs(self) -> list[ModelSpec]:
        """Return the active specs of all deployed models."""
        return [self._read(ModelSpec, spec) for spec in self._call("GET", "/specs")]

    def plan(self, request: DeployRequest) -> Plan:
        """Return the changes that a deploy would make."""
        return self._read(
            Plan, self._call("POST", "/plan", json=request.model_dump(mode="json"), timeout=PLAN_TIMEOUT_S)
        )

    def deploy(self, request: DeployRequest) -> str:
        """Start a deploy; return the operation's id."""
        return str(self._call("POST", "/deploys", json=request.model_dump(mode="json"), timeout=PLAN_TIMEOUT_S)["id"])

    def deploys(self) -> list[DeployRow]:
        """List the running deploys and the last ones that ended, the newest first."""
        return [self._read(DeployRow, row) for row in self._call("GET", "/deploys")]

    def cancel_deploy(self, operation: str, by: str) -> str:
        """Cancel a deploy; return its app."""
        body = CancelRequest(by=by).model_dump(mode="json")
        return str(self._call("POST", f"/deploys/{quote(operation, safe='')}/cancel", json=body)["app"])

    def weights(self) -> list[WeightsRow]:
        """List the weights on the nodes."""
        return [self._read(WeightsRow, row) for row in self._call("GET", "/weights")]

    def start_weights(self, request: WeightsRequest) -> str:
        """Start an operation on weights; return its id."""
        return str(self._call("POST", "/weights", json=request.model_dump(mode="json"))["id"])

    def events(self, operation: str) -> Iterator[Event]:
        """Follow an operation; yield its events up to its `end`, which is not yielded.

        Also raises ControlError if the events stop before the end.
        """
        for line in self._stream(f"/operations/{operation}/events"):
            event = self._read(Event, line)
            if event.kind == "end":
                return
            yield event
        raise ControlError(
            "control closed the connection before the operation finished: "
            "check its state with `llmrun status`, then run the command again"
        )

    def has_package(self, digest: str) -> bool:
        """Return whether control has a code package."""
        return self._send("HEAD", f"{CONTROL_ROOT}/packages/{digest}").status_code == 200

    def put_package(self, digest: str, data: bytes) -> None:
        """Upload a code package."""
        self._call("PUT", f"/packages/{digest}", content=data)

    def delete_model(self, model: str) -> list[str]:
        """Delete a model; return the names of the deleted models."""
        return list(self._call("DELETE", f"/models/{quote(model)}")["deleted"])

    def delete_app(self, app: str) -> list[str]:
        """Delete an app's models; return their names."""
        return list(self._call("DELETE", f"/apps/{quote(app)}")["deleted"])

    def warm(self, model: str) -> str:
        """Wake a model; return its name."""
        return str(self._call("POST", f"/warm/{quote(model)}")["model"])

    def unload(self, model: str) -> str:
        """Scale a model to zero; return its name."""
        return str(self._call("POST", f"/unload/{quote(model)}")["model"])

    def cold_starts(self, model: str) -> list[ColdStart]:
        """Return a model's last cold starts, newest first."""
        return [self._read(ColdStart, row) for row in self._call("GET", f"/cold-starts/{quote(model)}")]

    def adapters(self, model: str) -> list[AdapterRow]:
        """List a model's adapters."""
        return [self._read(AdapterRow, row) for row in self._call("GET", f"/adapters/{quote(model)}")]

    def push_adapter(self, name: str, tar: Iterator[bytes]) -> str:
        """Upload the adapter `model:adapter`; return the operation's id."""
        return str(self._call("PUT", f"/adapters/{quote(name)}", content=tar, timeout=PLAN_TIMEOUT_S)["id"])

    def model_entry(self, model: str) -> dict[str, Any]:
        """Return the entry of a model or an adapter in `/v1/models`."""
        entry: dict[str, Any] = self._request("GET", f"/v1/models/{quote(model)}")
        return entry

    def complete(self, model: str, timeout: float) -> None:
        """Generate one token with a model, within `timeout` seconds."""
        body = {"model": model, "prompt": "Hello", "max_tokens": 1}
        headers = {"x-llmrun-max-wait": f"{timeout:g}"}
        self._request("POST", "/v1/completions", json=body, headers=headers, timeout=timeout + READ_TIMEOUT_S)

    def keys(self) -> list[KeyFacts]:
        """List the API keys."""
        return [self._read(KeyFacts, row) for row in self._call("GET", "/keys")]

    def create_key(self, info: KeyInfo) -> NewKey:
        """Create an API key."""
        return self._read(NewKey, self._call("POST", "/keys", json=info.model_dump(mode="json")))

    def change_key(self, name: str, change: KeyChange) -> KeyFacts:
        """Change an API key's permissions and limits."""
        content = change.model_dump(mode="json", exclude_none=True)
        return self._read(KeyFacts, self._call("PATCH", f"/keys/{quote(name, safe='')}", json=content))

    def rotate_key(self, name: str, keep_s: float) -> NewKey:
        """Give an API key a new secret; the old one stays valid for `keep_s` seconds."""
        return self._read(NewKey, self._call("POST", f"/keys/{quote(name, safe='')}/rotate?keep_s={keep_s:g}"))

    def revoke_key(self, name: str) -> None:
        """Revoke an API key."""
        self._call("DELETE", f"/keys/{quote(name, safe='')}")

    def usage(self, by: str, since: str) -> list[UsageLine]:
        """Return usage from the day `since` on, grouped by the fields in `by` (`key,model`)."""
        query = f"?by={quote(by)}&since={quote(since)}"
        return [self._read(UsageLine, row) for row in self._call("GET", f"/usage{query}")]

    def audit(self, tail: int) -> list[AuditRow]:
        """Return the last changes of the cluster, the oldest first."""
        return [self._read(AuditRow, row) for row in self._call("GET", f"/audit?tail={tail}")]

    def logs(self, model: str, tail: int, follow: bool) -> Iterator[dict[str, str]]:
        """Yield chunks of a model's logs, each with a `source` and a `text`."""
        query = f"?tail={tail}&follow={str(follow).lower()}"
        yield from self._stream(f"/logs/{quote(model)}{query}")

    def _read(self, kind: type[Answer], content: Any) -> Answer:
        """Return an answer's content. Raises ControlError if a later release has changed it."""
        try:
            return kind.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            text = f"cannot read the cluster's answer: {kind.__name__}: {field}: {first['msg']}"
            raise ControlError(text + version_hint(self._cluster_version)) from error

    def _call(self, method: str, path: str, **content: Any) -> Any:
        return self._request(method, CONTROL_ROOT + path, **content)

    def _request(self, method: str, path: str, **content: Any) -> Any:
        response = self._send(method, path, **content)
        if response.is_error:
            raise to_error(response)
        return response.json() if response.content else None

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise unreachable(self.url, error) from error
        self._cluster_version = response.headers.get(VERSION_HEADER, "")
        return response

    def _stream(self, path: str) -> Iterator[Any]:
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        try:
            with self._http.stream("GET", CONTROL_ROOT + path, timeout=timeout) as response:
                self._cluster_version = response.headers.get(VERSION_HEADER, "")
                if response.is_error:
                    response.read()
                    raise to_error(response)
                for line in response.iter_lines():
                    yield json.loads(line)
        except httpx.RemoteProtocolError as error:
            raise ControlError(f"lost the connection to {self.url} ({error}): run the command again") from error
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from error


def user() -> str:
    """Return `user@host`, which names who changes something; the host alone if the user has no name."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container's user may have no name
        return socket.gethostname()


def unreachable(url: str, error: Exception) -> Unreachable:
    """Return the error for a cluster that cannot be reached, with the reason if this home's cluster has stopped."""
    settings = Settings()
    if url == settings.resolved_url() and (reason := settings.stop_reason()):
        return Unreachable(f"{reason} Start it again with `llmrun up`")
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return Unreachable(
            f"cannot reach llmrun at {url}: its certificate is not trusted ({error}). Set LLMRUN_CA_FILE to the file "
            f"of its authority, and use the name in the certificate"
        )
    return Unreachable(
        f"cannot reach llmrun at {url} ({error}): start a cluster with `llmrun up`, or set LLMRUN_URL to a running one"
    )


def to_error(response: httpx.Response) -> Refused:
    """Return the exception for an error response."""
    status, version = response.status_code, response.headers.get(VERSION_HEADER, "")
    try:
        error = response.json()["error"]
        text = str(error["message"]) + (version_hint(version) if status == UNPROCESSABLE else "")
        return Refused(text, status, str(error.get("code") or ""))
    except (ValueError, KeyError, TypeError):
        if version:
            return Refused(f"{response.request.url.path} is unknown to the cluster{version_hint(version)}", status)
        text = f"{response.request.url} returned {status} and is not an llmrun endpoint: check LLMRUN_URL"
        return Refused(text, status)


def version_hint(cluster: str) -> str:
    """Return what to do about a cluster of another version; "" for the same, or an unknown one."""
    own = llmrun.__version__
    if cluster in ("", own):
        return ""
    return f". This llmrun is {own}, the cluster runs {cluster}: install llmrun=={cluster} here, or upgrade the cluster"
