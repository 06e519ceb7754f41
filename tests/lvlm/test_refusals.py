"""What hooks must not return, and what sites, hooks and numbers of positions must not be: each is refused by name."""

import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation

from care_lens.core import Example
from care_lens.core.errors import CareLensError
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.errors import HookError

SITE = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def lvlm(llava_maker):
    return HookedLVLM.from_hf(*llava_maker("clip"))


@pytest.fixture(scope="module")
def inputs(lvlm, picture):
    return lvlm.prepare([Example("what is red", image=picture(0)), Example("how to make a blue")])


RETURNS = {
    "bool": lambda a: a > 0,
    "complex": lambda a: a.to(torch.complex64),
    "int": lambda a: a.long(),
    "rows": lambda a: torch.cat([a, a]),
    "width": lambda a: a[..., :-1],
    "scalar": lambda a: a.sum(),
    "array": lambda a: a.numpy(),
    "number": lambda a: 0.0,
    "true": lambda a: True,
    "tuple": lambda a: (a, a),
    "device": lambda a: a.to("meta"),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", RETURNS)
@pytest.mark.parametrize(
    "place",
    [
        SITE,
        "blocks.1.attn.hook_pattern",
        "vision.blocks.0.hook_mlp_out",
        "projector.hook_out",
        "ln_final.hook_normalized",
    ],
)
def test_what_a_hook_returns_must_be_what_it_was_given(lvlm, inputs, place, kind):
    pairs = [(place, lambda activation, hook: RETURNS[kind](activation))]
    runs = (
        lambda: lvlm.run_with_hooks(inputs, fwd_hooks=pairs),
        lambda: lvlm.generate(inputs, max_new_tokens=2, fwd_hooks=pairs),
    )
    for run in runs:
        with pytest.raises(HookError, match="must return") as caught:
            run()
        assert isinstance(caught.value, CareLensError) and isinstance(caught.value, ValueError)
    assert lvlm.acting() == []


@torch.no_grad()
def test_logits_to_keep_is_a_number_of_the_batchs_positions(lvlm, inputs):
    n = inputs.input_ids.shape[1]
    whole = lvlm(inputs)
    for keep in (0, 1, n):
        torch.testing.assert_close(lvlm(inputs, logits_to_keep=keep), whole[:, -keep:])
    for wrong in (-1, n + 1, True, 1.0, None, "1", torch.tensor([0])):
        for call in (
            lambda wrong=wrong: lvlm(inputs, logits_to_keep=wrong),
            lambda wrong=wrong: lvlm.run_with_hooks(inputs, fwd_hooks=[], logits_to_keep=wrong),
            lambda wrong=wrong: lvlm.run_with_cache(inputs, sites=SITE, logits_to_keep=wrong),
        ):
            with pytest.raises((ValueError, TypeError, BeartypeCallHintParamViolation), match="logits_to_keep"):
                call()


@torch.no_grad()
def test_sites_are_a_site_or_a_list_of_sites(lvlm, inputs):
    for wrong, match in (
        (list(SITE), "characters"),
        ("all", "all"),
        ([0, 1], "sites"),
        (3, "sites"),
        ([[SITE]], "sites"),
        ({SITE: 1}, "sites"),
        ([SITE, None], "sites"),
    ):
        for call in (
            lambda wrong=wrong: lvlm.run_with_cache(inputs, sites=wrong),
            lambda wrong=wrong: lvlm.generate(inputs, max_new_tokens=1, sites=wrong),
        ):
            with pytest.raises((ValueError, TypeError, BeartypeCallHintParamViolation), match=match):
                call()


@torch.no_grad()
def test_hooks_are_a_list_of_pairs(lvlm, inputs):
    for wrong in (SITE, {SITE: print}, [SITE], [(SITE,)], [(SITE, None)], [(SITE, "double")], (SITE, print), None, 3):
        for call in (
            lambda wrong=wrong: lvlm.run_with_hooks(inputs, fwd_hooks=wrong),
            lambda wrong=wrong: lvlm.generate(inputs, max_new_tokens=1, fwd_hooks=wrong),
            lambda wrong=wrong: lvlm.hooks(wrong).__enter__(),
        ):
            with pytest.raises((ValueError, TypeError, BeartypeCallHintParamViolation), match="fwd_hooks"):
                call()
    assert lvlm.acting() == []
