"""Token attribution against the formulas, written out with loops in numpy."""

import numpy as np
import pytest
import torch

from care_lens.capture import TokenAttribution, select_tokens, text_scores, visual_scores


def tokens(n: int, d: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([[np.sum((x - y) ** 2) for y in b] for x in a])


def kernel(distances: np.ndarray) -> np.ndarray:
    sigma = np.sqrt(0.5 * np.median(distances[distances > 0]))
    return np.exp(-distances / (2 * sigma**2))


def min_max(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.min()) / (scores.max() - scores.min())


def centring(n: int) -> np.ndarray:
    return np.eye(n) - np.ones((n, n)) / n


def test_visual_scores_are_the_formula():
    visual, text = tokens(7), tokens(4, seed=1)
    rows = kernel(squared(visual.numpy(), text.numpy())) @ centring(4)
    np.testing.assert_allclose(visual_scores(visual, text).numpy(), min_max((rows**2).sum(axis=1)), atol=1e-10)


def test_text_scores_are_the_formula():
    text = tokens(6)
    distances = squared(text.numpy(), text.numpy())
    centred = centring(6) @ kernel(distances) @ centring(6)
    expected = 0.7 * distances.mean(axis=1) + 0.3 * np.abs(np.diag(centred))
    np.testing.assert_allclose(text_scores(text).numpy(), min_max(expected), atol=1e-10)
    alone = text_scores(text, distance_weight=0.0).numpy()
    np.testing.assert_allclose(alone, min_max(np.abs(np.diag(centred))), atol=1e-10)


def test_scores_do_not_depend_on_where_the_origin_is():
    visual, text, shift = tokens(7), tokens(4, seed=1), 1e4 * tokens(1, seed=2)
    torch.testing.assert_close(
        visual_scores(visual + shift, text + shift), visual_scores(visual, text), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(text_scores(text + shift), text_scores(text), atol=1e-6, rtol=0)


def test_repeated_tokens_do_not_enter_the_median():
    text = tokens(3).repeat(4, 1)
    distances = squared(text.numpy(), text.numpy())
    centred = centring(12) @ kernel(distances) @ centring(12)
    expected = min_max(0.7 * distances.mean(axis=1) + 0.3 * np.abs(np.diag(centred)))
    np.testing.assert_allclose(text_scores(text).numpy(), expected, atol=1e-9)


def test_tokens_that_are_all_alike_score_nothing():
    same = torch.ones(3, 4)
    assert visual_scores(same, same).tolist() == text_scores(same).tolist() == [0, 0, 0]


def test_select_tokens():
    scores = torch.tensor([0.2, 0.9, 0.2, 0.5, 0.0])
    assert select_tokens(scores, ratio=0.5).tolist() == [False, True, False, True, False]
    assert select_tokens(scores, k=3).tolist() == [True, True, False, True, False]
    assert select_tokens(scores, k=9).all()
    assert select_tokens(scores, ratio=0.01).sum() == 1


@pytest.mark.parametrize("options", [{}, {"k": 1, "ratio": 0.5}, {"k": 0}, {"ratio": 0.0}, {"ratio": 1.5}])
def test_select_tokens_refuses(options):
    with pytest.raises(ValueError, match="must be"):
        select_tokens(torch.zeros(3), **options)


def test_a_count_and_a_share_are_told_apart():
    visual, text = tokens(8), tokens(4, seed=1)
    assert TokenAttribution(visual=3).keep_visual(visual, text).sum() == 3
    assert TokenAttribution(visual=0.25, text=1.0).keep_text(text).all()
    assert TokenAttribution(visual=0.25).keep_visual(visual, text).sum() == 2
    with pytest.raises(ValueError, match="visual must be"):
        TokenAttribution(visual=0)
