"""Whose hooks are whose: blocks left in any order, and threads beside one another on one model."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from transformers import TextIteratorStreamer

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.errors import ThreadError
from care_lens.repair.base import HookRepair, NoRepair

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
CALLS = 12


class Scaled(HookRepair):
    """A repair that scales a site."""

    def __init__(self, site, factor):
        self.name, self.site, self.factor = "scaled", site, factor

    def fwd_hooks(self, inputs):
        return [(self.site, lambda activation, hook: self.factor * activation)]

    def check(self, lvlm):
        lvlm.width(self.site)

    def describe(self):
        return {"name": self.name, "site": self.site, "factor": self.factor}


FIRST, SECOND = Scaled(SITES[0], 2.0), Scaled(SITES[1], -3.0)


@pytest.fixture(scope="module")
def lvlm(llava_maker):
    return HookedLVLM.from_hf(*llava_maker("clip"))


@pytest.fixture(scope="module")
def inputs(lvlm, picture):
    return lvlm.prepare([Example("what is red", image=picture(0)), Example("how to make a blue")])


@pytest.fixture(scope="module")
def expected(lvlm, inputs):
    """Logits by what is on."""
    hooks = {name: repair.fwd_hooks(inputs) for name, repair in (("first", FIRST), ("second", SECOND))}
    with torch.no_grad():
        found = {name: lvlm.run_with_hooks(inputs, fwd_hooks=pairs) for name, pairs in hooks.items()}
        found["both"] = lvlm.run_with_hooks(inputs, fwd_hooks=hooks["first"] + hooks["second"])
        return found | {"none": lvlm(inputs)}


def which(expected, logits):
    """The name of what was on when these logits were computed."""
    return [name for name, held in expected.items() if torch.equal(held, logits)]


def in_thread(function):
    """What a function gives, or raises, in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result(timeout=60)


WAYS = {
    "on": lambda lvlm, repair, inputs: repair.on(lvlm),
    "hooks": lambda lvlm, repair, inputs: lvlm.hooks(repair.fwd_hooks(inputs)),
    "each": lambda lvlm, repair, inputs: lvlm.hooks_for_each_batch(repair.fwd_hooks),
    "bridge": lambda lvlm, repair, inputs: lvlm.bridge.hooks(fwd_hooks=repair.fwd_hooks(inputs)),
    "bound": lambda lvlm, repair, inputs: lvlm.bind(inputs).hooks(fwd_hooks=repair.fwd_hooks(inputs)),
}


@torch.no_grad()
@pytest.mark.parametrize("one", WAYS)
@pytest.mark.parametrize("other", WAYS)
def test_each_block_takes_its_own_hooks_along_in_whichever_order(lvlm, inputs, expected, one, other):
    for first_to_leave, left in ((0, "second"), (1, "first")):
        stacks = [ExitStack(), ExitStack()]
        stacks[0].enter_context(WAYS[one](lvlm, FIRST, inputs))
        stacks[1].enter_context(WAYS[other](lvlm, SECOND, inputs))
        assert which(expected, lvlm(inputs)) == ["both"]
        stacks[first_to_leave].close()
        assert which(expected, lvlm(inputs)) == [left]
        stacks[1 - first_to_leave].close()
        assert which(expected, lvlm(inputs)) == ["none"]
    assert lvlm.acting() == []


@torch.no_grad()
def test_the_same_repair_twice_goes_once_for_each_block(lvlm, inputs, expected):
    twice = lvlm.run_with_hooks(inputs, fwd_hooks=FIRST.fwd_hooks(inputs) * 2)
    outer, inner = FIRST.on(lvlm), FIRST.on(lvlm)
    outer.__enter__()
    inner.__enter__()
    assert torch.equal(lvlm(inputs), twice)
    outer.__exit__(None, None, None)
    assert which(expected, lvlm(inputs)) == ["first"]
    inner.__exit__(None, None, None)
    assert which(expected, lvlm(inputs)) == ["none"]


@torch.no_grad()
def test_calls_with_hooks_beside_calls_without_are_each_right(lvlm, inputs, expected):
    """Threads without blocks: each call has the model to itself."""
    start = threading.Barrier(3)

    def run(call):
        start.wait()
        with torch.no_grad():
            return [which(expected, call()) for _ in range(CALLS)]

    with ThreadPoolExecutor(3) as pool:
        hooked = pool.submit(run, lambda: lvlm.run_with_hooks(inputs, fwd_hooks=FIRST.fwd_hooks(inputs)))
        bound = lvlm.bind(inputs)
        theirs = pool.submit(run, lambda: bound.run_with_hooks(inputs.input_ids, fwd_hooks=SECOND.fwd_hooks(inputs)))
        plain = pool.submit(run, lambda: lvlm(inputs))
        assert hooked.result() == [["first"]] * CALLS
        assert theirs.result() == [["second"]] * CALLS
        assert plain.result() == [["none"]] * CALLS


@torch.no_grad()
@pytest.mark.parametrize("way", ["on", "hooks", "each"])
def test_blocks_beside_blocks_are_each_right(lvlm, inputs, expected, way):
    """Every thread has a block of its own; NoRepair's says that the model is meant as it is."""
    start = threading.Barrier(3)

    def run(repair):
        found = []
        with torch.no_grad(), WAYS[way](lvlm, repair, inputs):
            start.wait()
            for _ in range(CALLS):
                found.append(which(expected, lvlm(inputs)))
            start.wait()
        return found

    with ThreadPoolExecutor(3) as pool:
        jobs = {
            name: pool.submit(run, repair)
            for name, repair in (("first", FIRST), ("second", SECOND), ("none", NoRepair()))
        }
        for name, job in jobs.items():
            assert job.result() == [[name]] * CALLS


@torch.no_grad()
@pytest.mark.parametrize("way", ["on", "hooks", "each"])
def test_a_thread_without_hooks_beside_one_with_a_block_is_refused(lvlm, inputs, expected, way):
    raw = inputs.generate_kwargs()
    runs = (
        lambda: lvlm(inputs),
        lambda: lvlm.run_with_hooks(inputs, fwd_hooks=SECOND.fwd_hooks(inputs)),
        lambda: lvlm.generate(inputs, max_new_tokens=2),
        lambda: lvlm.hf_model(**raw),
        lambda: lvlm.hf_model.generate(**raw, max_new_tokens=2),
        lambda: lvlm.bind(inputs)(inputs.input_ids),
        lambda: lvlm.hf_model.model.language_model(inputs_embeds=torch.zeros(1, 3, 32)),
    )
    with WAYS[way](lvlm, FIRST, inputs):
        for run in runs:
            with pytest.raises(ThreadError, match=r"MainThread.*`with repair.on\(lvlm\)"):
                in_thread(run)
        assert which(expected, lvlm(inputs)) == ["first"]

        def as_it_is():
            with torch.no_grad(), lvlm.hooks():
                return lvlm(inputs)

        assert which(expected, in_thread(as_it_is)) == ["none"]
    assert which(expected, in_thread(lambda: lvlm(inputs))) == ["none"]


@torch.no_grad()
@pytest.mark.parametrize("way", ["on", "hooks"])
def test_carried_hooks_act_in_the_other_thread(lvlm, inputs, expected, way):
    with WAYS[way](lvlm, FIRST, inputs):
        call = lvlm.carry_hooks(torch.no_grad()(lambda: lvlm(inputs)))
        assert [which(expected, in_thread(call)) for _ in range(CALLS)] == [["first"]] * CALLS
        with pytest.raises(ThreadError):
            in_thread(lambda: lvlm(inputs))
    with pytest.raises(ThreadError, match="one that was left"):
        in_thread(call)


def test_a_streamed_answer_in_a_thread_is_repaired_or_refused(lvlm, inputs, monkeypatch):
    alone = inputs.rows([0])
    kwargs = {
        **alone.generate_kwargs(),
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "pad_token_id": 0,
        "do_sample": False,
    }
    plain = lvlm.generate(alone, max_new_tokens=6, min_new_tokens=6).texts[0]
    raised = []
    monkeypatch.setattr(threading, "excepthook", lambda args: raised.append(args.exc_type))

    def stream(target):
        streamer = TextIteratorStreamer(lvlm.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
        thread = threading.Thread(target=target, kwargs={**kwargs, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        return text

    with FIRST.on(lvlm):
        repaired = lvlm.generate(alone, max_new_tokens=6, min_new_tokens=6).texts[0]
        assert stream(lvlm.carry_hooks(lvlm.hf_model.generate)) == repaired != plain
        assert raised == []
        assert stream(lvlm.hf_model.generate) == "", "who reads from the streamer must not wait for ever"
        assert raised == [ThreadError]
    assert stream(lvlm.hf_model.generate) == plain


@torch.no_grad()
def test_a_block_that_a_dead_thread_left_open_is_in_nobodys_way(lvlm, inputs, expected):
    block = FIRST.on(lvlm)
    in_thread(block.__enter__)
    assert which(expected, lvlm(inputs)) == ["none"]
    block.__exit__(None, None, None)
    assert lvlm.acting() == []


@torch.no_grad()
def test_a_block_that_is_left_in_another_thread_is_gone(lvlm, inputs, expected):
    block = FIRST.on(lvlm)
    block.__enter__()
    in_thread(lambda: block.__exit__(None, None, None))
    assert which(expected, lvlm(inputs)) == ["none"]
