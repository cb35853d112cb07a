"""A model behind an OpenAI-compatible endpoint: log-probabilities of tokens that it is sent.

``POST URL/completions`` with ``prompt`` (token ids), ``echo``, ``logprobs`` 1 and ``max_tokens`` 0,
as vLLM answers it. The weights are never seen: a certificate says so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from rankfold.data.example import describe
from rankfold.data.parts import Part
from rankfold.errors import InputError, require, visible
from rankfold.files.digests import json_digest
from rankfold.machine.progress import Progress
from rankfold.others.address import TIMEOUT
from rankfold.others.address import is_url as is_url
from rankfold.others.source import Identity
from rankfold.tasks.evaluation import Evaluation

RETRIES = 4  # further tries where the server is busy or can't be reached
BACKOFF = 0.5  # seconds before the second try; doubled for each further one
LARGEST = 64 << 20  # bytes of one answer
BUSY = (429, 500, 502, 503, 504)
ROUNDING = 1e-2  # nats of one token that a server's answers to the same text may differ by


class Endpoint:
    """Losses of the model that an endpoint serves, in nats per token."""

    task = "causal-lm"
    unit = "nats per token"

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        key_variable: str = "RANKFOLD_API_KEY",
        timeout: float = TIMEOUT,
        retries: int | None = None,
    ) -> None:
        """Ask the endpoint which models it serves.

        Args:
            url: Its address up to ``/v1``.
            model: Name of the model there; None where it serves one alone.
            key_variable: Variable of the environment that holds the key; none is sent where the
                variable isn't set.
            timeout: Seconds that one answer may take.
            retries: Further tries where it is busy or can't be reached; None for ``RETRIES``.

        Raises:
            InputError: It can't be reached, doesn't serve the model, or several.
        """
        self._url, retries = _checked(url), RETRIES if retries is None else retries
        self._http: Any = require("urllib3", "endpoint")
        self._key, self._key_variable = os.environ.get(key_variable), key_variable
        if self._key is not None and not self._key.isascii():
            raise InputError(f"the key in {key_variable} has characters that no header takes.")
        again = self._http.Retry(
            total=retries, redirect=0, backoff_factor=BACKOFF, status_forcelist=BUSY,
            allowed_methods=None, raise_on_status=False,
        )  # fmt: skip
        self._pool = self._http.PoolManager(
            timeout=self._http.Timeout(timeout), retries=again, num_pools=1
        )
        self._timeout, self._retries = timeout, retries
        self.model = self._only_model() if model is None else model
        known = {"url": self._url, "model": self.model}
        name = f"{self.model} at {self._url}"
        self.identity = Identity("endpoint", name, json_digest(known), weights_seen=False)

    def check(self, part: Part) -> None:
        """Ask for one example twice.

        Raises:
            InputError: The server doesn't give what is needed, or another answer each time.
        """
        ids = _ids(part.examples[0])
        first, second = self._log_probabilities(ids), self._log_probabilities(ids)
        if float((first - second).abs().max()) > ROUNDING:
            raise InputError(
                f"{self.identity.name} gives other log-probabilities for the same text: they "
                f"differ by {float((first - second).abs().max()):.3g} nats. Expected the same; "
                "run the server without sampling and without other load."
            )

    def losses(self, part: Part, progress: Progress, stage: str, *, finite: bool) -> Evaluation:
        """Mean loss of the tokens after the first one of each example.

        Raises:
            InputError: The server gives something else than was asked for; its tries are over.
        """
        means, terms = [], []
        for example in progress.track(part.examples, stage, len(part.examples)):
            found = self._log_probabilities(_ids(example))
            means.append(-float(found.mean()))
            terms.append(float(len(found)))
        as_tensor = torch.tensor(means, dtype=torch.float64)
        return Evaluation(as_tensor, torch.tensor(terms, dtype=torch.float64), None)

    def _log_probabilities(self, ids: list[int]) -> Tensor:
        """``(length - 1,)`` nats of each token given those before it."""
        answer = self._asked(
            "POST", "/completions",
            {
                "model": self.model, "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1,
                "temperature": 0,
            },
        )  # fmt: skip
        try:
            choice = answer["choices"][0]
            found = choice["logprobs"]["token_logprobs"]
        except (KeyError, IndexError, TypeError):
            found = None
        if not isinstance(found, list):
            raise self._refused("its answer has no choices[0].logprobs.token_logprobs")
        if len(found) != len(ids):
            raise self._refused(
                f"it gives {len(found)} log-probabilities for {len(ids)} tokens: it adds a start "
                "token, reads another tokenizer's ids, or writes on"
            )
        if found[0] is not None and not isinstance(found[0], int | float):
            raise self._refused("its token_logprobs are no numbers")
        numbers = found[1:]
        for place, one in enumerate(numbers, 1):
            number = isinstance(one, int | float) and not isinstance(one, bool)
            if not number or not math.isfinite(one) or one > 1e-3:
                raise self._refused(
                    f"the log-probability of token {place} is {visible(repr(one))[:40]}"
                )
        return torch.tensor(numbers, dtype=torch.float64)

    def _only_model(self) -> str:
        answer = self._asked("GET", "/models", None)
        listed = answer.get("data") if isinstance(answer, Mapping) else None
        names = [
            one["id"]
            for one in (listed if isinstance(listed, list) else [])
            if isinstance(one, Mapping) and isinstance(one.get("id"), str)
        ]
        if len(names) != 1:
            raise InputError(
                f"the endpoint {self._url} serves {len(names)} models"
                + (f" ({', '.join(map(visible, names[:20]))})" if names else "")
                + "; expected one. Name the one to be compared with endpoint_model=."
            )
        return str(names[0])

    def _asked(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        """The answer's JSON."""
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        content = None if body is None else json.dumps(body).encode()
        try:
            answer = self._pool.request(
                method, self._url + path, body=content, headers=headers, preload_content=False
            )
            status, text = answer.status, answer.read(LARGEST + 1)
            answer.release_conn()
        except self._http.exceptions.HTTPError as error:
            raise InputError(self._unreachable(error)) from error
        if status in (401, 403):
            has = "is refused" if self._key else "is missing"
            raise InputError(
                f"the endpoint {self._url} answers {status}: the key {has}. Put the right one in "
                f"the variable {self._key_variable} of the environment."
            )
        if status != 200:
            said = " ".join(visible(text[:300].decode("utf-8", "replace")).split())
            raise InputError(
                f"the endpoint {self._url} answers {status} to {path}: {said}. Expected 200: an "
                "OpenAI-compatible server, its address up to /v1, and a model that it serves."
            )
        if len(text) > LARGEST:
            raise self._refused(f"its answer to {path} is longer than {LARGEST} bytes")
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise self._refused(f"its answer to {path} is no JSON") from None

    def _unreachable(self, error: Exception) -> str:
        reason = visible(getattr(error, "reason", None) or error)
        if isinstance(getattr(error, "reason", error), self._http.exceptions.TimeoutError):
            reason = f"no answer within {self._timeout:g} s"
        return (
            f"the endpoint {self._url} can't be reached, in {self._retries + 1} tries at most: "
            f"{reason}. Look whether the server runs there, or give it more time."
        )

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"the endpoint {self._url} can't be certified: {what}. Expected the log-probability "
            "of each token that it is sent: /completions with token ids as prompt, echo and "
            "logprobs, as vLLM answers it, by a model with the original's tokenizer."
        )


def _checked(url: str) -> str:
    """An address without a name, a password or a question in it."""
    parts = urlsplit(url)
    if not parts.hostname or parts.query or parts.fragment or parts.username or parts.password:
        raise InputError(
            f"the endpoint is {visible(url.rpartition('@')[2])}; expected an address such as "
            "http://localhost:8000/v1, without a user, a password, ? or #."
        )
    return url.rstrip("/")


def _ids(example: object) -> list[int]:
    """Token ids of an example that is a piece of text and nothing else.

    Raises:
        InputError: It has labels or padding, or is no text.
    """
    value: object = example
    if isinstance(example, Mapping):
        mask = example.get("attention_mask")
        whole = mask is None or (torch.is_tensor(mask) and bool((mask == 1).all()))
        value = example.get("input_ids") if whole and "labels" not in example else None
    if not torch.is_tensor(value) or value.dim() != 1 or value.is_floating_point():
        raise InputError(
            f"an endpoint is asked for the tokens of a text, and an example is {describe(example)}"
            "; expected windows of tokens of plain text, without labels."
        )
    if len(value) < 2:
        raise InputError("an example has one token; a loss needs 2 or more.")
    return [int(one) for one in value.tolist()]
