"""Outcomes of one's own: functions, classes with the base class and without it give the numbers of the house's."""

import numpy as np
import pytest
import torch

from care_lens.attacks import OutcomeLoss
from care_lens.capture import TokenAttribution, capture
from care_lens.core import BaseOutcome, GeneratedOutcome, KLDivergence, OutcomeError, PrefixMargin, Verdict
from care_lens.mediation import (
    JudgedCompliance,
    attribute,
    edge_attribution,
    knockout,
    mediate,
    patch_map,
    path_effects,
)

SITE = "blocks.1.hook_mlp_out"


class Likeness(BaseOutcome):
    """A divergence, as a user would write it."""

    from_last = True

    def __init__(self, inner=None):
        self.inner = inner or KLDivergence()

    def with_reference(self, logits, inputs, rows):
        return type(self)(self.inner.with_reference(logits, inputs, rows))

    def for_rows(self, rows):
        return type(self)(self.inner.for_rows(rows))

    def __call__(self, logits, inputs):
        return self.inner(logits, inputs)


#: The same without the base class.
Duck = type(
    "Duck", (), {name: part for name, part in vars(Likeness).items() if name not in ("__dict__", "__weakref__")}
)


class Judged:
    """Judged answers without the base class; mediation must generate, and tell it its examples."""

    def __init__(self, inner):
        self.inner = inner

    def with_examples(self, examples):
        return Judged(self.inner.with_examples(examples))

    def generated(self, lvlm, inputs, rows, fwd_hooks):
        return self.inner.generated(lvlm, inputs, rows, fwd_hooks)

    def __call__(self, logits, inputs):
        raise AssertionError("never read off logits")


def early(examples, texts):
    return [Verdict.COMPLIED if text < "n" else Verdict.REFUSED for text in texts]


SWEEPS = {
    "mediate": lambda model, pairs, outcome: mediate(
        model,
        pairs,
        outcome=outcome,
        sites=[SITE, "projector.hook_out"],
        positions=("last",),
        n_boot=10,
        progress=False,
    ).details.drop(columns="layer"),
    "attribute": lambda model, pairs, outcome: (
        attribute(
            model, pairs, outcome=outcome, sites=[SITE], patches=(), method="gradient", n_boot=10, progress=False
        ).details
    ),
    "patch_map": lambda model, pairs, outcome: (
        patch_map(model, pairs, site="projector.hook_out", outcome=outcome, n_boot=10, progress=False).frame
    ),
    "knockout": lambda model, pairs, outcome: (
        knockout(model, pairs, source="text", target="last", outcome=outcome, n_boot=10, progress=False).details
    ),
    "path_effects": lambda model, pairs, outcome: (
        path_effects(
            model, pairs, senders=["blocks.0.hook_mlp_out"], outcome=outcome, n_boot=10, progress=False
        ).details
    ),
    "edges": lambda model, pairs, outcome: (
        edge_attribution(
            model, pairs, outcome=outcome, method="gradient", receivers=["end"], n_boot=10, progress=False
        ).details
    ),
}


@pytest.mark.parametrize("sweep", SWEEPS)
@pytest.mark.parametrize("kind", [Likeness, Duck])
def test_a_divergence_of_ones_own_is_the_houses(model, pictured, sweep, kind):
    own, houses = (
        SWEEPS[sweep](model, pictured, outcome).select_dtypes("number") for outcome in (kind(), KLDivergence())
    )
    np.testing.assert_array_equal(own.to_numpy(float), houses.to_numpy(float))
    assert np.nan_to_num(np.abs(houses.to_numpy(float))).max() > 0


def test_generated_answers_of_a_class_of_ones_own(model, pictured):
    houses = JudgedCompliance(early, max_new_tokens=1)
    own, expected = (SWEEPS["mediate"](model, pictured, outcome) for outcome in (Judged(houses), houses))
    np.testing.assert_array_equal(*(one.select_dtypes("number").to_numpy(float) for one in (own, expected)))


class Called(GeneratedOutcome):
    """Generated answers with a ``__call__``, as such classes had."""

    def __init__(self, made):
        self.made = made

    def generated(self, lvlm, inputs, rows, fwd_hooks):
        return self.made(len(rows))

    def __call__(self, logits, inputs):
        raise AssertionError("never read off logits")


class CalledPrefixes(PrefixMargin):
    def __call__(self, logits, inputs):
        raise AssertionError("never read off logits")


@pytest.mark.parametrize(
    "outcome",
    [
        PrefixMargin(("sure",), ("sorry",)),
        JudgedCompliance(early),
        Called(torch.zeros),
        CalledPrefixes(("sure",), ("sorry",)),
    ],
    ids=lambda outcome: type(outcome).__name__,
)
def test_what_is_not_read_off_the_logits_of_one_run_is_refused_before_anything_runs(
    model, pictured, outcome, monkeypatch
):
    run = type(model).run_with_hooks
    monkeypatch.setattr(type(model), "run_with_hooks", lambda *a, **k: pytest.fail("a model was run"))
    calls = [lambda call=call: call(model, pictured, outcome) for name, call in SWEEPS.items() if name != "mediate"]
    how = TokenAttribution(method="gradient")
    calls.append(
        lambda: capture(
            model,
            pictured.safe,
            [SITE],
            positions=("image:attributed",),
            attribution=how,
            outcome=outcome,
            progress=False,
        )
    )
    calls.append(lambda: OutcomeLoss(outcome)(model, model.prepare(list(pictured.safe))))
    for call in calls:
        with pytest.raises(
            OutcomeError, match=rf"got {type(outcome).__name__}; use UnsafeMargin.*or measure with .*mediate"
        ):
            call()
    monkeypatch.setattr(type(model), "run_with_hooks", run)


def test_a_function_needs_no_more_than_logits(model, pictured):
    token = 5

    def logit(logits, inputs):
        return logits[:, -1, token]

    found = SWEEPS["mediate"](model, pictured, logit)
    with torch.no_grad():
        expected = model(model.prepare(list(pictured.safe)))[:, -1, token]
    assert found.groupby("pair").safe.first().tolist() == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", [torch.zeros, np.zeros, lambda n: torch.full((n,), torch.nan)])
def test_numbers_of_generated_answers_are_taken_in_any_precision(model, pictured, kind):
    found = SWEEPS["mediate"](model, pictured, Called(kind))
    expected = np.nan_to_num(np.asarray(kind(1)), nan=-1).item()
    assert (found[["safe", "unsafe"]].fillna(-1) == expected).all(axis=None)


@pytest.mark.parametrize(
    "made", [lambda n: torch.zeros(n + 1), lambda n: [0.0] * n, lambda n: torch.full((n,), torch.inf)]
)
def test_generated_outcomes_that_are_not_one_number_a_row_are_refused(model, pictured, made):
    with pytest.raises(OutcomeError, match="'Called' must return one finite number a row"):
        SWEEPS["mediate"](model, pictured, Called(made))


@pytest.mark.parametrize("sweep", SWEEPS)
def test_a_class_and_what_has_no_call_are_refused_before_anything_runs(model, pictured, sweep, monkeypatch):
    monkeypatch.setattr(type(model), "run_with_hooks", lambda *a, **k: pytest.fail("a model was run"))
    with pytest.raises(OutcomeError, match=r"got the class Likeness; write Likeness\(\.\.\.\)"):
        SWEEPS[sweep](model, pictured, Likeness)
    with pytest.raises(OutcomeError, match=r"must have __call__.*got Nothing without it; write it"):
        SWEEPS[sweep](model, pictured, type("Nothing", (BaseOutcome,), {})())


class Weighted(BaseOutcome):
    """The length of each prompt times a logit, which asks for the batch's examples."""

    def __init__(self, examples=()):
        self.examples = examples

    def with_examples(self, examples):
        return Weighted(tuple(examples))

    def for_rows(self, rows):
        return Weighted(tuple(self.examples[row] for row in rows))

    def __call__(self, logits, inputs):
        return logits[:, -1, 5] * torch.tensor([float(len(example.prompt)) for example in self.examples])


def test_an_outcome_is_told_the_examples_wherever_there_are_some(model, pictured):
    for name, sweep in SWEEPS.items():
        assert np.isfinite(sweep(model, pictured, Weighted()).select_dtypes("number").to_numpy(float)).any(), name
    how = TokenAttribution(method="gradient")
    options = {"positions": ("image:attributed",), "attribution": how, "batch_size": 1, "progress": False}
    found = capture(model, pictured.safe, [SITE], outcome=Weighted(), **options)
    plain = capture(model, pictured.safe, [SITE], outcome=lambda logits, inputs: logits[:, -1, 5], **options)
    for key in found.values:
        torch.testing.assert_close(found.values[key], plain.values[key])
    # A function is named, not where it is in memory, or no other process could go on.
    assert (found.provenance["outcome"], plain.provenance["outcome"]) == ("Weighted", "<lambda>")


def test_a_reference_is_told_where_the_method_is_the_objects_own(model, pictured):
    """``compares`` asks the object: mediation told the untouched runs of such an outcome a reference, and the patched ones none."""

    class Delegating(BaseOutcome):
        from_last = True

        def __init__(self, inner):
            self.inner = inner
            self.with_reference = lambda logits, inputs, rows: Delegating(inner.with_reference(logits, inputs, rows))

        def for_rows(self, rows):
            return Delegating(self.inner.for_rows(rows))

        def __call__(self, logits, inputs):
            return self.inner(logits, inputs)

    own, houses = (
        SWEEPS["mediate"](model, pictured, outcome).select_dtypes("number")
        for outcome in (Delegating(KLDivergence()), KLDivergence())
    )
    np.testing.assert_array_equal(own.to_numpy(float), houses.to_numpy(float))


def test_the_loss_of_an_attack_refuses_what_is_no_number_a_row(model, pictured):
    with pytest.raises(OutcomeError, match="one finite number a row"):
        OutcomeLoss(lambda logits, inputs: logits)(model, model.prepare(list(pictured.safe)))
