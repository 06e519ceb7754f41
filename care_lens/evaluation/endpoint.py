"""A client of OpenAI-compatible chat endpoints, for judges: what a run will cost is said first, and what was answered is kept.

    endpoint = ChatEndpoint("my-judge", base_url="http://localhost:8000/v1", key_variable=None)  # vLLM and other local servers
    endpoint = ChatEndpoint("gpt-x", prices=(2.0, 8.0), max_cost=5.0, cache="judge.jsonl")         # key from OPENAI_API_KEY

The key is read from the environment when something is asked; it is never kept in an object, written to a log, a file or an error, sent over plain http to another machine,
or sent on by a redirect. Requests that fail for a passing reason (429, 5xx, no connection, too slow, garbage) are tried again, with growing waits and as ``Retry-After``
says; an answer that cannot be had is None, which judges count as missing. With a cache a run that stops goes on where it stopped and nothing is paid for twice.
"""

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from care_lens.core.identity import digest
from care_lens.core.journal import Journal
from care_lens.core.progress import Steps
from care_lens.evaluation.posting import EndpointError, PassingError, post

logger = logging.getLogger(__name__)

_NOTHING = {"prompt_tokens": 0, "completion_tokens": 0}  # what a failed request costs
_LOCAL = ("localhost", "127.0.0.1", "::1")


class CostError(EndpointError):
    """Asking would cost more than was allowed."""


class CostEstimate(NamedTuple):
    """What asking will cost at most, without repeated requests.

    Attributes:
        requests: Requests that will be sent; what the cache holds is not asked.
        prompt_tokens: Tokens of the prompts, estimated on the high side (three bytes each).
        answer_tokens: Most tokens of the answers.
        cost: In the currency of the prices; None where no prices are known.
    """

    requests: int
    prompt_tokens: int
    answer_tokens: int
    cost: float | None


@dataclass(frozen=True)
class Prompt:
    """What is asked.

    Attributes:
        system: The system message.
        user: The user message.
    """

    system: str
    user: str

    @property
    def tokens(self) -> int:
        """About how many tokens it has, rather too many."""
        return math.ceil(len((self.system + self.user).encode()) / 3) + 12


Parse = Callable[[str, Prompt], Any]
"""What the text of an answer to a prompt says, or None if that cannot be read."""


class ChatEndpoint:
    """Asks a model behind ``POST {base_url}/chat/completions``.

    Args:
        model: Its name there.
        base_url: Up to and without "/chat/completions"; https, or http on this machine.
        key_variable: Environment variable that holds the key; None: the server wants none.
        temperature: Of the answers; 0: as repeatable as the server is.
        max_tokens: Most tokens of an answer.
        timeout: Seconds a request may take in all.
        tries: How often a request is sent at most.
        backoff: Seconds before the second try; doubled for each further one, with jitter.
        max_wait: Most seconds between two tries, whatever the server asks for.
        per_minute: Most requests a minute; None: no limit of ours.
        workers: Requests at a time.
        prices: Price of a million prompt tokens and of a million answer tokens; None: not known, or nothing.
        max_cost: Most that this object may spend, in the currency of the prices. With prices it must be given.
        confirm: Called with the estimate before anything is sent; if it returns False nothing is.
        cache: File (JSON lines) in which answers are kept; None: they are not.
        allow_http: Let the key go over plain http to another machine.
        extra: Further fields of the request body, such as ``{"seed": 0}``.
        seed: Seed of the jitter.

    Raises:
        ValueError: If an option is out of range, or there are prices without ``max_cost``.
        EndpointError: If the address is none, holds a password or a query, or is plain http to another machine with a key.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "https://api.openai.com/v1",
        key_variable: str | None = "OPENAI_API_KEY",
        temperature: float | int = 0.0,
        max_tokens: int = 100,
        timeout: float | int = 60.0,
        tries: int = 5,
        backoff: float | int = 1.0,
        max_wait: float | int = 60.0,
        per_minute: float | int | None = None,
        workers: int = 4,
        prices: tuple[float | int, float | int] | None = None,
        max_cost: float | int | None = None,
        confirm: Callable[[CostEstimate], bool] | None = None,
        cache: str | Path | None = None,
        allow_http: bool = False,
        extra: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        for name, number in (("max_tokens", max_tokens), ("tries", tries), ("workers", workers)):
            if number < 1:
                raise ValueError(f"{name} must be 1 or more, got {number}")
        for name, number in (("timeout", timeout), ("per_minute", per_minute)):
            if number is not None and not number > 0:
                raise ValueError(f"{name} must be above 0, got {number}")
        for name, number in (("backoff", backoff), ("max_wait", max_wait), ("temperature", temperature)):
            if not number >= 0:
                raise ValueError(f"{name} must be 0 or more, got {number}")
        if prices is not None and (max_cost is None or not all(price >= 0 for price in prices) or not max_cost >= 0):
            raise ValueError(
                f"max_cost must be given with prices, both 0 or more, got {max_cost} with {prices}; set max_cost=..."
            )
        if prices is None and max_cost is not None:
            raise ValueError(
                f"prices must be given with max_cost, got None with {max_cost}; set prices=(prompt, answer) of a million tokens"
            )
        self.model, self.key_variable = model, key_variable
        self._url = _address(base_url, keyed=key_variable is not None, allow_http=allow_http)
        self._body = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **(extra or {})}
        self._max_tokens, self._timeout, self._tries = max_tokens, timeout, tries
        self._backoff, self._max_wait, self._workers = backoff, max_wait, workers
        self._gap = 0.0 if per_minute is None else 60.0 / per_minute
        self._prices, self._max_cost, self._confirm = prices, max_cost, confirm
        self._spent, self._next, self._lost = 0.0, 0.0, 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._jitter = random.Random(seed)
        self._replies: dict[str, str] = {}
        self._journal = None if cache is None else Journal(cache, kind="EndpointReplies")
        self._take()

    def __repr__(self) -> str:
        return f"ChatEndpoint({self.model!r} at {urlsplit(self._url).hostname})"

    @property
    def spent(self) -> float:
        """What was spent so far, by the server's own count of tokens where it gives one; 0 without prices."""
        return self._spent

    def estimate(self, prompts: Sequence[Prompt]) -> CostEstimate:
        """What asking these will cost at most; what the cache holds costs nothing. Nothing is sent."""
        new = {self._name(prompt): prompt for prompt in prompts}
        return self._estimate([prompt for name, prompt in new.items() if name not in self._replies])

    def _estimate(self, prompts: Sequence[Prompt]) -> CostEstimate:
        tokens, answers = sum(prompt.tokens for prompt in prompts), len(prompts) * self._max_tokens
        return CostEstimate(len(prompts), tokens, answers, self._price(tokens, answers))

    def ask(self, prompts: Sequence[Prompt], parse: Parse, *, progress: bool = True) -> list[Any]:
        """Ask them all, each once, however often it stands there.

        Args:
            prompts: What is asked.
            parse: What an answer's text says, given the text and its prompt, or None if that cannot be read; such an answer is asked for again.
            progress: Whether to show a progress bar.

        Returns:
            For each prompt what ``parse`` made of its answer; None where none could be had.

        Raises:
            CostError: If it would cost more than is left of ``max_cost``, or ``confirm`` says no; nothing was sent then, or what came is in the cache.
            EndpointError: If the key is not there, the server refuses (401, 404, ...), or it answers nothing any more; what came before is in the cache.
        """
        key = self._key()
        names = [self._name(prompt) for prompt in prompts]
        self._take()
        todo = {name: prompt for name, prompt in zip(names, prompts, strict=True) if name not in self._replies}
        # What was kept but cannot be read is asked for again.
        todo |= {
            name: prompt
            for name, prompt in zip(names, prompts, strict=True)
            if name in self._replies and parse(self._replies[name], prompt) is None
        }
        if todo:
            self._announce(self._estimate(list(todo.values())))
            self._stop.clear()
            self._lost = 0
            self._send(todo, parse, key, progress)
        found = [(self._replies.get(name), prompt) for name, prompt in zip(names, prompts, strict=True)]
        return [None if text is None else parse(text, prompt) for text, prompt in found]

    def _send(self, todo: dict[str, Prompt], parse: Parse, key: str | None, progress: bool) -> None:
        pool = ThreadPoolExecutor(self._workers)
        jobs = {pool.submit(self._one, prompt, parse, key): name for name, prompt in todo.items()}
        lost: dict[str, int] = {}
        try:
            for job in Steps(as_completed(jobs), total=len(jobs), desc=f"asking {self.model}", disable=not progress):
                text, why = job.result()
                if text is None:
                    lost[why] = lost.get(why, 0) + 1
                else:
                    self._keep(jobs[job], text)
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for job, name in jobs.items():  # what came in while another failed was paid for too
                if job.done() and not job.cancelled() and job.exception() is None and job.result()[0] is not None:
                    self._keep(name, str(job.result()[0]))
        if lost:
            logger.warning(
                "%d of %d answers of %s could not be had: %s", sum(lost.values()), len(todo), self.model, lost
            )

    def _one(self, prompt: Prompt, parse: Parse, key: str | None) -> tuple[str | None, str]:
        """The answer to a prompt, or None and why."""
        messages = [{"role": "system", "content": prompt.system}, {"role": "user", "content": prompt.user}]
        why = "stopped"
        for attempt in range(self._tries):
            self._wait_turn()
            if self._stop.is_set():
                return None, "stopped"
            self._reserve(prompt)
            asked_for = 0.0
            try:
                reply = post(self._url, {**self._body, "messages": messages}, key=key, timeout=float(self._timeout))
                self._settle(prompt, reply.get("usage"))
                text = _text(reply).replace(key, "[key]") if key else _text(reply)
                if parse(text, prompt) is not None:
                    with self._lock:
                        self._lost = 0
                    return text, ""
                why = "an answer that is none"
            except PassingError as error:
                why, asked_for = error.why, error.retry_after
                self._settle(prompt, _NOTHING)
            except EndpointError:
                self._stop.set()
                raise
            if attempt + 1 < self._tries:
                self._stop.wait(self._pause(attempt, asked_for))
        if why != "an answer that is none":
            self._count_lost(why)
        return None, why

    def _count_lost(self, why: str) -> None:
        """Give up where nothing comes any more, rather than try each of thousands several times."""
        with self._lock:
            self._lost += 1
            gone = self._lost >= 3 * self._workers
        if gone and not self._stop.is_set():
            self._stop.set()
            raise EndpointError(
                f"{self!r} must answer, got {why} for {self._lost} requests in a row, {self._tries} tries each; what came before is kept if there is a cache: run it again later"
            )

    def _pause(self, attempt: int, asked_for: float) -> float:
        with self._lock:
            jitter = self._jitter.uniform(0.75, 1.25)
        return min(max(self._backoff * 2**attempt * jitter, asked_for), self._max_wait)

    def _wait_turn(self) -> None:
        """Sleep until the next request may be sent."""
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + self._gap
        self._stop.wait(max(turn - time.monotonic(), 0.0))

    def _announce(self, estimate: CostEstimate) -> None:
        told = f"{estimate.requests} requests, about {estimate.prompt_tokens} prompt tokens and at most {estimate.answer_tokens} answer tokens"
        if estimate.cost is None:
            logger.info("asking %r: %s", self, told)
        else:
            logger.warning(
                "asking %r: %s, at most %.4g of %.4g allowed (%.4g spent)",
                self,
                told,
                estimate.cost,
                self._max_cost,
                self._spent,
            )
        if estimate.cost is not None and self._max_cost is not None and self._spent + estimate.cost > self._max_cost:
            raise CostError(
                f"max_cost must cover what is asked: {told} cost up to {estimate.cost:.4g}, {self._spent:.4g} are spent, got max_cost={self._max_cost:.4g}; ask for "
                "less, or raise it"
            )
        if self._confirm is not None and not self._confirm(estimate):
            raise CostError(f"confirm must agree before anything is sent, got no to {told}")

    def _reserve(self, prompt: Prompt) -> None:
        """Count a request as it is sent, so that repeated ones cannot exceed what is allowed."""
        most = self._price(prompt.tokens, self._max_tokens)
        if most is None or self._max_cost is None:
            return
        with self._lock:
            if self._spent + most > self._max_cost:
                self._stop.set()
                raise CostError(
                    f"max_cost must cover repeated requests too, {self._spent:.4g} of {self._max_cost:.4g} are spent; what came is kept if there is a cache: raise it and go on"
                )
            self._spent += most

    def _settle(self, prompt: Prompt, usage: Any) -> None:
        """Put what a request really cost in place of what was reserved; where the server does not count both, the reservation stays."""
        most = self._price(prompt.tokens, self._max_tokens)
        if most is None or not isinstance(usage, dict):
            return
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        known = [count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count >= 0]
        if len(known) == 2:
            with self._lock:
                self._spent += (self._price(known[0], known[1]) or 0.0) - most

    def _price(self, prompt_tokens: int, answer_tokens: int) -> float | None:
        if self._prices is None:
            return None
        return (prompt_tokens * self._prices[0] + answer_tokens * self._prices[1]) / 1e6

    def _name(self, prompt: Prompt) -> str:
        return digest([self._url, self._body, prompt.system, prompt.user])

    def _keep(self, name: str, text: str) -> None:
        if self._replies.get(name) != text:
            self._replies[name] = text
            if self._journal is not None:
                self._take(self._journal.append([{"request": name, "reply": text}]))

    def _take(self, rows: Sequence[dict[str, Any]] | None = None) -> None:
        """Take over what the cache holds."""
        if rows is None:
            rows = [] if self._journal is None else self._journal.read()
        for row in rows:
            self._replies[row["request"]] = row["reply"]

    def _key(self) -> str | None:
        """The key; an error about it never shows it."""
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise EndpointError(
                f"the environment variable {self.key_variable} must hold the key, got none; set it, or key_variable=None for a server without keys"
            )
        if not key.isascii() or not key.isprintable() or " " in key:
            raise EndpointError(
                f"the environment variable {self.key_variable} must hold one key in plain letters, got something else; set it again"
            )
        return key


def _text(reply: dict[str, Any]) -> str:
    """The text of an answer; empty where there is none."""
    try:
        content = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


def _address(base_url: str, *, keyed: bool, allow_http: bool) -> str:
    try:
        parts = urlsplit(base_url)
        host = parts.hostname
        _ = parts.port
    except ValueError:
        parts, host = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not host:
        raise EndpointError("base_url must be an address such as https://host/v1, got something else")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EndpointError(
            f"base_url must hold no password and no query, got such for {host}; the key comes from the environment"
        )
    if keyed and parts.scheme == "http" and host not in _LOCAL and not allow_http:
        raise EndpointError(
            f"base_url must be https where a key is sent, got http to {host}; use https, key_variable=None, or allow_http=True on a network that you trust"
        )
    return base_url.rstrip("/") + "/chat/completions"
