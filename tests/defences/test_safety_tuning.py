"""Safety tuning: the adapters by hand and as peft applies them, what is taught, what stays, files, models of other families."""

import builtins
import dataclasses

import numpy as np
import pytest
import torch
from specimens import SPECIMENS
from world_model import make_world_model

from care_lens import Example, HookedLVLM
from care_lens.core import Defence, Repair
from care_lens.core.identity import model_fingerprint, repair_fingerprint
from care_lens.defences import Adapter, FitError, MissingPeftError, SafetyTuning, WrongModelError, load_defence
from care_lens.defences.lora import Lesson, linear_maps, response_loss, taught
from care_lens.defences.safety_tuning import own_answers
from care_lens.repair import attach

REFUSAL = "sorry i cannot help"
FAMILIES = ["llava-clip", "qwen2_5_vl", "gemma3", "llama4"]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(lvlm, names=None, *, rank=3, alpha=1.0):
    """Adapters of random numbers on some or all linear maps."""
    adapters = {}
    for seed, (name, module) in enumerate(linear_maps(lvlm).items()):
        if names is None or name in names:
            a = random(rank, module.in_features, seed=seed) / 5
            adapters[name] = Adapter(a=a, b=random(module.out_features, rank, seed=99 - seed) / 5)
    return SafetyTuning(adapters=adapters, scale=0.5, alpha=alpha)


def weights_of(lvlm):
    return {name: value.clone() for name, value in lvlm.hf_model.state_dict().items()}


@pytest.fixture(scope="module")
def fitted(world_model, kinds):
    pytest.importorskip("peft")
    before = weights_of(world_model), [p.requires_grad for p in world_model.hf_model.parameters()]
    made = SafetyTuning.fit(
        world_model, benign=kinds["benign"][3:6], malicious=kinds["malicious"][3:6], refusals=[REFUSAL, "no"], rank=4, epochs=25,
        lr=2e-2, answer_tokens=4, batch_size=6, seed=3, progress=False,
    )  # fmt: skip
    return made, before


def test_the_delta_is_its_formula_at_one_linear_map(world_model, requests):
    name = "2.mlp.down_proj"
    made = by_hand(world_model, [name], alpha=0.7)
    module = linear_maps(world_model)[name]
    inputs = world_model.prepare(requests)
    seen = []
    with torch.no_grad(), made.on(world_model):
        handle = module.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
        world_model(inputs)
        handle.remove()
    ((x, found),) = seen
    weight, a, b = (t.detach().double().numpy() for t in (module.weight, made.adapters[name].a, made.adapters[name].b))
    h = x.double().numpy()
    np.testing.assert_allclose(found.numpy(), h @ weight.T + 0.7 * 0.5 * (h @ a.T) @ b.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_the_merged_weights_in_other_families(name):
    """Oracle: W + alpha scale B A written into the weights. On the bridge and on the plain model; the weights are those of before."""
    model, processor = SPECIMENS[name].make()
    lvlm = HookedLVLM.from_hf(model, processor)
    made = by_hand(lvlm)
    inputs = lvlm.prepare([Example("red"), Example("how to make a blue")])
    before = weights_of(lvlm)
    with torch.no_grad():
        plain = lvlm(inputs)
        with made.on(lvlm):
            found = lvlm(inputs)
        assert torch.equal(lvlm(inputs), plain)
        for path, module in linear_maps(lvlm).items():
            adapter = made.adapters[path]
            module.weight += 0.5 * adapter.b @ adapter.a
        expected = lvlm(inputs)
        kept = ~inputs.spans.padding
        assert float((expected - plain)[kept].abs().max()) > 1e-2
        torch.testing.assert_close(found[kept], expected[kept], atol=1e-4, rtol=1e-4)
        lvlm.hf_model.load_state_dict(before)
        plain_model = lvlm.unwrap()
        with attach(made, plain_model, processor):
            attached = plain_model(**inputs.model_kwargs()).logits
    torch.testing.assert_close(attached[kept], expected[kept], atol=1e-4, rtol=1e-4)


def test_the_training_leaves_the_model_and_its_loss_falls(world_model, kinds, requests, fitted):
    made, (weights, flags) = fitted
    assert len(made.losses) == 25 and made.losses[-1] < made.losses[0] - 0.2
    assert [p.requires_grad for p in world_model.hf_model.parameters()] == flags
    assert all(p.grad is None for p in world_model.hf_model.parameters())
    after = world_model.hf_model.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[name], value) for name, value in weights.items())
    assert not [n for n, _ in world_model.hf_model.named_modules() if "lora" in n] and world_model.acting() == []
    assert {n.split(".")[0] for n in made.adapters} == {"0", "1", "2", "3"} and len(made.adapters) == 4 * 7
    # Refusals are likelier under attack, and the model's own answers as likely as before or likelier.
    attacks = [dataclasses.replace(e, response=REFUSAL) for e in kinds["malicious"][3:6]]
    own = own_answers(world_model, kinds["benign"][3:6], tokens=4, batch_size=9)

    def loss(lessons):
        inputs = world_model.prepare([lesson.example for lesson in lessons], responses=True)
        with torch.no_grad():
            return float(response_loss(world_model(inputs), inputs, taught(inputs, lessons)).mean())

    sets = ([Lesson(e) for e in attacks], own)
    plain = [loss(lessons) for lessons in sets]
    with made.on(world_model):
        tuned = [loss(lessons) for lessons in sets]
    assert tuned[0] < plain[0] - 0.1 and sum(tuned) < sum(plain) - 0.5


def test_the_adapters_are_applied_as_peft_applies_them(world_model, requests, fitted):
    """Oracle: peft's own layers with the learned matrices in them."""
    peft = pytest.importorskip("peft")
    made, _ = fitted
    inputs = world_model.prepare(requests)
    with torch.no_grad(), made.on(world_model):
        found = world_model(inputs)
    other = make_world_model(width=24, layers=4, mlp=48)
    model = other.unwrap()
    blocks = model.model.language_model.layers
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(made.adapters))
    peft.inject_adapter_in_model(config, blocks)
    for name, adapter in made.adapters.items():
        layer = blocks.get_submodule(name)
        layer.lora_A["default"].weight.data = adapter.a
        layer.lora_B["default"].weight.data = adapter.b
    with torch.no_grad():
        expected = model(**inputs.model_kwargs()).logits
    kept = ~inputs.spans.padding
    torch.testing.assert_close(found[kept], expected[kept], atol=2e-4, rtol=1e-4)


def test_the_loss_and_what_is_taught_by_hand(world_model, kinds):
    lessons = [
        Lesson(dataclasses.replace(kinds["benign"][0], response="the first letters"), ends=False),
        Lesson(dataclasses.replace(kinds["benign"][6], response="no")),
    ]
    for side in ("left", "right"):
        inputs = world_model.prepare([lesson.example for lesson in lessons], responses=True, padding_side=side)
        counted = taught(inputs, lessons)
        tokens = [inputs.input_ids[row][counted[row]].tolist() for row in range(2)]
        words = world_model.tokenizer
        end = words.eos_token_id
        assert tokens == [
            words("the first letters", add_special_tokens=False)["input_ids"],
            [*words("no", add_special_tokens=False)["input_ids"], end],
        ]
        with torch.no_grad():
            logits = world_model(inputs)
        expected = []
        for row in range(2):
            at = counted[row].nonzero()[:, 0].tolist()
            p = logits[row].double().log_softmax(-1)
            expected.append(-sum(float(p[i - 1, inputs.input_ids[row, i]]) for i in at) / len(at))
        assert response_loss(logits, inputs, counted).tolist() == pytest.approx(expected, rel=1e-4)


def test_own_answers_are_what_the_model_says(world_model, kinds):
    lessons = own_answers(world_model, kinds["benign"][:5], tokens=4, batch_size=2)
    for lesson, example in zip(lessons, kinds["benign"], strict=False):
        made = world_model.generate(world_model.prepare(example), max_new_tokens=4)
        assert lesson.example.response == made.texts[0]
        assert lesson.ends == bool((made.new_tokens == world_model.tokenizer.eos_token_id).any())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_rows(world_model, requests, side):
    made = by_hand(world_model)
    with torch.no_grad(), made.on(world_model):
        inputs = world_model.prepare(requests, responses=True, padding_side=side)
        together = world_model(inputs)
        assert bool(inputs.spans.padding.any())
        for row, example in enumerate(requests):
            alone = world_model(world_model.prepare(example, responses=True))
            torch.testing.assert_close(together[row, ~inputs.spans.padding[row]], alone[0], atol=2e-3, rtol=2e-3)


def test_off_left_and_interrupted_it_is_the_model_itself(world_model, requests):
    made = by_hand(world_model)
    inputs = world_model.prepare(requests)
    print_before = model_fingerprint(world_model.hf_model)
    with torch.no_grad():
        plain = world_model(inputs)
        with dataclasses.replace(made, alpha=0.0).on(world_model):
            assert torch.equal(world_model(inputs), plain)
        with pytest.raises(RuntimeError, match="in the middle"), made.on(world_model):
            assert world_model.acting() == [repair_fingerprint(made)]
            assert not torch.allclose(world_model(inputs), plain, atol=1e-2)
            with world_model.bare():  # what asks the model as it is gets the model as it is
                assert torch.equal(world_model.hf_model(**inputs.model_kwargs()).logits, plain)
            raise RuntimeError("in the middle")
        assert torch.equal(world_model(inputs), plain)
    assert model_fingerprint(world_model.hf_model) == print_before and world_model.acting() == []


def test_half_precision_and_generation(requests):
    lvlm = make_world_model(width=24, layers=2, mlp=48, dtype=torch.bfloat16)
    made = by_hand(lvlm)
    with made.on(lvlm):
        together = lvlm.generate(lvlm.prepare(requests), max_new_tokens=4, min_new_tokens=4)
        forced = [dataclasses.replace(e, response=t) for e, t in zip(requests, together.texts, strict=True)]
        with torch.no_grad():
            logits = lvlm(lvlm.prepare(forced, responses=True))
    assert logits.dtype == torch.bfloat16 and bool(torch.isfinite(logits).all())
    plain = lvlm.generate(lvlm.prepare(requests), max_new_tokens=4, min_new_tokens=4)
    assert not torch.equal(plain.new_tokens, together.new_tokens)


def test_it_trains_in_half_precision_and_by_its_seed(kinds):
    pytest.importorskip("peft")
    lvlm = make_world_model(width=24, layers=2, mlp=48, dtype=torch.bfloat16)
    options = {"benign": kinds["benign"][:4], "malicious": kinds["malicious"][:4], "refusals": [REFUSAL], "lr": 5e-3}
    options |= {
        "rank": 2,
        "epochs": 3,
        "layers": [1],
        "modules": ["down_proj", "q_proj"],
        "answer_tokens": 3,
        "progress": False,
    }
    first, again, other = (SafetyTuning.fit(lvlm, **options, seed=seed) for seed in (0, 0, 1))
    assert set(first.adapters) == {"1.mlp.down_proj", "1.self_attn.q_proj"}
    assert repair_fingerprint(first) == repair_fingerprint(again) != repair_fingerprint(other)
    assert first.losses[-1] < first.losses[0]
    for adapter in first.adapters.values():
        assert adapter.a.dtype == torch.float32 and bool(adapter.b.any())


def test_files_hold_it_and_it_explains_itself(world_model, tmp_path):
    made = dataclasses.replace(by_hand(world_model), losses=(2.0, 0.5))
    assert isinstance(made, Defence) and isinstance(made, Repair)
    made.save(tmp_path)
    for again in (load_defence(tmp_path), SafetyTuning.load(tmp_path)):
        assert repair_fingerprint(again) == repair_fingerprint(made) and again.describe() == made.describe()
        assert torch.equal(again.adapters["0.mlp.up_proj"].b, made.adapters["0.mlp.up_proj"].b)
    plan = made.explain()
    assert "safety tuning" in str(plan) and len(str(plan).splitlines()) <= 25 and len(repr(made).splitlines()) <= 8
    row = plan.frame.set_index("part").loc["mlp.down_proj"]
    assert row["site"] == "mlp.down_proj of 4 blocks (0 to 3)" and row["rank"] == 3
    assert row["multiply_adds"] == 4 * 3 * (48 + 24) and "loss 2 to 0.5" in row["note"]


def test_what_cannot_be_is_said(world_model, kinds, lvlm, monkeypatch):
    made = by_hand(world_model)
    with pytest.raises(WrongModelError, match=r"must be as wide as|linear maps of"):
        made.check(lvlm)
    with pytest.raises(WrongModelError, match="modules must be among"):
        linear_maps(world_model, modules=["w1"])
    with pytest.raises(WrongModelError, match="layers must be one or more from 0 to 3"):
        linear_maps(world_model, layers=[4])
    with pytest.raises((ValueError, TypeError), match=r"rank"):
        Adapter(a=torch.zeros(2, 3), b=torch.zeros(3, 3))
    with pytest.raises(ValueError, match="adapters must hold one or more"):
        SafetyTuning(adapters={})
    real = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *args, **kwargs)

    fit = {"benign": kinds["benign"], "malicious": kinds["malicious"], "refusals": [REFUSAL], "progress": False}
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", without_peft)
        with pytest.raises(MissingPeftError, match=r"pip install \"care-lens\[tuning\]\""):
            SafetyTuning.fit(world_model, **fit)
    pytest.importorskip("peft")
    unanswered = [dataclasses.replace(e, response=None) for e in kinds["benign"]]
    for options, words in (
        ({"malicious": []}, "malicious must hold at least one"),
        ({"refusals": "no"}, "refusals must be a list"),
        ({"rank": 0}, "rank must be above 0"),
        ({"benign_answers": "given", "benign": unanswered}, "must have a response to be taught"),
        ({"lr": float("nan")}, "lr must be above 0"),
    ):
        with pytest.raises(FitError, match=words):
            SafetyTuning.fit(world_model, **{**fit, **options})
