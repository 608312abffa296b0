"""The command line's client of control. Knows HTTP and the wire's messages; nothing of terminals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx

from llmrun.errors import ControlError, Refused, Unreachable
from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun.wire import (
    CONTROL_ROOT,
    AdapterRow,
    ColdStart,
    DeployRequest,
    Event,
    KeyInfo,
    NewKey,
    Plan,
    Status,
    UsageLine,
    WeightsRequest,
    WeightsRow,
)

CONNECT_TIMEOUT_S = 5
ANSWER_TIMEOUT_S = 60
# A plan asks the stores what names mean, which control bounds; an adapter that was sent is unpacked.
PLAN_TIMEOUT_S = 330


class Client:
    """Control at one URL. Every method raises Unreachable or Refused."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.resolved_url()
        key = settings.resolved_admin_key()
        self._http = httpx.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            trust_env=False,
        )

    def status(self) -> Status:
        """Everything that is deployed."""
        return Status.model_validate(self._call("GET", "/status"))

    def specs(self) -> list[ModelSpec]:
        """The specs of all models in force."""
        return [ModelSpec.model_validate(spec) for spec in self._call("GET", "/specs")]

    def plan(self, request: DeployRequest) -> Plan:
        """What a deploy would do."""
        return Plan.model_validate(
            self._call("POST", "/plan", json=request.model_dump(mode="json"), timeout=PLAN_TIMEOUT_S)
        )

    def deploy(self, request: DeployRequest) -> str:
        """Begin a deploy; its id."""
        return str(self._call("POST", "/deploys", json=request.model_dump(mode="json"), timeout=PLAN_TIMEOUT_S)["id"])

    def weights(self) -> list[WeightsRow]:
        """What lies on the nodes."""
        return [WeightsRow.model_validate(row) for row in self._call("GET", "/weights")]

    def start_weights(self, request: WeightsRequest) -> str:
        """Begin an errand for weights; the job's id."""
        return str(self._call("POST", "/weights", json=request.model_dump(mode="json"))["id"])

    def events(self, job: str) -> Iterator[Event]:
        """A job's events as they come, until its end."""
        for line in self._stream(f"/jobs/{job}/events"):
            yield Event.model_validate(line)

    def has_package(self, digest: str) -> bool:
        """Whether control has a code package."""
        return self._send("HEAD", f"{CONTROL_ROOT}/packages/{digest}").status_code == 200

    def put_package(self, digest: str, data: bytes) -> None:
        """Upload a code package."""
        self._call("PUT", f"/packages/{digest}", content=data)

    def delete_model(self, model: str) -> list[str]:
        """Remove a model; what was removed."""
        return list(self._call("DELETE", f"/models/{quote(model)}")["deleted"])

    def delete_app(self, app: str) -> list[str]:
        """Remove an app's models; what was removed."""
        return list(self._call("DELETE", f"/apps/{quote(app)}")["deleted"])

    def warm(self, model: str) -> str:
        """Wake a model; its name."""
        return str(self._call("POST", f"/warm/{quote(model)}")["model"])

    def unload(self, model: str) -> str:
        """Send a model to zero; its name."""
        return str(self._call("POST", f"/unload/{quote(model)}")["model"])

    def starts(self, model: str) -> list[ColdStart]:
        """A model's last cold starts, the newest first."""
        return [ColdStart.model_validate(row) for row in self._call("GET", f"/starts/{quote(model)}")]

    def adapters(self, model: str) -> list[AdapterRow]:
        """The adapters of a model."""
        return [AdapterRow.model_validate(row) for row in self._call("GET", f"/adapters/{quote(model)}")]

    def push_adapter(self, name: str, tar: Iterator[bytes]) -> str:
        """Upload the adapter `model:adapter`; the job's id."""
        return str(self._call("PUT", f"/adapters/{quote(name)}", content=tar, timeout=PLAN_TIMEOUT_S)["id"])

    def listed(self, model: str) -> dict[str, Any]:
        """A model, or an adapter, as OpenAI's API lists it."""
        found: dict[str, Any] = self._ask("GET", f"/v1/models/{quote(model)}")
        return found

    def complete(self, model: str, timeout: float) -> None:
        """Have a model answer with one token; seconds until it must."""
        body = {"model": model, "prompt": "Hello", "max_tokens": 1}
        headers = {"x-llmrun-max-wait": f"{timeout:g}"}
        self._ask("POST", "/v1/completions", json=body, headers=headers, timeout=timeout + ANSWER_TIMEOUT_S)

    def keys(self) -> list[KeyInfo]:
        """The API keys that there are."""
        return [KeyInfo.model_validate(row) for row in self._call("GET", "/keys")]

    def create_key(self, facts: KeyInfo) -> NewKey:
        """Make an API key."""
        return NewKey.model_validate(self._call("POST", "/keys", json=facts.model_dump(mode="json")))

    def revoke_key(self, name: str) -> None:
        """Remove an API key."""
        self._call("DELETE", f"/keys/{quote(name, safe='')}")

    def usage(self, by: str, since: str) -> list[UsageLine]:
        """What was used, told apart by `by` (`key,model`), from the day `since` on."""
        query = f"?by={quote(by)}&since={quote(since)}"
        return [UsageLine.model_validate(row) for row in self._call("GET", f"/usage{query}")]

    def logs(self, model: str, tail: int, follow: bool) -> Iterator[dict[str, str]]:
        """Pieces of the model's logs: `source` and `text`."""
        query = f"?tail={tail}&follow={str(follow).lower()}"
        yield from self._stream(f"/logs/{quote(model)}{query}")

    def _call(self, method: str, path: str, **content: Any) -> Any:
        return self._ask(method, CONTROL_ROOT + path, **content)

    def _ask(self, method: str, path: str, **content: Any) -> Any:
        answer = self._send(method, path, **content)
        if answer.is_error:
            raise refused(answer)
        return answer.json() if answer.content else None

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **content)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error

    def _stream(self, path: str) -> Iterator[Any]:
        timeout = httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        try:
            with self._http.stream("GET", CONTROL_ROOT + path, timeout=timeout) as answer:
                if answer.is_error:
                    answer.read()
                    raise refused(answer)
                for line in answer.iter_lines():
                    yield json.loads(line)
        except httpx.RemoteProtocolError as error:
            raise ControlError(f"the connection to {self.url} broke off ({error}): run the command again") from error
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            f"nothing of llmrun's answers at {self.url} ({error}): "
            f"start a cluster with `llmrun up`, or set LLMRUN_URL to where one runs"
        )


def refused(answer: httpx.Response) -> Refused:
    """What an answer that is an error says, to be raised."""
    try:
        error = answer.json()["error"]
        return Refused(str(error["message"]), answer.status_code, str(error.get("code") or ""))
    except (ValueError, KeyError, TypeError):
        text = f"{answer.request.url} answered {answer.status_code}, which is not llmrun's: see LLMRUN_URL"
        return Refused(text, answer.status_code)
