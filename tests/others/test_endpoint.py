"""A model behind an endpoint: the losses of the model itself, and each thing that can fail."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rankfold.data.parts import as_part
from rankfold.errors import InputError
from rankfold.machine.progress import SilentProgress
from rankfold.others import endpoint
from rankfold.others.endpoint import Endpoint, is_url
from rankfold.tasks.evaluation import evaluate
from rankfold.tasks.supervised import CausalLM
from tests.others.served import Server, served
from tests.small_models import tiny_llama, token_windows

PART = as_part("held_out", token_windows(4))


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with served(tiny_llama()) as server:
        yield server


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr(endpoint, "BACKOFF", 0.0)
    running.asked.clear()
    running.key, running.busy, running.names = None, 0, ["tiny"]
    running.change = lambda answer: answer
    return running


def losses(one: Endpoint) -> Any:
    return one.losses(PART, SilentProgress(), "shown", finite=True)


def test_losses_are_those_of_the_model(server: Server) -> None:
    one = Endpoint(server.url)
    assert one.model == "tiny"
    assert not one.identity.weights_seen
    found, wanted = losses(one), evaluate(tiny_llama(), CausalLM(), PART)
    assert torch.allclose(found.losses, wanted.losses, atol=1e-5)
    assert torch.equal(found.terms, wanted.terms)
    body, key = server.asked[0]
    asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    assert {name: body[name] for name in asked} == asked
    assert body["prompt"] == PART.examples[0].tolist()
    assert key is None


def test_key_is_sent_and_a_wrong_one_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "secret"
    with pytest.raises(InputError, match=r"401: the key is missing.*RANKFOLD_API_KEY"):
        losses(Endpoint(server.url))
    monkeypatch.setenv("MY_KEY", "wrong")
    with pytest.raises(InputError, match=r"the key is refused.*MY_KEY") as refused:
        losses(Endpoint(server.url, key_variable="MY_KEY"))
    assert "wrong" not in str(refused.value)
    monkeypatch.setenv("MY_KEY", "secret")
    losses(Endpoint(server.url, key_variable="MY_KEY"))


def test_busy_server_is_asked_again(server: Server) -> None:
    server.busy = 2
    losses(Endpoint(server.url))
    assert len(server.asked) == len(PART.examples) + 2
    server.busy = 99
    with pytest.raises(InputError, match="answers 503"):
        losses(Endpoint(server.url, retries=1))


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(InputError, match="can't be reached"):
        Endpoint(f"http://127.0.0.1:{port}/v1", retries=0)


def test_no_answer_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(InputError, match=r"can't be reached.*no answer within 0.1 s"):
            Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", timeout=0.1, retries=0)


def logprobs(change: Any) -> Any:
    def changed(answer: Any) -> Any:
        held = answer["choices"][0]["logprobs"]
        held["token_logprobs"] = change(held["token_logprobs"])
        return answer

    return changed


WRONG: dict[str, tuple[Any, str]] = {
    "no log-probabilities": (lambda a: {"choices": [{"text": "x", "logprobs": None}]}, "has no"),
    "no choices": (lambda a: {"choices": []}, "has no"),
    "a list": (lambda a: [], "has no"),
    "a start token": (logprobs(lambda v: [None, *v]), "13 log-probabilities for 12 tokens"),
    "too few": (logprobs(lambda v: v[:-1]), "11 log-probabilities for 12 tokens"),
    "none for a token": (logprobs(lambda v: [*v[:5], None, *v[6:]]), "of token 5 is None"),
    "not finite": (logprobs(lambda v: [*v[:5], -math.inf, *v[6:]]), "of token 5 is -inf"),
    "above one": (logprobs(lambda v: [*v[:5], 0.5, *v[6:]]), "of token 5 is 0.5"),
    "true": (logprobs(lambda v: [*v[:5], True, *v[6:]]), "of token 5 is True"),
    "no JSON": (lambda a: b"<html>", "is no JSON"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_answers_are_refused(server: Server, name: str) -> None:
    server.change, message = WRONG[name]
    with pytest.raises(InputError, match=message):
        losses(Endpoint(server.url))


def test_other_answers_to_the_same_text_are_refused(server: Server) -> None:
    one = Endpoint(server.url)
    one.check(PART)
    drift = iter(range(99))
    server.change = logprobs(lambda v: [None, *(x - next(drift) for x in v[1:])])
    with pytest.raises(InputError, match="other log-probabilities for the same text"):
        one.check(PART)


def test_several_models_are_listed(server: Server) -> None:
    server.names = ["one", "two"]
    with pytest.raises(InputError, match=r"serves 2 models \(one, two\).*endpoint_model="):
        Endpoint(server.url)
    assert Endpoint(server.url, "two").model == "two"


@pytest.mark.parametrize(
    "url", ["http://me:secret@host/v1", "http://host/v1?key=secret", "http://", "http://h/v1#x"]
)
def test_addresses_with_secrets_are_refused(url: str) -> None:
    assert is_url(url)
    with pytest.raises(InputError, match="without a user, a password") as refused:
        Endpoint(url)
    assert "me:secret" not in str(refused.value)


def test_labels_are_refused(server: Server) -> None:
    ids = PART.examples[0]
    part = as_part("held_out", [{"input_ids": ids, "labels": ids}])
    with pytest.raises(InputError, match="without labels"):
        Endpoint(server.url).check(part)
