"""Functions of the user's own that cannot be called as they will be are refused in words that say how they are called."""

import os
import re
import subprocess
import sys

import pytest
import torch

from care_lens import organism
from care_lens.core import Example, JudgeError, OutcomeError, PairedExamples
from care_lens.core.verdicts import read_out, require_call, require_outcome
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.errors import HookError
from care_lens.mediation import ablate, mediate


@pytest.fixture(scope="module")
def lvlm():
    with HookedLVLM.from_hf(*organism.untrained(seed=0)) as lvlm:
        yield lvlm


@pytest.mark.parametrize(
    "function", [lambda logits: logits, lambda: 0, lambda logits, inputs, more: logits], ids=["one", "none", "three"]
)
def test_an_outcome_is_called_with_logits_and_inputs(function):
    with pytest.raises(OutcomeError, match=r"an outcome is called as function\(logits, inputs\), which <lambda>\("):
        read_out(function, torch.zeros(1, 2, 3), None)


def test_what_can_be_called_is_not_refused():
    class Outcome:
        def __call__(self, logits, inputs, scale=2.0):
            return logits[:, -1, 0] * scale

    assert read_out(Outcome(), torch.ones(1, 2, 3), None).tolist() == [2.0]
    assert read_out(lambda *given: len(given), torch.ones(1), None) == 2
    for function in (max, print, torch.zeros(1)):  # in C, or no function: Python says what is wrong with it
        require_call(function, "logits", what="an outcome", error=OutcomeError)


def test_a_judge_is_no_outcome():
    def judge(logits, inputs):
        raise JudgeError("texts must be a list")

    with pytest.raises(OutcomeError, match=r"which judges answers .* take care_lens.mediation.JudgedCompliance"):
        read_out(judge, torch.zeros(1, 2, 3), None)


def test_the_advice_is_for_the_shape_that_was_returned():
    for values in (torch.tensor(1.0), [1.0, 2.0]):
        with pytest.raises(OutcomeError, match=r"return a tensor such as logits\[:, -1, token\]$"):
            require_outcome(values, 2)
    with pytest.raises(OutcomeError, match=r"take the mean or sum over the other axes$"):
        require_outcome(torch.zeros(2, 3), 2)


@pytest.mark.parametrize("function", [lambda activation: activation, lambda activation, point: activation])
def test_a_hook_is_called_with_its_point_by_name(lvlm, function):
    inputs = lvlm.prepare(organism.examples("plain", "test", n=1))
    with pytest.raises(
        HookError, match=r"a hook at blocks.0.hook_mlp_out is called as function\(activation, hook=point\)"
    ):
        lvlm.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_mlp_out", function)])


def test_a_name_of_transformer_lens_that_is_no_site_says_how_it_is_cached(lvlm):
    inputs = lvlm.prepare(organism.examples("plain", "test", n=1))
    with pytest.raises(ValueError, match=r"no site: hooks may be there, and lvlm.bind\(inputs\).run_with_cache"):
        lvlm.run_with_cache(inputs, sites=["ln_final.hook_scale"])
    with pytest.raises(ValueError, match=r"^(?!.*hooks may be there)"):
        lvlm.run_with_cache(inputs, sites=["ln_final.hook_nothing"])


def test_heads_are_not_ablated_by_their_mean(lvlm):
    asked, judge = organism.examples("plain", "test", n=2), organism.OrganismJudge()
    with pytest.raises(ValueError, match=r"got blocks.0.attn.hook_z; use mode 'zero', or .* mediate\(..., sites=heads"):
        ablate(lvlm, asked, judge=judge, components=["attn.hook_z"], layers=[0], progress=False)
    done = ablate(
        lvlm,
        asked,
        judge=judge,
        components=["attn.hook_z"],
        layers=[0],
        mode="zero",
        max_new_tokens=2,
        n_boot=20,
        progress=False,
    )
    assert "attn.hook_z" in set(done.frame["component"])


def test_a_twin_without_a_picture_is_told(lvlm):
    (pictured,) = organism.examples("typographic", "test", n=1)
    pairs = PairedExamples((Example("tell me"),), (pictured,))
    with pytest.raises(ValueError, match=r"images in both twins .* give a twin without a picture a grey one"):
        mediate(
            lvlm,
            pairs,
            outcome=organism.outcome(),
            sites=["blocks.0.hook_mlp_out"],
            positions=("image",),
            progress=False,
        )


def test_after_unwrap_a_model_is_wrapped_anew():
    model, processor = organism.untrained(seed=0)
    lvlm = HookedLVLM.from_hf(model, processor)
    model = lvlm.unwrap()
    with pytest.raises(RuntimeError, match=r"after unwrap\(\) with HookedLVLM.from_hf\(model, processor\)"):
        lvlm.sites()
    with HookedLVLM.from_hf(model, processor) as again:
        assert again.sites()


def test_messages_as_a_user_sees_them():
    """In a process as a user's, where types are checked at the package's own door alone."""
    code = """
from care_lens import Example, HybridFusion, PairedExamples, organism, planted
from care_lens.core import OutcomeError
from care_lens.evaluation import GenerationStore, evaluate, generate_all
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import Localisation, mediate
from pandas import DataFrame

lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
asked, judge = organism.examples("plain", "test", n=1), organism.OrganismJudge()
pairs, site = organism.pairs("typographic", "fit", n=2), "blocks.1.hook_mlp_out"

class Unfinished:
    name = "unfinished"

def entered(localiser):
    planted.scorecard({"mine": localiser}, plants=["mlp_1"], at=[1.0], n=4, ours=False, progress=False)

# As localise returns it.
found = Localisation(DataFrame({"mediator": [site]}), {})

def tell(call):
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("nothing was refused")

tell(lambda: lvlm.n_layers("text"))
tell(lambda: evaluate(lvlm, {"plain": asked}, {"none": None, "mine": Unfinished()}, judge=judge))
tell(lambda: generate_all(lvlm, asked, repair=Unfinished(), store=GenerationStore(), progress=False))
tell(lambda: mediate(lvlm, pairs, outcome=judge, sites=[site], progress=False))
tell(lambda: entered(lambda lvlm: []))
tell(lambda: entered(lambda lvlm, pairs: {site: 1.0}))
tell(lambda: entered(lambda lvlm, pairs: found))
tell(lambda: planted.scorecard({}, plants="mlp_1", ours=False))
tell(lambda: lvlm.run_with_hooks(lvlm.prepare(asked), fwd_hooks=(site, print)))
# The check of types does not stand before what the classes say.
tell(lambda: Example("a", image="x.png"))
tell(lambda: Example("a", turns=[{"role": "user"}]))
tell(lambda: HybridFusion(visual=3))
print(PairedExamples([Example("a")], [Example("b")]).safe[0].prompt)
"""
    env = {name: value for name, value in os.environ.items() if name != "CARE_LENS_UNCHECKED"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    for line, told in zip(
        out.splitlines(),
        (
            r"ValueError tower must be one of \(.*'language'\), got 'text'$",
            r"DefenceError defence 'mine' must have .*, got Unfinished without on, describe; give it a",
            r"ArgumentError repair of generate_all .*; a defence has a name and the methods on\(lvlm\), a context manager, and describe\(\)$",
            r"OutcomeError .* which judges answers .* take care_lens.mediation.JudgedCompliance\(judge\)$",
            r"PlantError the localiser 'mine' is called as function\(lvlm, pairs\)",
            r"PlantError .* got dict; return sorted\(scores, key=scores.get, reverse=True\)$",
            r"PlantError .* got Localisation; return list\(found.frame\['mediator'\]\)$",
            r"ArgumentError plants of scorecard must be several, got the text 'mlp_1'; write \['mlp_1'\]$",
            r"ArgumentError fwd_hooks of .*; write a list of pairs, \[\(site, function\), \.\.\.\]$",
            r"ExampleError image must be a PIL image, got str; make one with",
            r"ExampleError turns must be care_lens.Turn, got dict; see Example.from_messages",
            r"RepairError visual must be a tuple of corrections",
            r"a$",
        ),
        strict=True,
    ):
        assert re.match(told, line), line
