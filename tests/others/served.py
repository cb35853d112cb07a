"""A tiny server that answers as an OpenAI-compatible endpoint does, over a tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Change = Callable[[dict[str, Any]], Any]


class Server(ThreadingHTTPServer):
    """What a test looks at and sets.

    Attributes:
        model: Is served.
        asked: Bodies of the requests for log-probabilities, with the header of the key.
        key: Is expected, if any.
        busy: How many requests are answered 503 first.
        change: Changes an answer before it is sent.
        names: Of the models.
    """

    daemon_threads = True

    def __init__(self, model: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.model = model
        self.asked: list[tuple[dict[str, Any], str | None]] = []
        self.key: str | None = None
        self.busy = 0
        self.change: Change = lambda answer: answer
        self.names = ["tiny"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server.names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization")
        self.server.asked.append((body, key))
        if self.server.busy:
            self.server.busy -= 1
            self._send(503, {"error": "busy"})
        elif self.server.key is not None and key != f"Bearer {self.server.key}":
            self._send(401, {"error": "no key"})
        else:
            ids = torch.tensor([body["prompt"]])
            with torch.no_grad():
                log = self.server.model(input_ids=ids).logits[0].log_softmax(-1)
            found = [None, *log[:-1].gather(1, ids[0, 1:, None])[:, 0].tolist()]
            answer = {"choices": [{"text": "", "logprobs": {"token_logprobs": found}}]}
            self._send(200, self.server.change(answer))

    def _send(self, status: int, answer: Any) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing is told."""


@contextmanager
def served(model: Any) -> Iterator[Server]:
    server = Server(model)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
