import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from care_lens.attacks import PGDResult, as_seen, pgd, random_noise
from care_lens.attacks.pixels import PixelMap, to_pixels
from care_lens.attacks.targets import TargetLoss
from care_lens.core import Example
from care_lens.core.errors import ArtifactError

EPSILON = 16


@pytest.fixture
def asked(picture):
    prompts = ("what is in the picture", "how to make a blue", "red then blue", "what is red")
    return [Example(p, image=picture(i), response="sure red then", id=str(i)) for i, p in enumerate(prompts)]


def distance(images, examples) -> float:
    return float((to_pixels(images) - to_pixels([example.image for example in examples])).abs().max())


def log_likelihood(lvlm, examples, target: str) -> np.ndarray:
    """Mean log likelihood of a target's tokens, one example at a time, from plain forward passes."""
    found = []
    ids = lvlm.tokenizer(target, add_special_tokens=False)["input_ids"]
    for example in examples:
        inputs = lvlm.prepare(replace(example, response=target), responses=True)
        with torch.no_grad():
            log_probs = lvlm(inputs)[0].log_softmax(-1)
        start = inputs.spans.last_index()[0]
        found.append(np.mean([float(log_probs[start + i, token]) for i, token in enumerate(ids)]))
    return np.array(found)


class Doubling:
    """A defence that scales the projector's output: visible to gradients."""

    name = "doubling"

    def __init__(self, factor: float, *, hide: bool = False) -> None:
        self.factor, self.hide, self.calls = factor, hide, 0

    @contextmanager
    def on(self, lvlm):
        def edit(activation, hook):
            self.calls += 1
            seen = activation.detach() if self.hide else activation
            return seen * self.factor

        with lvlm.hooks([("projector.hook_out", edit)]):
            yield

    def describe(self):
        return {"factor": self.factor}


def test_loss_is_the_negative_mean_log_likelihood_of_the_target(lvlm, asked):
    loss = TargetLoss(lvlm, asked, [["sure red then"]] * len(asked))
    with torch.no_grad():
        values = loss(loss.pixels, torch.arange(len(asked)))
    np.testing.assert_allclose(values.numpy(), -log_likelihood(lvlm, asked, "sure red then"), rtol=1e-4, atol=1e-4)


def test_loss_counts_the_first_tokens_only_and_joins_several_targets(lvlm, asked):
    loss = TargetLoss(lvlm, asked, [["sure red then", "yes no"], ["yes no"], ["sure"], ["no"]], target_tokens=1)
    with torch.no_grad():
        values = loss(loss.pixels, torch.arange(4)).numpy()
        some = loss(loss.pixels[1:3], torch.tensor([1, 2])).numpy()
    sure, yes, no = (log_likelihood(lvlm, asked, word) for word in ("sure", "yes", "no"))
    expected = [-np.logaddexp(sure[0], yes[0]), -yes[1], -sure[2], -no[3]]
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(some, values[1:3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("epsilon", [1, 2.5, EPSILON])
def test_pictures_stay_in_the_ball_as_8_bit_pictures(lvlm, asked, epsilon):
    result = pgd(lvlm, asked, targets=["sure"], epsilon=epsilon, steps=4, progress=False)
    assert all(image.mode == "RGB" and image.size == (16, 16) for image in result.images)
    assert 0 < distance(result.images, asked) <= int(epsilon)


def test_it_beats_random_noise_of_the_same_size_and_reports_the_loss_of_what_it_returns(lvlm, asked):
    result = pgd(lvlm, asked, epsilon=EPSILON, steps=15, progress=False)
    attacked = result.apply(asked, channel="pgd")
    assert [example.channel for example in attacked] == ["pgd"] * len(asked)
    after = log_likelihood(lvlm, attacked, "sure red then")
    np.testing.assert_allclose(result.losses, -after, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(result.clean_losses, -log_likelihood(lvlm, asked, "sure red then"), rtol=1e-3, atol=1e-3)
    for seed in range(5):
        noisy = log_likelihood(lvlm, random_noise(asked, epsilon=EPSILON, seed=seed), "sure red then")
        assert (after > noisy).all()
    assert (result.losses < result.clean_losses).all()


def test_the_result_does_not_depend_on_the_batch_size(lvlm, asked):
    whole = pgd(lvlm, asked, targets=["sure"], epsilon=8, steps=1, restarts=2, progress=False)
    single = pgd(lvlm, asked, targets=["sure"], epsilon=8, steps=1, restarts=2, batch_size=1, progress=False)
    np.testing.assert_allclose(whole.losses, single.losses, rtol=1e-3, atol=1e-3)


def test_restarts_and_steps_never_make_it_worse(lvlm, asked):
    losses = [
        pgd(lvlm, asked[:2], targets=["sure"], epsilon=8, steps=5, step_size=1, restarts=n, progress=False).losses
        for n in (1, 3)
    ]
    # the draws of one example's restarts follow each other, so the first example's first restart is shared
    assert losses[1][0] <= losses[0][0] + 1e-6


def test_examples_below_stop_loss_are_left_alone(lvlm, asked):
    options = {"targets": ["sure"], "epsilon": EPSILON, "steps": 6, "random_start": False, "progress": False}
    easy = pgd(lvlm, asked, stop_loss=1e9, **options)
    assert distance(easy.images, asked) == 0
    full = pgd(lvlm, asked, **options)
    level = float(np.median(full.losses))
    stopped = pgd(lvlm, asked, stop_loss=level, **options)
    assert ((stopped.losses < level) == (full.losses < level)).all()
    assert (stopped.losses >= full.losses - 1e-4).all()


def test_the_gradient_flows_through_a_defence_which_changes_what_is_found(lvlm, asked):
    repair = Doubling(-1.5)
    options = {"targets": ["sure red then"], "epsilon": EPSILON, "steps": 15, "progress": False}
    adaptive = pgd(lvlm, asked, repair=repair, **options)
    assert repair.calls > 15
    assert adaptive.settings["repair"] == {"name": "doubling", "factor": -1.5}
    blind = pgd(lvlm, asked, **options)
    with repair.on(lvlm):
        seen = log_likelihood(lvlm, adaptive.apply(asked), "sure red then")
        unseen = log_likelihood(lvlm, blind.apply(asked), "sure red then")
    np.testing.assert_allclose(adaptive.losses, -seen, rtol=1e-3, atol=1e-3)
    assert seen.mean() > unseen.mean()


def test_a_defence_that_hides_the_gradient_is_reported(lvlm, asked, caplog):
    with pytest.raises(RuntimeError, match="detaches"):
        pgd(lvlm, asked[:1], epsilon=4, steps=1, repair=Doubling(1.0, hide=True), progress=False)
    pgd(lvlm, asked[:1], epsilon=4, steps=1, repair=Doubling(0.0), progress=False)
    assert "gradient vanishes for 1 of 1" in caplog.text


def test_weights_get_no_gradients_and_keep_their_flags(lvlm, asked):
    parameters = list(lvlm.hf_model.parameters())
    flags = [i % 2 == 0 for i in range(len(parameters))]
    before = [parameter.requires_grad for parameter in parameters]
    for parameter, flag in zip(parameters, flags, strict=True):
        parameter.requires_grad_(flag)
    try:
        with torch.no_grad():
            pgd(lvlm, asked[:1], targets=["sure"], epsilon=4, steps=1, progress=False)
        assert [parameter.requires_grad for parameter in parameters] == flags
        assert all(parameter.grad is None for parameter in parameters)
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)


def test_pictures_that_the_processor_resizes_are_attacked_in_their_own_pixels(lvlm, asked, picture):
    large = [replace(asked[0], image=picture(5, (24, 20))), asked[1]]
    result = pgd(lvlm, large, targets=["sure"], epsilon=8, steps=6, progress=False)
    assert [image.size for image in result.images] == [(24, 20), (16, 16)]
    for image, example in zip(result.images, large, strict=True):
        assert 0 < distance([image], [example]) <= 8
    np.testing.assert_allclose(result.losses, -log_likelihood(lvlm, result.apply(large), "sure"), rtol=1e-3, atol=1e-3)
    noise = [log_likelihood(lvlm, random_noise(large[:1], epsilon=8, seed=seed), "sure")[0] for seed in range(5)]
    assert -result.losses[0] > max(noise)


def test_as_seen_gives_pictures_that_pass_pixel_by_pixel(lvlm, asked, picture):
    large = [replace(asked[0], image=picture(5, (24, 20)))]
    small = as_seen(lvlm, large)
    assert small[0].image is not None and small[0].image.size == (16, 16)
    assert torch.allclose(lvlm.prepare(large).pixel_values, lvlm.prepare(small).pixel_values, atol=0.02)


def test_pixel_map_is_the_processors_and_its_own_inverse(lvlm, asked):
    pixels = to_pixels([example.image for example in asked])
    values = lvlm.prepare(asked).pixel_values
    pixel_map = PixelMap.of(lvlm.processor.image_processor)
    torch.testing.assert_close(pixel_map.encode(pixels), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pixel_map.decode(values), pixels, atol=1e-3, rtol=1e-3)


def test_result_round_trips(tmp_path, lvlm, asked):
    result = pgd(lvlm, asked[:2], targets=["sure"], epsilon=4, steps=1, progress=False)
    result.save(tmp_path / "pgd")
    loaded = PGDResult.load(tmp_path / "pgd")
    assert [i.tobytes() for i in loaded.images] == [i.tobytes() for i in result.images]
    np.testing.assert_array_equal(loaded.losses, result.losses)
    assert loaded.settings == result.settings


@pytest.fixture
def first_version(tmp_path, picture):
    """A folder as the version before the sums wrote it, and its result."""
    result = PGDResult([picture(0), picture(1)], np.array([0.5, 1.5]), np.array([2.0, 3.0]), {"epsilon": 4})
    for i, image in enumerate(result.images):
        image.save(tmp_path / f"{i:05d}.png")
    held = {"losses": [0.5, 1.5], "clean_losses": [2.0, 3.0], "settings": {"epsilon": 4}}
    (tmp_path / "pgd.json").write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
    return tmp_path, result


def test_a_folder_of_the_first_version_is_loaded_and_saved_as_the_present_one(first_version):
    folder, result = first_version
    for _ in range(2):
        loaded = PGDResult.load(folder)
        assert [i.tobytes() for i in loaded.images] == [i.tobytes() for i in result.images]
        assert loaded.losses.tolist() == [0.5, 1.5] and loaded.clean_losses.tolist() == [2.0, 3.0]
        assert loaded.settings == result.settings
        folder = folder / "again"
        loaded.save(folder)
    assert json.loads((folder / "pgd.json").read_text())["schema"] == 2


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda f: (f / "00001.png").unlink(), FileNotFoundError),
        (lambda f: (f / "00001.png").write_bytes((f / "00001.png").read_bytes()[:60]), ArtifactError),
        (lambda f: (f / "00001.png").write_bytes(b"no picture"), ArtifactError),
        (lambda f: (f / "pgd.json").write_text((f / "pgd.json").read_text()[:40]), ArtifactError),
        (lambda f: (f / "pgd.json").write_text('{"losses": [1.0, 2.0], "clean_losses": [1.0], "settings": {}}'), ArtifactError),
        (lambda f: (f / "pgd.json").write_text('{"losses": [1.0, 2.0], "settings": {}}'), ArtifactError),
    ],
)  # fmt: skip
def test_a_damaged_folder_of_the_first_version_is_refused(first_version, damage, error):
    folder, _ = first_version
    damage(folder)
    with pytest.raises(error):
        PGDResult.load(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.5}, "epsilon"),
        ({"epsilon": 4, "steps": 0}, "steps"),
        ({"epsilon": 4, "step_size": 0.0}, "step_size"),
        ({"epsilon": 4, "targets": []}, "targets"),
        ({"epsilon": 4, "targets": [["sure"]]}, "each of 4"),
        ({"epsilon": 4, "targets": [""]}, "targets"),
        ({"epsilon": 4, "restarts": 2, "random_start": False}, "restarts"),
    ],
)
def test_bad_options_are_refused(lvlm, asked, options, message):
    with pytest.raises(ValueError, match=message):
        pgd(lvlm, asked, progress=False, **options)


def test_examples_without_picture_or_target_are_refused(lvlm, asked):
    with pytest.raises(ValueError, match="image"):
        pgd(lvlm, [replace(asked[0], image=None)], epsilon=4, progress=False)
    with pytest.raises(ValueError, match="response"):
        pgd(lvlm, [replace(asked[0], response=None)], epsilon=4, progress=False)


@pytest.mark.parametrize("kind", ["sign", "uniform"])
def test_random_noise_has_the_size_it_says(asked, kind):
    noisy = random_noise(asked, epsilon=8, kind=kind, seed=1, channel="noise")
    before = to_pixels([example.image for example in asked])
    change = to_pixels([example.image for example in noisy]) - before
    inside = (before >= 8) & (before <= 247)
    if kind == "sign":
        assert set(change[inside].abs().unique().tolist()) == {8.0}
    else:
        assert set(change[inside].unique().tolist()) == set(map(float, range(-8, 9)))
    assert change.abs().max() == 8
    assert abs(float(change[inside].mean())) < 1
    assert {example.channel for example in noisy} == {"noise"}
    again = random_noise(asked, epsilon=8, kind=kind, seed=1)
    assert [e.image.tobytes() for e in again] == [e.image.tobytes() for e in noisy]
