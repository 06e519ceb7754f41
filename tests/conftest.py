"""Tiny vision-language models, made in memory, for every test."""

import os
from collections.abc import Collection

import checked

checked.install("care_lens")
# Types are checked by the hook; processes of their own are as users' are.
os.environ["CARE_LENS_UNCHECKED"] = "1"

import functools  # noqa: E402
from collections.abc import Callable  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from zoo.pictures import make_picture  # noqa: E402
from zoo.tiny import make_llava, make_tokenizer  # noqa: E402, F401

from care_lens import organism  # noqa: E402
from care_lens.core.memory import keep_freed_memory  # noqa: E402

keep_freed_memory()
_made = functools.cache(organism.study)


@functools.wraps(organism.study)
def one_study(*, seed: int = 0, per_item: int = 1, only: Collection[str] | None = None):
    """The bundled model's study, made once in a process: it is frozen, and drawing its 6,000 pictures takes as long as many a test."""
    return _made(seed=seed, per_item=per_item, only=only if only is None or isinstance(only, str) else tuple(only))


organism.study = one_study
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


#: Modules that take longest; they begin first, so that no worker is left alone with one at the end.
LONG = (
    "tutorials/test_tutorials",
    "lvlm/test_every_family",
    "pipeline/test_run",
    "lvlm/test_tools",
    "pipeline/test_killed_run",
    "docs/test_concept_pages",
    "lvlm/test_replay",
    "repair/test_learning",
    "evaluation/test_unopened",
    "evaluation/test_tuning",
    "planted/test_scorecard",
    "docs/test_readme",
    "docs/test_add_attack_and_judge",
    "pipeline/test_benchmark_study",
    "pipeline/test_report",
    "docs/test_howto",
    "fuzz/test_fuzz_public_api",
)


def pytest_collection_modifyitems(items):
    def rank(item):
        return next((i for i, name in enumerate(LONG) if f"{name}.py" in item.nodeid), len(LONG))

    items.sort(key=rank)  # stable: the order within a module stays


@pytest.fixture(autouse=True)
def threads():
    """A test that sets the number of threads (the command line does) does not set it for others: it changes the last bits."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registries():
    """What a test or a page of the docs registers (attacks, kinds, families) is forgotten after it: others list all that is known.

    What care_lens registers itself, when a test is the first to import a part of it, stays.
    """
    from care_lens.attacks import kinds as attacks
    from care_lens.lvlm.families import registry as families
    from care_lens.repair import kinds as parts

    tables = (attacks._KINDS, parts._KINDS, families._FAMILIES)
    before = [dict(table) for table in tables]
    yield
    for table, kept in zip(tables, before, strict=True):
        own = {name: one for name, one in table.items() if getattr(one, "__module__", "").startswith("care_lens.")}
        if table != {**own, **kept}:
            table.clear()
            table.update({**own, **kept})


@pytest.fixture(scope="session")
def llava_maker() -> Callable:
    """``make(vision, ...) -> (model, processor)``: plain Hugging Face, always the same weights."""
    return make_llava


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """``picture(seed, size)``: a random picture."""
    return make_picture


@pytest.fixture(scope="session", params=["clip", "siglip"])
def lvlm(request):
    """A HookedLVLM of each kind of vision tower."""
    from care_lens.lvlm import HookedLVLM

    return HookedLVLM.from_hf(*make_llava(request.param))


@pytest.fixture(scope="session")
def examples():
    """Rows with and without pictures, of different lengths, each with a response."""
    from care_lens.core import Example

    return [
        Example("what is in the picture", image=make_picture(0), response="sure red", id="a", group="red"),
        Example("how to make a blue", response="sorry i cannot help", harmful=True, id="b", group="blue"),
        Example("red then blue", image=make_picture(1, (24, 16)), response="no", id="c", group="red"),
    ]
