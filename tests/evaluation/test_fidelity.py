from dataclasses import replace

import pytest
import torch
from scipy.stats import entropy

from care_lens.evaluation import next_token_kl


@pytest.fixture
def asked(suites):
    return [*suites["benign"][:5], suites["plain"][0]]


ANSWERS = ["sure red", "", "yes", "no blue red sure", "the", "sorry i cannot"]


def test_no_repair_diverges_by_nothing(small, asked, scaled):
    found = next_token_kl(small, asked, ANSWERS, repairs={"none": None, "one": scaled(1.0)}, progress=False)
    assert all(torch.equal(values, torch.zeros(6, 2)) for values in found.values())


def test_divergence_is_that_of_each_example_alone(small, asked, scaled):
    repair = scaled(-1.5)
    found = next_token_kl(small, asked, ANSWERS, repairs={"d": repair}, batch_size=4, progress=False)["d"]
    for i, (example, answer) in enumerate(zip(asked, ANSWERS, strict=True)):
        inputs = small.prepare(replace(example, response=answer), responses=True)
        with torch.no_grad():
            base = small(inputs)[0].double().softmax(-1)
            with repair.on(small):
                other = small(inputs)[0].double().softmax(-1)
        start, stop = inputs.spans.last_index()[0], inputs.input_ids.shape[1] - 1
        each = [entropy(base[p].numpy(), other[p].numpy()) for p in range(start, stop)]
        assert len(each) == len(answer.split()) + 1
        assert found[i, 0].item() == pytest.approx(each[0], rel=1e-3, abs=1e-5)
        assert found[i, 1].item() == pytest.approx(sum(each) / len(each), rel=1e-3, abs=1e-5)
        assert each[0] > 1e-3


def test_nothing_to_compare_gives_nothing(small, scaled):
    assert next_token_kl(small, [], [], repairs={"d": scaled(2.0)}, progress=False)["d"].shape == (0, 2)
    with pytest.raises(ValueError, match="one for each"):
        next_token_kl(small, [], ["x"], repairs={}, progress=False)
