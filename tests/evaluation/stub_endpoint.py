"""A chat endpoint on this machine for the tests: it answers as a script says, and keeps what it was sent."""

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StubEndpoint:
    """Runs in a ``with`` block; ``script`` gets the number of the request (from 0) and its body, and returns what to do: a text (an answer),
    (status, headers, body), or a number of seconds to wait before it says "late"."""

    def __init__(self, script: Callable[[int, dict[str, Any]], Any]) -> None:
        self.script, self.bodies, self.headers, self.times = script, [], [], []
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    number = len(stub.bodies)
                    stub.bodies.append(body)
                    stub.headers.append(dict(self.headers))
                    stub.times.append(time.monotonic())
                said = stub.script(number, body)
                status, headers = 200, {}
                if isinstance(said, tuple):
                    status, headers, content = said
                elif isinstance(said, (int, float)):
                    time.sleep(said)
                    content = reply("late")
                else:
                    content = reply(said)
                try:
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **headers}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def log_message(self, *_):
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> "StubEndpoint":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


def reply(text: str, usage: dict[str, int] | None = None) -> bytes:
    """What a chat endpoint sends for an answer."""
    held = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
    return json.dumps({**held, "usage": usage or {"prompt_tokens": 10, "completion_tokens": 5}}).encode()


def asked(body: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of the user's message."""
    return json.loads(body["messages"][1]["content"])
