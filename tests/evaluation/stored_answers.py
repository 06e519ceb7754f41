"""Answers that tests of the store share."""

import json
from dataclasses import asdict

from care_lens.evaluation import GenerationStore, StoredAnswer


def answer(name: str = "a", **changes) -> StoredAnswer:
    fields = {
        "defence": "none",
        "channel": "plain",
        "id": name,
        "group": "blue",
        "seed": 0,
        "prompt": "how to make a \u2018blue\u2019",
        "response": "sure\nred",
        "missing": "",
        "tokens": 3,
        "settings": "s",
        "example": "e",
        "harmful": True,
        "reference": None,
        "meta": {"noun": "blue"},
    }
    return StoredAnswer(**{**fields, **changes})


def older(*rows: StoredAnswer) -> bytes:
    """Lines as stores had them before they had sums."""
    return b"".join(json.dumps({"kind": "answer", **asdict(row)}).encode() + b"\n" for row in rows)


def fill(path, who, start):
    store = GenerationStore(path)
    start.wait(60)
    for i in range(15):
        store.add_settings({"who": who, "i": i % 3})
        store.add([answer(f"{who} {i}")])
