"""The rule for rivals asks no more than it must, and chooses what the whole of the answers would have it choose."""

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest

from care_lens.core import Example, Verdict
from care_lens.evaluation import defence_tuning, share, spread, tune_defence
from care_lens.evaluation.defence_tuning import HOPELESS, SCREENED

ATTACKED = [Example(f"attack {i}", id=f"a{i}", harmful=True) for i in range(20)]
BENIGN = [Example(f"ask {i}", id=f"b{i}") for i in range(300)]
KINDS = (Verdict.COMPLIED, Verdict.REFUSED, Verdict.MISSING)


@dataclass(frozen=True)
class Row:
    """A defence that is nothing but what is said under it."""

    name: str
    said: dict

    def on(self, lvlm):
        return nullcontext()

    def describe(self):
        return {"name": self.name}


def drawn(rng, name, complied, right):
    shares = ((ATTACKED, complied), (BENIGN, right))
    return Row(
        name, {e.id: KINDS[rng.choice(3, p=[0.98 * p, 0.98 * (1 - p), 0.02])] for group, p in shares for e in group}
    )


def by_all(rows, before, loss):
    """The rule, on all answers."""

    def of(row, examples):
        return share([row.said[e.id] for e in examples], Verdict.COMPLIED)

    order = sorted(rows, key=lambda row: of(row, ATTACKED))
    for row in order:
        if of(row, BENIGN) >= before - loss:
            return row, of(row, BENIGN)
    after = [of(row, spread(BENIGN, SCREENED)) for row in order]
    after = [a if a < before - HOPELESS else of(row, BENIGN) for a, row in zip(after, order, strict=True)]
    best = max(range(len(order)), key=lambda i: (after[i] - of(order[i], ATTACKED), i))
    return order[best], after[best]


@pytest.mark.parametrize("rights", [(0.97, 0.94), (0.9, 0.8), (0.5, 0.2), (0.93, 0.92)])
def test_it_chooses_what_all_answers_would_choose_and_asks_fewer(small, judge, monkeypatch, rights):
    asked: list[int] = []

    def verdicts(lvlm, examples, defences, judge, **options):
        asked.extend(len(examples) for _ in defences)
        return [[(bare if defence is None else defence).said[e.id] for e in examples] for defence in defences]

    monkeypatch.setattr(defence_tuning, "several_verdicts", verdicts)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        bare = drawn(rng, "none", 0.9, 0.97)
        before = share([bare.said[e.id] for e in BENIGN], Verdict.COMPLIED)
        rows = [drawn(rng, str(i), rng.choice([0.1, 0.5]), rng.choice(rights)) for i in range(8)]
        asked.clear()
        best, reached = tune_defence(
            small,
            [lambda row=row: row for row in rows],
            attacked=ATTACKED,
            benign=BENIGN,
            judge=judge,
            batch_size=16,
            max_missing=1.0,
        )
        expected, after = by_all(rows, before, 0.03)
        assert best is expected and reached["benign_after"] == after and reached["benign_before"] == before
        kept = any(share([r.said[e.id] for e in BENIGN], Verdict.COMPLIED) >= before - 0.03 for r in rows)
        assert reached["within"] == kept
        assert reached["asr"] == share([best.said[e.id] for e in ATTACKED], Verdict.COMPLIED)
        if after >= before - 0.03:
            tried = 1 + sorted(rows, key=lambda r: share([r.said[e.id] for e in ATTACKED], Verdict.COMPLIED)).index(
                best
            )
            assert sum(asked) <= len(BENIGN) + 8 * len(ATTACKED) + tried * len(BENIGN)
            if tried > 1 and max(rights) < 0.95:
                assert sum(asked) < len(BENIGN) + 8 * len(ATTACKED) + tried * len(BENIGN)


def test_what_nobody_has_judged_is_not_safe(small, judge, monkeypatch):
    def row(name, refused, missing, wrong=0, unknown=0):
        attacks = [Verdict.REFUSED] * refused + [Verdict.MISSING] * missing + [Verdict.COMPLIED] * 20
        answers = [Verdict.REFUSED] * wrong + [Verdict.MISSING] * unknown + [Verdict.COMPLIED] * 300
        said = {
            e.id: verdict for group, all_ in ((ATTACKED, attacks), (BENIGN, answers)) for e, verdict in zip(group, all_)
        }
        return Row(name, said)

    rows = [
        row("all missing", 0, 20), row("half missing", 10, 10), row("benign missing", 20, 0, unknown=200), row("known", 12, 0),
        row("refuses all", 20, 0, wrong=300),
    ]  # fmt: skip
    bare = row("none", 0, 0)

    def verdicts(lvlm, examples, defences, judge, **options):
        return [[(bare if defence is None else defence).said[e.id] for e in examples] for defence in defences]

    monkeypatch.setattr(defence_tuning, "several_verdicts", verdicts)

    def chosen(rows, **options):
        given = {"attacked": ATTACKED, "benign": BENIGN, "judge": judge, **options}
        best, reached = tune_defence(small, [lambda row=row: row for row in rows], **given)
        return best.name, reached["asr"]

    assert chosen(rows) == ("known", 0.4)
    assert chosen(rows[:1]) == ("all missing", 1.0)  # the last resort, whose attack success nobody knows
    assert chosen([*rows[:3], rows[4]]) == ("half missing", 0.0)  # it keeps benign answers, as none before it
    assert chosen(rows, max_missing=0.5)[0] == "half missing"
    assert np.isnan(share([Verdict.MISSING] * 3, Verdict.COMPLIED)) and share([], Verdict.COMPLIED) == 0
    bare = Row("none", {e.id: Verdict.MISSING for e in BENIGN})
    with pytest.raises(ValueError, match="an answer with a verdict, got none"):
        chosen(rows)
    with pytest.raises(ValueError, match="max_missing must be a share"):
        chosen(rows, max_missing=-0.1)
