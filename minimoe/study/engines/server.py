"""Ask a server of vLLM or SGLang what its routers choose: one request is one window of token ids, never text.

A window asks for one more token, because an engine that generates none returns no routing, or not that of the last
token. Replies keep their window's place, so a trace does not depend on the order in which they come.
"""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from minimoe.errors import ConfigError, MinimoeError, TraceError
from minimoe.study.engines import replies
from minimoe.study.engines.replies import Experts, Shape
from minimoe.study.models import FoundModel
from minimoe.study.record import ForeignSource, Progress, Row, Window
from minimoe.study.trace import TraceDocument

RETRIED = (429, 500, 502, 503, 504)
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  #: seconds before new attempts, if the server says nothing
TIMEOUT = 120.0  #: seconds without a byte
PROBE = 256  #: tokens
AGAIN = 100  #: of so many windows one is asked again, alone


@dataclass(frozen=True)
class Server:
    """Where a model is served: `engine` auto, vllm or sglang; `key` is sent as a bearer token and kept nowhere.

    Raises ConfigError: no URL of http, or a key that would cross a network in clear text (unless `insecure`).
    """

    url: str
    engine: str = "auto"
    key: str = ""
    concurrency: int = 16
    insecure: bool = False

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            raise ConfigError(f"{self.url!r}: expected a URL such as http://127.0.0.1:8000")
        if self.key and parts.scheme == "http" and not self.local and not self.insecure:
            raise ConfigError(
                f"the key would go to {parts.hostname} in clear text; give an https URL, or --insecure if the network "
                "between is your own"
            )

    @property
    def local(self) -> bool:
        """Whether it is this machine."""
        host = urlsplit(self.url).hostname or ""
        return host in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d+){3}", host))


class ServedModel(ForeignSource):
    """A model behind a server, which answers windows; `identity` tells it from others.

    Raises TraceError: no answer, another model or engine than expected, or a probe of fixed ids that fails the checks
    or is answered in two ways. MinimoeError: the package httpx is missing.
    """

    def __init__(self, found: FoundModel, server: Server) -> None:
        try:
            self._httpx: Any = importlib.import_module("httpx")
        except ImportError as error:
            raise MinimoeError("a server is asked by httpx: pip install httpx") from error
        self.server, self.shape, self._total = server, Shape.of(found), Counter[str]()
        self._stopped = threading.Event()
        self._client = self._httpx.Client(
            base_url=server.url,
            headers={"Authorization": f"Bearer {server.key}"} if server.key else {},
            timeout=self._httpx.Timeout(TIMEOUT, connect=10),
            limits=self._httpx.Limits(max_connections=server.concurrency),
            trust_env=not server.local,  # a proxy has no way to this machine
        )  # which follows no redirect, so the key goes nowhere else
        models = [m for m in self._get("/v1/models").get("data", []) if isinstance(m, dict)]
        named = [m for m in models if found.name in (m.get("id"), m.get("root"))]
        if not named and len(models) != 1:
            listed = ", ".join(str(m.get("id")) for m in models) or "none"
            raise TraceError(f"{server.url} serves {listed}, not {found.name}: give it that name")
        entry: dict[str, Any] = (named or models)[0]
        self.name = str(entry.get("id"))
        self.engine = server.engine if server.engine != "auto" else str(entry.get("owned_by"))
        if self.engine not in ("vllm", "sglang"):
            raise TraceError(f"{server.url} is {self.engine!r}; give --engine vllm or sglang")
        about = self._get("/version") or self._get("/server_info") or self._get("/get_server_info")
        # one token is generated beside a window
        longest = int(entry.get("max_model_len") or sys.maxsize) - 1
        super().__init__(found.layers, found.num_experts, longest)
        count = min(PROBE, longest)
        self._ids = (np.arange(1, count + 1) * 7919 % found.vocab_size).tolist()
        self._probe = self._digest()
        if self._probe != self._digest():
            raise TraceError(
                f"{server.url} chose other experts for the same {count} tokens when it was asked twice, so a trace "
                "could not be told from one of another model; let nothing else run on it, or start it batch invariant"
            )
        version = about.get("version", "of unknown version")
        self.identity = {"engine": f"{self.engine} {version}", "served": self.name}
        self.identity |= {"root": str(entry.get("root")), "max_model_len": str(longest + 1)}
        self.identity |= {"probe_sha256": self._probe}

    def ask(
        self, every: list[Window], documents: Sequence[TraceDocument], progress: Progress
    ) -> tuple[list[Row], dict[str, str]]:
        """The windows' rows; one of `AGAIN` windows is asked again alone, and the probe at the end."""
        counts, rows, held = Counter[str](), list[Row](), dict[int, Experts]()
        with ThreadPoolExecutor(self.server.concurrency) as pool:
            try:
                futures = [pool.submit(self.read, window.tokens.tolist()) for window in every]
                for number, (window,) in enumerate(progress([[w] for w in every])):
                    expert = futures[number].result()
                    if number % AGAIN == 0:
                        held[number] = expert
                    chosen = expert[window.context :]
                    rows.append(replies.checked_row(window, chosen, self.shape, counts))
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self._client.close()
                raise
        for number, expert in held.items():
            alone = self.read(every[number].tokens.tolist(), uuid.uuid4().hex)
            same = (alone == expert).all(axis=2)
            counts.update(again=1, compared=same.size, same=int(same.sum()))
        self._total.update(counts)
        replies.settled(rows, documents, self._total)
        if self._digest() != self._probe:
            raise TraceError(
                f"{self.server.url} answers the probe otherwise than at the start, so another model, version or "
                "precision is there now; the choices since the last chunk are not kept"
            )
        return rows, replies.meta_of(counts)

    def read(self, ids: list[int], salt: str = "") -> Experts:
        """[n, L, K] sorted choices for n ids; a reply with a fault is asked for once more, past the server's cache.

        Raises TraceError: no reply, or a second one that is not the choices of this model for these ids.
        """
        fault: TraceError | None = None
        for each in (salt, uuid.uuid4().hex):
            reply = self._send("POST", *self._request(ids, each))
            try:
                expert = replies.decode(self._routing(reply, ids), len(ids), self.shape)
            except TraceError as error:
                fault = error
            else:
                if each != salt or replies.sound(expert, self.num_experts)[0].all():
                    return expert
        raise TraceError(f"{self.server.url}: {fault}") from fault

    def _digest(self) -> str:
        expert = self.read(self._ids, uuid.uuid4().hex)
        if faults := replies.sound(expert, self.num_experts)[1]:
            raise TraceError(
                f"{self.server.url}: no whole choice for probed tokens: {dict(faults)}"
            )
        text = f"{expert.shape}".encode() + expert.astype("<i2").tobytes()
        return hashlib.sha256(text).hexdigest()

    def _request(self, ids: list[int], salt: str) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"input_ids": ids, "return_routed_experts": True}
        if self.engine == "sglang":
            return "/generate", body | {"sampling_params": {"max_new_tokens": 1, "temperature": 0}}
        body = {"model": self.name, "prompt": ids, "max_tokens": 1, "temperature": 0}
        body |= {"return_token_ids": True} | ({"cache_salt": salt} if salt else {})
        return "/v1/completions", body

    def _routing(self, reply: Any, ids: list[int]) -> Any:
        """What the reply holds of choices, if it is one of this model to these ids."""
        try:
            held = reply["choices"][0] if self.engine == "vllm" else reply["meta_info"]
            answered, count = reply.get("model", self.name), held.get("prompt_tokens", len(ids))
            same = held.get("prompt_token_ids", ids) == ids and count == len(ids)
            routing = held.get("routed_experts")
        except (LookupError, TypeError, AttributeError) as error:
            raise TraceError(f"a reply of unknown form: {str(reply)[:120]}") from error
        if answered != self.name or not same:
            to = "" if same else " to other token ids than those sent"
            raise TraceError(f"model {answered!r} answered{to}, asked was {self.name!r}")
        return routing

    def _get(self, path: str) -> dict[str, Any]:
        found = self._send("GET", path, absent={})
        return found if isinstance(found, dict) else {}

    def _send(self, method: str, path: str, body: Any = None, absent: Any = None) -> Any:
        """The JSON of a reply; `absent` where the server knows no such path. Tried again where that may help."""
        fault = ""
        for wait in (*WAITS, None):
            try:
                reply = self._client.request(method, path, json=body)
                if reply.is_success:
                    return reply.json()
            except ValueError:
                fault = "a reply that is no JSON"
            except (self._httpx.TransportError, RuntimeError) as error:  # or `ask` has closed it
                fault = f"{type(error).__name__}: {error}"
            else:
                if reply.status_code == 404 and absent is not None:
                    return absent
                fault = f"{reply.status_code} {self._words(reply)}"
                if reply.status_code not in RETRIED:
                    key = "; give its key with --api-key-env" * (reply.status_code in (401, 403))
                    raise TraceError(f"{self.server.url} refused {path}: {fault}{key}")
                after = reply.headers.get("Retry-After", "")
                wait = min(float(after), 600.0) if after.isdecimal() and wait else wait
            if wait is None or self._stopped.wait(wait):
                break
        raise TraceError(
            f"{self.server.url} does not answer {path} ({fault}, after {len(WAITS) + 1} attempts); what was recorded "
            "is kept, and the same command goes on"
        )

    def _words(self, reply: Any) -> str:
        """The server's own, without the key that it may have repeated."""
        try:
            said: Any = reply.json()
            said = said.get("error") or said.get("message") or said.get("detail")
            said = said.get("message") if isinstance(said, dict) else said
        except (ValueError, AttributeError):
            said = reply.text or reply.headers.get("Location", "")
        text = " ".join(str(said).split())[:300]
        return text.replace(self.server.key, "…") if self.server.key else text


def served(found: FoundModel, server: Server) -> FoundModel:
    """The model as a server has it: its identity says so, and what is loaded is a `ServedModel`."""
    model = ServedModel(found, server)
    return replace(found, identity={**found.identity, **model.identity}, load=lambda: model)
