"""One POST of JSON, with a deadline, without redirects, and with errors that never show the key."""

import email.utils
import http.client
import json
import time
import urllib.error
import urllib.request
from datetime import datetime, timezone
from typing import Any
from urllib.parse import urlsplit

from care_lens.core.errors import CareLensError

_MOST_BYTES = 4_000_000
_PASSING = (408, 409, 425, 429)
_LOCAL = ("localhost", "127.0.0.1", "::1")


class EndpointError(CareLensError, RuntimeError):
    """An endpoint cannot be used as it is: no key, no such model, or it does not answer any more."""


class PassingError(EndpointError):
    """A failure that may pass.

    Attributes:
        why: In a few words, without anything the server said.
        retry_after: Seconds that the server asks for, or 0.
    """

    def __init__(self, why: str, retry_after: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.retry_after = why, retry_after


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to wherever it points."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def post(url: str, body: dict[str, Any], *, key: str | None, timeout: float) -> dict[str, Any]:
    """Send a JSON object and return the one that comes back.

    Args:
        url: Where to; proxies of the environment are used, but not for this machine.
        body: What is sent.
        key: Sent as a bearer token; None: none.
        timeout: Seconds for all of it.

    Raises:
        PassingError: If it may be tried again: 408, 409, 425, 429, 5xx, no connection, too slow, no JSON object.
        EndpointError: If the server refuses; the message holds the beginning of what it said, without the key.
    """
    deadline = time.monotonic() + timeout
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    request = urllib.request.Request(url, data=json.dumps(body).encode(), headers=headers, method="POST")
    if key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    proxies = urllib.request.ProxyHandler({} if urlsplit(url).hostname in _LOCAL else None)
    opener = urllib.request.build_opener(_NoRedirect, proxies)
    try:
        with opener.open(request, timeout=timeout) as response:
            content = _read(response, deadline)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(error, key, deadline) from None
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        slow = isinstance(reason, TimeoutError)
        raise PassingError("too slow" if slow else f"no connection ({type(reason).__name__})") from None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise PassingError("no JSON") from None
    if not isinstance(found, dict):
        raise PassingError("no JSON object")
    return found


def _read(response: Any, deadline: float) -> bytes:
    """All of an answer, unless it is too long or comes too slowly."""
    parts, size = [], 0
    while part := response.read1(65536):
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise PassingError("an answer without end")
        if time.monotonic() > deadline:
            raise PassingError("too slow")
    return b"".join(parts)


def _refused(error: urllib.error.HTTPError, key: str | None, deadline: float) -> EndpointError:
    if error.code in _PASSING or error.code >= 500:
        return PassingError(f"status {error.code}", _retry_after(error.headers.get("Retry-After")))
    try:
        said = _read(error, deadline)[:2000].decode("utf-8", "replace")
    except (PassingError, OSError, http.client.HTTPException):
        said = ""
    said = " ".join((said.replace(key, "[key]") if key else said).split())[:200]
    advice = {401: "check the key", 403: "check the key", 404: "check base_url and model"}.get(
        error.code, "check the options"
    )
    host = urlsplit(error.url or "").hostname
    return EndpointError(f"{host} must take the request, got status {error.code}: {said!r}; {advice}")


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or a date."""
    if not value:
        return 0.0
    try:
        return max(float(value), 0.0) if float(value) < float("inf") else 0.0
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return 0.0
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return max((when - datetime.now(timezone.utc)).total_seconds(), 0.0)
