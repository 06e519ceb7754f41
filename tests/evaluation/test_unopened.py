"""A closed gate needs no second generation: the answers are those of a full run, and only what a gate opens for is generated."""

from contextlib import nullcontext
from dataclasses import replace

import pandas as pd
import pytest
import torch

from care_lens import organism
from care_lens.core import Example, Site
from care_lens.core.forked import in_workers
from care_lens.core.identity import repair_fingerprint
from care_lens.defences import CAST, HiddenDetect
from care_lens.evaluation import GenerationStore, evaluate, generate_all, next_token_kl
from care_lens.lvlm import HookedLVLM
from care_lens.repair import (
    AlwaysOpen,
    ConformalGate,
    Correction,
    HybridFusion,
    LinearReader,
    MaxReader,
    RepairError,
    SoftGate,
    Writer,
    opens,
    read_scores,
)

TOKENS = 7


@pytest.fixture(scope="module")
def world():
    return organism.load()


@pytest.fixture(scope="module")
def asked():
    """Requests of several lengths, with and without pictures, some of which have their answers begun."""
    channels = [
        organism.examples(name, "validation", n=4) for name in ("benign read", "plain", "typographic", "wrapper")
    ]
    made = [e for channel in channels for e in channel]
    return [replace(e, prefill="i" if i % 5 == 4 and e.harmful else None) for i, e in enumerate(made)]


def reader(seed, positions, site="blocks.3.hook_resid_post"):
    draw = torch.Generator().manual_seed(seed)
    return LinearReader(
        site=Site.parse(site), direction=torch.randn(160, generator=draw), centre=torch.zeros(160), positions=positions
    )


def gated(world, asked, parts, share, **options):
    """A repair whose one gate opens for a share of the requests, by the largest score of all of its readers."""
    readers = [reader(i, where) for i, (where, _) in enumerate(parts)]
    scores = read_scores(world, asked, [MaxReader(readers=tuple(readers))], max_new_tokens=TOKENS, progress=False)[:, 0]
    below, above = scores.sort().values[len(scores) - round(share * len(scores)) - 1 :][
        :2
    ]  # a score itself may be missed by a rounding
    gate = ConformalGate(threshold=float(below + above) / 2, epsilon=0.1, n=9)
    corrections = tuple(
        Correction(
            writer=Writer.towards(
                "blocks.4.hook_resid_post",
                target=300 * torch.randn(160, generator=torch.Generator().manual_seed(50 + i)),
                source=torch.zeros(160),
                scope=scope,
            ),
            reader=one,
            gate=gate,
            **options,
        )
        for i, (one, (_, scope)) in enumerate(zip(readers, parts, strict=True))
    )
    return HybridFusion(textual=corrections), scores > gate.threshold


KINDS = {
    "prompt": ([("last", "last")], {"pulse": True}),
    "pictures": ([("image", "prompt")], {}),
    "answer": ([("generated", "generated")], {}),
    "answer, once": ([("generated", "generated")], {"pulse": True}),
    "prompt and answer": ([("last", "last"), ("generated", "generated")], {"pulse": False}),
}


@pytest.fixture
def generated(world, monkeypatch):
    """How many rows are generated, undefended ones and others."""
    counts = {"plain": 0, "defended": 0}
    generate = type(world).generate

    def counting(self, inputs, **options):
        counts["defended" if self.acting() else "plain"] += inputs.batch_size
        return generate(self, inputs, **options)

    monkeypatch.setattr(type(world), "generate", counting)
    return counts


def answered(world, asked, store, repair=None, **options):
    return generate_all(
        world,
        asked,
        store=store,
        repair=repair,
        **{"max_new_tokens": TOKENS, "batch_size": 32, "progress": False, "defence_name": "d"} | options,
    )


@pytest.fixture(scope="module")
def plain(world, asked):
    """The undefended answers."""
    return answered(world, asked, GenerationStore())


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_a_full_run_and_only_opened_rows_are_generated(world, asked, plain, generated, kind):
    parts, options = KINDS[kind]
    repair, opened = gated(world, asked, parts, 0.4, **options)
    generated.update(plain=0, defended=0)
    full = answered(world, asked, GenerationStore(), repair)
    assert generated == {"plain": 0, "defended": len(asked)}
    assert 3 <= int(opened.sum()) <= len(asked) - 3
    assert any(a.token_ids != b.token_ids for a, b in zip(full, plain, strict=True))
    for watched, batch_size in (((repair,), 32), ((), 5)):
        store = GenerationStore()
        if watched:
            answered(world, asked, store, watched=watched)
        store.add(plain)
        generated.update(plain=0, defended=0)
        assert answered(world, asked, store, repair, batch_size=batch_size) == full
        assert generated == {"plain": 0, "defended": int(opened.sum())}


def test_one_undefended_generation_reads_the_gates_of_all_candidates(world, asked, generated, monkeypatch):
    made = [
        gated(world, asked, KINDS[kind][0], share, **KINDS[kind][1])
        for kind, share in (("prompt", 0.2), ("answer", 0.5))
    ]
    store, passes = GenerationStore(), []
    run = HookedLVLM.run_with_hooks
    monkeypatch.setattr(HookedLVLM, "run_with_hooks", lambda self, *a, **k: passes.append(1) or run(self, *a, **k))
    repairs = [repair for repair, _ in made]
    answered(world, asked, store, watched=repairs)
    generated.update(plain=0, defended=0)
    for repair in repairs:
        answered(world, asked, store, repair, watched=repairs)
    assert generated["defended"] == sum(int(opened.sum()) for _, opened in made) and not passes
    again = GenerationStore()
    again.add([a for a in store.answers() if a.settings == store.answers()[0].settings])  # as another process finds it
    for repair in repairs:
        answered(world, asked, again, repair, watched=repairs)
    assert len(passes) == 1
    assert [a for a in again.answers()] == [a for a in store.answers()]


def test_gates_that_other_processes_read_beside_the_model_are_known_here(world, asked, monkeypatch):
    repair, opened = gated(world, asked, KINDS["answer"][0], 0.5)
    passes, run = [], HookedLVLM.run_with_hooks
    monkeypatch.setattr(HookedLVLM, "run_with_hooks", lambda self, *a, **k: passes.append(1) or run(self, *a, **k))

    def told(n):
        store = GenerationStore()
        with in_workers(n):
            answered(world, asked, store, watched=[repair], batch_size=8)
            answered(world, asked, store, repair, watched=[repair], batch_size=8)
        assert store.opened_for(repair, asked) == opened.tolist()
        return [a.token_ids for a in store.answers()]

    assert told(1) == told(2) and not passes


def test_the_table_is_that_of_full_runs(world, asked, generated, monkeypatch):
    repair, opened = gated(world, asked, KINDS["prompt and answer"][0], 0.4)
    suites = {"attacks": [e for e in asked if e.harmful], "benign": [e for e in asked if not e.harmful]}
    options = {"judge": organism.OrganismJudge(), "max_new_tokens": TOKENS, "n_boot": 20, "progress": False}
    generated.update(plain=0, defended=0)
    found = evaluate(world, suites, {"gated": repair, "none": None}, **options)
    assert generated == {"plain": len(asked), "defended": int(opened.sum())}
    with monkeypatch.context() as patch:
        patch.setattr(HybridFusion, "watch", lambda self, lvlm, inputs: None)
        full = evaluate(world, suites, {"gated": repair, "none": None}, **options)
    assert generated == {"plain": 2 * len(asked), "defended": int(opened.sum()) + len(asked)}
    pd.testing.assert_frame_equal(found.trials, full.trials, rtol=1e-3, atol=1e-6)
    kl = found.trials[found.trials["metric"] == "kl_answer"]
    assert set(kl["id"][kl["value"] > 0]) <= {e.id for e, touched in zip(asked, opened, strict=True) if touched}


def test_rival_gates_are_read_too(world, asked, plain, generated):
    kinds = {e.channel: [x for x in asked if x.channel == e.channel] for e in asked}
    cast = CAST.fit(
        world,
        benign=kinds["benign read"],
        malicious=kinds["wrapper"],
        refused=kinds["plain"],
        condition_layer=2,
        layers=[3],
        alpha=4.0,
    )
    ids = tuple(world.tokenizer("sorry i cannot", add_special_tokens=False)["input_ids"])
    refuses = HiddenDetect(layers=(0, 3), refusal_tokens=ids[:2], refusal_ids=(*ids, 2), threshold=0.0, width=160)
    refuses = replace(refuses, threshold=float(refuses.scores(world, asked).median()))
    for defence in (cast, refuses):
        full = answered(world, asked, GenerationStore(), defence)
        for watched in ((defence,), ()):
            store = GenerationStore()
            if watched:
                answered(world, asked, store, watched=watched)
            store.add(plain)
            generated.update(plain=0, defended=0)
            assert answered(world, asked, store, defence) == full
            assert 0 < generated["defended"] < len(asked)


def test_what_always_acts_is_sampled_or_rewrites_is_generated_in_full(world, asked, plain, generated):
    (correction,) = gated(world, asked, KINDS["prompt"][0], 0.2)[0].textual
    free = replace(correction, reader=None, gate=AlwaysOpen())
    soft = replace(correction, gate=SoftGate(threshold=1e6, temperature=1.0))

    class Rewrites(HybridFusion):
        def describe(self):
            return {"kind": "rewrites"}

        def examples(self, examples):
            return [replace(e, prompt=f"{e.prompt} red") if e.harmful else e for e in examples]

    class Elsewhere(HybridFusion):
        def describe(self):
            return {"kind": "elsewhere"}

        def on(self, lvlm):
            return nullcontext()

    shut = replace(correction, gate=ConformalGate(threshold=1e9, epsilon=0.1, n=9))
    harmful = sum(e.harmful for e in asked)
    cases = [
        (HybridFusion(textual=(free, shut)), {}, len(asked)),
        (HybridFusion(textual=(soft,)), {}, len(asked)),
        (HybridFusion(textual=(shut,)), {"generation": {"do_sample": True}}, len(asked)),
        (Rewrites(textual=(shut,)), {}, harmful),
        (Elsewhere(textual=(shut,)), {}, len(asked)),
        (HybridFusion(textual=(shut,)), {}, 0),
    ]
    for repair, options, expected in cases:
        store = GenerationStore()
        store.add(plain if not options else answered(world, asked, store, **options))
        generated.update(plain=0, defended=0)
        answered(world, asked, store, repair, **options)
        assert sum(generated.values()) == expected, repair


def test_an_undefended_answer_that_failed_or_has_no_tokens_is_not_taken_over(world, asked, plain, generated):
    repair = gated(world, asked, KINDS["prompt"][0], 0.2)[0]
    shut = repair.with_gate(ConformalGate(threshold=1e9, epsilon=0.1, n=9))
    store, first = GenerationStore(), plain
    store.add(first)
    store.add([replace(first[0], response=None, missing="ValueError", token_ids=()), replace(first[1], token_ids=())])
    generated.update(plain=0, defended=0)
    assert [a.response for a in answered(world, asked, store, shut)] == [a.response for a in first]
    assert generated["defended"] == 2


def test_gates_that_cannot_be_read_beside_the_model_cost_a_generation_and_no_answer(world, asked):
    class Loud(HybridFusion):
        def describe(self):
            return {"kind": "loud"}

        def fwd_hooks(self, inputs):
            def hook(activation, hook):
                raise MemoryError("no room")

            return [("blocks.0.hook_resid_post", hook)]

    repair = gated(world, asked, KINDS["prompt"][0], 0.2)[0]
    loud = Loud(textual=repair.textual)
    store = GenerationStore()
    plain = answered(world, asked, store, watched=[loud, repair])
    assert not any(a.missing for a in plain)
    assert {a.missing for a in answered(world, asked[:3], store, loud)} == {"MemoryError"}


def test_a_gate_that_is_noise_after_the_end_of_an_answer_does_not_count(world, asked):
    """Rows that ended get padding while others go on; a reader may see anything there."""
    repair, opened = gated(world, asked, KINDS["answer"][0], 0.4)
    store = GenerationStore()
    plain = answered(world, asked, store, watched=[repair])
    assert len({len(a.token_ids) for a in plain}) > 1
    noted = [store.touched(repair_fingerprint(repair), a) for a in plain]
    assert noted == opened.tolist()
    inputs = world.prepare(asked)
    assert opens(repair, world, inputs, [a.token_ids for a in plain]).tolist() == opened.tolist()
    with pytest.raises(RepairError, match="one for each"):
        opens(repair, world, inputs, [[1, 2]])


def test_divergence_is_measured_of_what_a_gate_opens_for_alone(world, asked, plain, monkeypatch):
    """Prompts and answers on which the gate stays closed diverge by exactly nothing, and are not run again."""
    repair, opened = gated(world, asked, KINDS["prompt and answer"][0], 0.4)
    texts = [a.response for a in plain]
    rows: list[int] = []
    run = HookedLVLM.run_with_hooks

    def counting(self, inputs, **options):
        rows.append(inputs.batch_size if self.acting() else 0)
        return run(self, inputs, **options)

    monkeypatch.setattr(HookedLVLM, "run_with_hooks", counting)
    found = next_token_kl(world, asked, texts, repairs={"d": repair}, batch_size=9, progress=False)["d"]
    touched, rows[:] = sum(rows), []
    monkeypatch.setattr(HybridFusion, "watch", lambda self, lvlm, inputs: None)
    full = next_token_kl(world, asked, texts, repairs={"d": repair}, batch_size=9, progress=False)["d"]
    assert sum(rows) == len(asked) and int(opened.sum()) <= touched < len(asked)
    torch.testing.assert_close(found, full, rtol=1e-3, atol=1e-6)
    assert 0 < int((full[:, 1] > 0).sum()) <= touched and bool((found[full == 0] == 0).all())


def test_the_same_request_in_another_channel_has_the_same_undefended_answer(world):
    one = Example("how to make red", harmful=True, channel="a", id="x")
    store = GenerationStore()
    answered(world, [one], store)
    answer = store.undefended(store.answers()[0].settings, replace(one, channel="b", id="y"), 0)
    assert answer == store.answers()[0]
    assert store.undefended(store.answers()[0].settings, replace(one, prompt="how to make blue"), 0) is None
