"""Against the definitions, by hand, on a model small enough for that."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from care_lens.core import Example, Repair
from care_lens.defences import NoRefusalDirectionError, RefusalDirection
from care_lens.lvlm import HookedLVLM
from care_lens.organism import build

LAYERS = 5


@pytest.fixture(scope="module")
def lvlm():
    """A bundled model without training: small weights, so that one direction changes little."""
    return HookedLVLM.from_hf(*build.untrained(seed=1, layers=LAYERS))


@pytest.fixture(scope="module")
def sets(lvlm):
    words = [word for word in build.vocabulary() if word.isalpha()]
    pick = torch.Generator().manual_seed(0)

    def some(n, first):
        rows = torch.randint(len(words), (n, 3), generator=pick).tolist()
        return [Example(" ".join([first, *(words[i] for i in row)][: 2 + k % 3])) for k, row in enumerate(rows)]

    return {
        "harmful": some(7, words[0]),
        "harmless": some(6, words[50]),
        "harmful_validation": some(4, words[0]),
        "harmless_validation": some(5, words[50]),
    }


def figures(lvlm, sets, direction, layer, tokens):
    """bypass, induce and kl one example at a time."""

    def score(examples, hooks):
        scores, distributions = [], []
        for example in examples:
            with torch.no_grad():
                logits = lvlm.run_with_hooks(lvlm.prepare(example), fwd_hooks=hooks)[0, -1].double()
            p = logits.softmax(-1)
            scores.append((p[tokens].sum() + 1e-8).log() - (1 - p[tokens].sum() + 1e-8).log())
            distributions.append(p)
        return torch.stack(scores).mean(), distributions

    unit = (direction / direction.norm()).float()
    ablate = [
        (f"blocks.{i}.{component}", lambda a, hook: a - torch.outer(a[0] @ unit, unit)[None])
        for i in range(LAYERS)
        for component in ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
    ]
    add = [(f"blocks.{layer}.hook_resid_pre", lambda a, hook: a + direction.float())]
    bypass, _ = score(sets["harmful_validation"], ablate)
    induce, _ = score(sets["harmless_validation"], add)
    _, plain = score(sets["harmless_validation"], [])
    _, ablated = score(sets["harmless_validation"], ablate)
    kl = sum((p * (p / q).log()).sum() for p, q in zip(plain, ablated, strict=True)) / len(plain)
    return [float(bypass), float(induce), float(kl)]


def fit(lvlm, sets, tokens, **options):
    return RefusalDirection.fit(lvlm, **sets, refusal_tokens=tokens, batch_size=3, progress=False, **options)


def inducing_tokens(lvlm, sets):
    """Half of the vocabulary, those likeliest on harmless requests, so that scores are around 0 or above."""
    with torch.no_grad():
        p = torch.stack([lvlm(lvlm.prepare(e))[0, -1].softmax(-1) for e in sets["harmless_validation"]])
    return p.mean(0).topk(p.shape[1] * 2 // 3).indices.tolist()


def test_directions_figures_and_choice_by_hand(lvlm, sets):
    tokens = inducing_tokens(lvlm, sets)
    found = fit(lvlm, sets, tokens)
    table = found.candidates
    endings = set(table["position"])
    assert endings == {-2, -1}  # "assistant :" is what ends all prompts
    assert len(table) == 2 * LAYERS
    means = {}
    for name in ("harmful", "harmless"):
        rows = []
        for example in sets[name]:
            sites = [f"blocks.{layer}.hook_resid_pre" for layer in range(LAYERS)]
            _, cache = lvlm.run_with_cache(lvlm.prepare(example), sites=sites)
            rows.append(torch.stack([cache[site][0, -2:] for site in sites], dim=1))
        means[name] = torch.stack(rows).double().mean(0)
    directions = means["harmful"] - means["harmless"]
    for _, row in table.sample(3, random_state=0).iterrows():
        position, layer = int(row["position"]), int(row["layer"])
        expected = figures(lvlm, sets, directions[position, layer], layer, tokens)
        assert row[["bypass", "induce", "kl"]].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    kept = table[(table["layer"] < 4) & (table["kl"] <= 0.1) & (table["induce"] >= 0)]
    assert 0 < len(kept) < len(table)
    assert table["kept"].sum() == len(kept)
    best = kept.sort_values("bypass").iloc[0]
    assert (found.position, found.layer) == (best["position"], best["layer"])
    torch.testing.assert_close(found.direction, directions[found.position, found.layer].float())


def test_none_left_is_an_error_of_its_own(lvlm, sets):
    with pytest.raises(NoRefusalDirectionError, match="got none"):
        fit(lvlm, sets, [0], positions=1)
    with pytest.raises(ValueError, match="harmless must not be empty"):
        fit(lvlm, {**sets, "harmless": []}, [0])


def test_where_none_passes_the_error_has_the_nearest_one(lvlm, sets):
    """No candidate makes one token likelier than all others; figures and direction of the nearest are those of the model."""
    with pytest.raises(NoRefusalDirectionError) as caught:
        fit(lvlm, sets, [0])
    nearest = pickle.loads(pickle.dumps(caught.value)).nearest
    table = nearest.candidates
    assert len(table) == 2 * LAYERS and not table["kept"].any()
    considered = table[np.isfinite(table[["bypass", "induce", "kl"]]).all(axis=1) & (table["layer"] < 4)]
    missed = (considered["kl"] > 0.1).astype(int) + (considered["induce"] < 0)
    best = considered[missed == missed.min()].sort_values("induce").iloc[-1]
    assert considered["induce"].max() < 0 and len(considered) > 2
    assert (nearest.position, nearest.layer) == (best["position"], best["layer"])
    assert f"layer {nearest.layer}, kl {best['kl']:.3g} and induce {best['induce']:.3g}" in str(caught.value)
    expected = figures(lvlm, sets, nearest.direction.double(), nearest.layer, [0])
    assert best[["bypass", "induce", "kl"]].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_as_a_defence_it_is_added_at_every_token_but_padding(lvlm, sets):
    found = dataclasses.replace(fit(lvlm, sets, inducing_tokens(lvlm, sets), positions=1), coefficient=0.5)
    assert isinstance(found, Repair)
    assert found.describe()["coefficient"] == 0.5
    inputs = lvlm.prepare(sets["harmful"])
    assert bool(inputs.spans.padding.any())
    steps = []
    spy = (found.site, lambda activation, hook: steps.append(activation.clone()))
    hooks = [spy, *found.fwd_hooks(inputs), spy]
    lvlm.generate(inputs, max_new_tokens=3, min_new_tokens=3, fwd_hooks=hooks)
    added = [after - before for before, after in zip(steps[::2], steps[1::2], strict=True)]
    assert [a.shape[1] for a in added] == [inputs.input_ids.shape[1], 1, 1]
    kept = ~inputs.spans.padding
    torch.testing.assert_close(added[0], 0.5 * found.direction * kept[..., None], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(added[2], (0.5 * found.direction).expand_as(added[2]), atol=1e-6, rtol=1e-4)
    with torch.no_grad(), found.on(lvlm):
        repaired = lvlm(inputs)
    with torch.no_grad():
        assert not torch.equal(repaired, lvlm(inputs))
        assert torch.equal(repaired, lvlm.run_with_hooks(inputs, fwd_hooks=found.fwd_hooks(inputs)))


def test_another_models_direction_is_refused(lvlm, sets):
    found = fit(lvlm, sets, inducing_tokens(lvlm, sets), positions=1)
    with pytest.raises(ValueError, match="as wide as the model"):
        dataclasses.replace(found, direction=torch.zeros(7)).check(lvlm)
