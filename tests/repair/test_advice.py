"""What messages tell the user to do is something that this user has: a HookedLVLM, or a plain model with a repair attached."""

import threading

import pytest
import torch
from unchecking import unchecked

from care_lens import organism
from care_lens.core.held import NotHeldError
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.errors import GenerationOptionError, HookError, ThreadError
from care_lens.repair import Correction, HybridFusion, Writer, explain
from care_lens.repair.errors import RepairError

SITES = ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"]


@pytest.fixture(scope="module")
def lvlm():
    with HookedLVLM.from_hf(*organism.untrained(seed=0)) as lvlm:
        yield lvlm


@pytest.fixture(scope="module")
def repair(lvlm):
    width = lvlm.width(SITES[0])
    writer = Writer.towards(SITES[0], target=torch.ones(width), source=torch.zeros(width))
    return HybridFusion(textual=(Correction(writer=writer),))


@pytest.fixture(scope="module")
def inputs(lvlm):
    return lvlm.prepare(organism.examples("plain", "test", n=1))


def in_thread(run):
    """What a run in another thread raises."""
    raised = []

    def caught():
        try:
            run()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_plain_model_is_told_of_handles_and_never_of_a_bridge(repair, inputs):
    model, processor = organism.untrained(seed=0)
    given = {**inputs.generate_kwargs(), "max_new_tokens": 1}
    handle = repair.attach(model, processor)
    told = in_thread(lambda: model.generate(**given))
    assert isinstance(told, ThreadError) and "every_thread=True" in str(told) and "handle.carry(function)" in str(told)
    # What it says to do does it.
    assert in_thread(handle.carry(lambda: model.generate(**given))) is None
    with pytest.raises(
        GenerationOptionError, match=r"leave them out, or take the repair off first \(handle.remove\(\)"
    ) as off:
        model.generate(**given, use_cache=False)
    with pytest.raises(HookError, match=r"call model\(\*\*processor_outputs\) or model.generate") as blind:
        model.model.language_model(inputs_embeds=model.get_input_embeddings()(given["input_ids"]))
    lvlm = handle.lvlm
    handle.remove()
    with pytest.raises(RuntimeError, match=r"closed; go on with repair.attach\(model, processor\)") as closed:
        lvlm.sites()
    assert "repair.attach(model, processor)" in repr(lvlm)
    for message in (str(told), str(off.value), str(blind.value), str(closed.value), repr(lvlm)):
        assert "repair.on(lvlm)" not in message and "bridge" not in message and "lvlm.generate" not in message
    with repair.attach(model, processor, every_thread=True):
        assert in_thread(lambda: model.generate(**given)) is None


def test_a_hooked_model_is_told_of_blocks(lvlm, repair, inputs):
    given = {**inputs.generate_kwargs(), "max_new_tokens": 1}
    with repair.on(lvlm):
        told = in_thread(lambda: lvlm.generate(inputs, max_new_tokens=1))
        assert "`with repair.on(lvlm): ...`" in str(told) and "handle" not in str(told)
        with pytest.raises(GenerationOptionError, match="outside of the `with repair"):
            lvlm.hf_model.generate(**given, use_cache=False)
    lvlm.hf_model.generate(**given, use_cache=False)


def test_sites_must_be_said(lvlm, inputs):
    with pytest.raises(
        HookError, match=r"sites must be given: .*sites=\['blocks.0.hook_mlp_out'\], or sites=None for all"
    ):
        lvlm.run_with_cache(inputs)
    assert len(lvlm.run_with_cache(inputs, sites=())[1]) == 0
    assert len(lvlm.run_with_cache(inputs, sites=None)[1]) > 10


def test_a_cache_says_what_it_holds(lvlm, inputs):
    _, cache = lvlm.run_with_cache(inputs, sites=SITES)
    for key, near in (
        ("blocks.0.hook_mlpout", "did you mean 'blocks.0.hook_mlp_out'?"),
        ("nothing", "got 'nothing'; run_with_cache keeps the sites it is given"),
        (("mlp_out", 7), "got ('mlp_out', 7)"),
        (3, "got 3"),
    ):
        with pytest.raises(NotHeldError) as raised:
            cache[key]
        assert near in str(raised.value) and "'blocks.1.hook_mlp_out'" in str(raised.value)
    assert torch.equal(cache["mlp_out", 1], cache[SITES[1]]) and torch.equal(cache["mlp_out", -1], cache["mlp_out", 1])
    made = lvlm.generate(inputs, max_new_tokens=1, sites=SITES[:1])
    with pytest.raises(NotHeldError, match=r"site that was kept .* must be one of 'blocks.0.hook_mlp_out', got"):
        made.activations[SITES[1]]


def test_a_study_says_which_sets_it_holds():
    study = organism.study()
    for held, wrong, near in (
        (study.pairs, "wraper", "pair set must be one of 'wrapper'"),
        (study.suites, "tests", "split must be one of 'test'"),
        (study.suites["test"], "plains", "channel must be one of 'plain'"),
        (study.seen, "textuel", "modality must be one of 'textual'"),
    ):
        with pytest.raises(NotHeldError, match=near):
            held[wrong]


def test_what_is_no_repair_is_not_explained(lvlm, repair, inputs):
    hooks = [(SITES[0], lambda activation, hook: activation)]
    with unchecked():
        for given, message in (
            ((lvlm, hooks), "repair must come first and the model after it"),
            ((lvlm,), "repair must come first"),
            ((hooks,), r"got a list; of hooks that are functions nothing can be told: make them a defence"),
            ((hooks[0][1],), "got a function"),
            ((None,), "got a NoneType"),
            ((repair, hooks), "lvlm must be a HookedLVLM, got a list"),
            ((repair, lvlm, hooks), "inputs must be a LVLMInputs, got a list"),
        ):
            with pytest.raises(RepairError, match=message):
                explain(*given)
    assert explain(repair).frame.shape[0] == 1
