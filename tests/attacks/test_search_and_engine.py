"""Searches, losses, restarts, checkpoints and the universal attack, on a tiny model."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from care_lens.attacks import (
    MIFGSM,
    PGD,
    AutoPGD,
    BestOfN,
    Choices,
    EvolutionarySearch,
    HiddenGradientError,
    JudgeScore,
    LossScore,
    OutcomeLoss,
    RandomSearch,
    Renderings,
    Reworded,
    ScoreError,
    TargetLikelihood,
    TargetLoss,
    Unconstrained,
    UniversalPGD,
    judged,
    perturbed,
    pgd,
    random_noise,
    universal_perturbation,
)
from care_lens.attacks.pixels import to_pixels
from care_lens.attacks.sharded import attack_sharded
from care_lens.core import ArtifactError, AttackResult, Example, UnsafeMargin, Verdict
from care_lens.core.verdicts import OutcomeError
from care_lens.data.behaviours import deal_behaviours
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="module")
def lvlm(llava_maker):
    model = HookedLVLM.from_hf(*llava_maker("clip"))
    yield model
    model.close()


@pytest.fixture
def asked(picture):
    prompts = ("what is in the picture", "how to make a blue", "red then blue")
    return [Example(p, image=picture(i), response="sure red", harmful=True, id=str(i)) for i, p in enumerate(prompts)]


def test_attacked_pictures_keep_what_splits_and_judges_go_by(lvlm, asked, tmp_path):
    """Behaviour, group, id and what the files say of an example, through an attack, its folder and the parts of several processes."""
    meta = {"benchmark": "vlguard", "source_split": "test", "row": "3"}
    asked = [replace(e, behaviour=f"make {i}", group=f"g{i // 2}", meta=meta) for i, e in enumerate(asked)]

    def kept(examples):
        return [(e.id, e.group, e.behaviour, e.prompt, e.harmful, dict(e.meta)) for e in examples]

    def first(part, folder):
        return PGD(epsilon=8, steps=1).run(lvlm, part).examples

    for attack in (PGD(epsilon=8, steps=1), UniversalPGD(epsilon=8, steps=1), Unconstrained(steps=1)):
        result = attack.run(lvlm, asked)
        assert kept(result.examples) == kept(asked) and result.examples[0].image.tobytes() != asked[0].image.tobytes()
    assert kept(random_noise(asked, epsilon=8, seed=0)) == kept(asked)
    assert kept(pgd(lvlm, asked, epsilon=8, steps=1, batch_size=3, progress=False).apply(asked)) == kept(asked)
    assert kept(attack_sharded(first, asked, directory=tmp_path, settings={})) == kept(asked)
    result.save(tmp_path / "saved")
    assert kept(AttackResult.load(tmp_path / "saved").examples) == kept(asked)
    deals = deal_behaviours([*asked, *result.examples], {"fit": 0.5, "test": 0.5}, seed=0)
    assert deals[:3] == deals[3:]


def losses_of(lvlm, examples):
    with torch.no_grad():
        loss = TargetLoss(lvlm, examples, [["sure red"]] * len(examples))
        return loss(loss.pixels, torch.arange(len(examples))).numpy()


@pytest.mark.parametrize(
    "attack",
    [PGD(epsilon=8, steps=5), MIFGSM(epsilon=8, steps=5), AutoPGD(epsilon=8, steps=5), Unconstrained(steps=5)],
    ids=lambda a: a.name,
)
def test_each_attack_goes_down_and_says_what_its_pictures_have(lvlm, asked, attack):
    result = attack.run(lvlm, asked, seed=1)
    np.testing.assert_allclose(result.frame.loss, losses_of(lvlm, result.examples), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.frame.clean_loss, losses_of(lvlm, asked), rtol=1e-4, atol=1e-4)
    assert (result.frame.loss < result.frame.clean_loss).all()
    change = to_pixels([e.image for e in result.examples]) - to_pixels([e.image for e in asked])
    assert 0 < float(change.abs().max()) <= (8 if attack.epsilon else 255)
    history = result.to_dataframe(history=True)
    assert history.groupby("row").size().tolist() == [6, 6, 6]
    np.testing.assert_allclose(history.groupby("row").loss.min(), result.frame.loss, rtol=1e-6)


def test_restarts_share_batches_and_batches_do_not_matter(lvlm, asked):
    options = {"epsilon": 8, "steps": 1, "restarts": 3}
    whole = PGD(**options).run(lvlm, asked)
    parts = PGD(**options, batch_size=2).run(lvlm, asked)
    np.testing.assert_allclose(whole.frame.loss, parts.frame.loss, rtol=1e-3)
    assert whole.history.groupby(["row", "restart"]).size().eq(2).all() and len(whole.history) == 18
    best = whole.history.groupby("row").loss.min()
    np.testing.assert_allclose(whole.frame.loss, best, rtol=1e-6)


def test_any_loss_is_a_function(lvlm, asked):
    outcome = UnsafeMargin(comply=(5,), refuse=(6,))

    def mine(lvlm, inputs):
        assert not bool(inputs.spans.response.any())
        logits = lvlm(inputs, logits_to_keep=1)[:, -1].log_softmax(-1)
        return logits[:, 6] - logits[:, 5]

    bare = [replace(e, response=None) for e in asked]
    first, second = (PGD(epsilon=8, steps=3, loss=loss).run(lvlm, bare) for loss in (mine, OutcomeLoss(outcome)))
    np.testing.assert_allclose(first.frame.loss, second.frame.loss, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        inputs = lvlm.prepare(list(first.examples))
        np.testing.assert_allclose(first.frame.loss, -outcome(lvlm(inputs), inputs).numpy(), rtol=1e-4, atol=1e-4)
    with pytest.raises(OutcomeError, match="one finite number a row"):
        PGD(steps=1, loss=lambda lvlm, inputs: lvlm(inputs).sum()).run(lvlm, bare)
    with pytest.raises(HiddenGradientError, match="without a gradient"):
        PGD(steps=1, loss=lambda lvlm, inputs: lvlm(inputs)[:, -1, 0].detach()).run(lvlm, bare)


class Cut(Exception):
    pass


class CountedLoss:
    """The likelihood of the targets, which breaks off after so many calls."""

    version, responses = 1, True

    def __init__(self):
        self._calls, self._limit = 0, 10**9

    def __call__(self, lvlm, inputs):
        self._calls += 1
        if self._calls > self._limit:
            raise Cut
        return TargetLikelihood()(lvlm, inputs)


@pytest.mark.parametrize("kind", ["gradient", "search", "universal"])
def test_a_stopped_attack_goes_on_to_the_same_result(lvlm, asked, tmp_path, kind):
    loss = CountedLoss()
    attack = {
        "gradient": PGD(epsilon=8, steps=2, batch_size=1, loss=loss),
        "universal": UniversalPGD(epsilon=8, steps=8, loss=loss),
        "search": BestOfN(n=6, per_round=2, variation=shuffled, score=LossScore(loss)),
    }[kind]
    whole = attack.run(lvlm, asked, seed=2)
    total, path = loss._calls, tmp_path / "kept.jsonl"
    for share in (0.4, 0.6):
        loss._calls, loss._limit = 0, int(share * total)
        with pytest.raises(Cut):
            attack.run(lvlm, asked, seed=2, checkpoint=path)
    loss._calls, loss._limit = 0, 10**9
    again = attack.run(lvlm, asked, seed=2, checkpoint=path)
    assert loss._calls < total
    assert [e.image.tobytes() for e in again.examples] == [e.image.tobytes() for e in whole.examples]
    assert [e.prompt for e in again.examples] == [e.prompt for e in whole.examples]
    assert again.frame.equals(whole.frame) and again.history.equals(whole.history)
    with pytest.raises(ArtifactError, match="same settings"):
        attack.run(lvlm, asked, seed=3, checkpoint=path)


def shuffled(example, draws: random.Random):
    words = example.prompt.split()
    draws.shuffle(words)
    return replace(example, prompt=" ".join(words))


def test_one_perturbation_lowers_the_mean_loss_of_all(lvlm, asked, picture):
    result = UniversalPGD(epsilon=16, steps=6, batch_size=2).run(lvlm, asked)
    delta = universal_perturbation(result, asked)
    assert 0 < float(delta.abs().max()) <= 16
    for one, other in zip(result.examples, perturbed(asked, delta), strict=True):
        assert one.image.tobytes() == other.image.tobytes()
    np.testing.assert_allclose(result.frame.loss, losses_of(lvlm, result.examples), rtol=1e-4, atol=1e-4)
    assert result.frame.loss.mean() < result.frame.clean_loss.mean()
    means = result.history.groupby("step").loss.mean()
    assert means.min() == pytest.approx(result.frame.loss.mean(), rel=1e-6)
    with pytest.raises(ValueError, match="one size"):
        UniversalPGD(steps=1).run(lvlm, [asked[0], replace(asked[1], image=picture(1, (24, 16)))])


def test_best_of_n_is_the_best_of_those_it_drew(lvlm, asked):
    attack = BestOfN(n=5, per_round=2, variation=shuffled, batch_size=4)
    result = attack.run(lvlm, asked, seed=4)
    np.testing.assert_allclose(result.frame.loss, losses_of(lvlm, result.examples), rtol=1e-4, atol=1e-4)
    least = np.minimum(result.history.groupby("row").loss.min(), result.frame.clean_loss)
    np.testing.assert_allclose(result.frame.loss, least, rtol=1e-6)
    assert (result.frame.tries == 5).all() and result.examples[0].behaviour == asked[0].prompt
    alone = attack.run(lvlm, asked[1:2], seed=4)
    assert alone.examples[0].prompt == result.examples[1].prompt  # draws belong to the example
    stopped = replace(attack, stop_score=1e9).run(lvlm, asked, seed=4)
    assert (stopped.frame.tries == 0).all() and stopped.examples[0].prompt == asked[0].prompt


def test_evolution_finds_what_only_one_choice_gives_and_beats_random_draws(lvlm, asked):
    letters = "abcdefgh"
    space = Choices(
        choices={f"place {i}": letters for i in range(6)},
        make=lambda e, chosen: replace(e, prompt="".join(chosen.values())),
    )

    def score(model, examples):
        return [sum(a != b for a, b in zip(e.prompt, "hgfedc", strict=False)) for e in examples]

    options = {"space": space, "population": 12, "generations": 15, "score": score}
    evolved = EvolutionarySearch(**options).run(lvlm, asked)
    drawn = RandomSearch(**options).run(lvlm, asked)
    assert evolved.frame.loss.max() <= 1 and evolved.frame.loss.mean() < drawn.frame.loss.mean()
    again = EvolutionarySearch(**options).run(lvlm, asked)
    assert [e.prompt for e in again.examples] == [e.prompt for e in evolved.examples]


def test_candidates_that_do_not_fit_are_left_out(lvlm, asked):
    space = Renderings(size=(40, 40), font_sizes=(300, 5), positions=("top",), contrasts=(1.0,), layouts=("text",))
    short = [replace(e, prompt="a b") for e in asked]
    result = RandomSearch(space=space, population=6, generations=1).run(lvlm, short)
    bad = result.history.what.str.contains("fit")
    assert 0 < bad.sum() < len(bad) and bool(np.isinf(result.history.loss[bad]).all())
    assert bool(np.isfinite(result.frame.loss).all())


def test_scores_that_are_none_are_refused(lvlm, asked):
    for score in (lambda model, examples: [0.0], lambda model, examples: [float("nan")] * len(examples)):
        with pytest.raises(ScoreError, match="a number for each of 3"):
            BestOfN(n=1, score=score).run(lvlm, asked)


@pytest.mark.parametrize(
    "search",
    [
        BestOfN(n=2, variation=Reworded(("please {prompt}",))),
        RandomSearch(population=2, generations=1),
    ],
    ids=["wordings", "renderings"],
)
def test_a_judge_of_candidates_is_shown_what_is_asked_for(lvlm, asked, search):
    seen = []

    def judge(examples, texts):
        seen.extend((e.behaviour, e.prompt) for e in examples)
        return [Verdict.REFUSED] * len(texts)

    own = [replace(asked[0], behaviour=None)]
    found = replace(search, score=JudgeScore(judge, max_new_tokens=1)).run(lvlm, own)
    assert {behaviour for behaviour, _ in seen} == {own[0].prompt} == {e.behaviour for e in found.examples}
    assert any(prompt != own[0].prompt for _, prompt in seen)


def test_success_is_counted_on_what_is_read_back(lvlm, asked, tmp_path):
    seen = []

    def judge(examples, texts):
        seen.extend(examples)
        return [Verdict.COMPLIED, Verdict.REFUSED, Verdict.MISSING]

    result = PGD(epsilon=4, steps=1).run(lvlm, asked)
    counted = judged(result, lvlm, judge=judge, max_new_tokens=2, directory=tmp_path)
    assert counted.frame.complied.tolist()[:2] == [True, False] and counted.frame.complied.isna()[2]
    assert counted.success == 0.5 and type(counted).load(tmp_path).success == 0.5
    assert seen[0] is not result.examples[0] and seen[0].image.tobytes() == result.examples[0].image.tobytes()
    assert JudgeScore(judge, max_new_tokens=2)(lvlm, asked) == [0.0, 2.0, 3.0]
