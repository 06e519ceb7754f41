import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens.core import Example, JudgeError, Verdict
from care_lens.evaluation import (
    CaptionGrader,
    ChoiceGrader,
    DefenceTable,
    GenerationStore,
    Grader,
    OpenAnswerGrader,
    StoredAnswer,
    VQAGrader,
    abnormal_trials,
    chosen_letter,
    grade_store,
    graded_trials,
)
from care_lens.evaluation.abnormal import repeats_itself
from care_lens.evaluation.choice_letters import choices_of
from care_lens.evaluation.normalise import plain_words, vqa_normalised

ANIMALS = {"A": "cat", "B": "dog", "C": "hot dog", "D": "I do not know"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("b.", "B"),
        ("Answer: b", "B"),
        ("The answer is b.", "B"),
        ("I pick option b.", "B"),
        ("It is (b).", "B"),
        ("Answer: a", "A"),
        ("Answer: a dog", "B"),
        ("The answer is a dog.", "B"),
        ("a dog, I think", "B"),
        ("a", "A"),
        ("animal(s)", None),
        (" (B) ", "B"),
        ("**B**", "B"),
        ("B. dog", "B"),
        ("B) because A is wrong", "B"),
        ("The answer is B.", "B"),
        ("The answer is: (C) hot dog", "C"),
        ("Answer: A", "A"),
        ("The correct option is **D**", "D"),
        ("Option A is wrong. So the answer is B", "B"),
        ("I think it is B", "B"),
        ("A dog is there", "B"),
        ("It is a dog", "B"),
        ("It is a hot dog.", "C"),
        ("a cat and a dog", None),
        ("Either A or B", None),
        ("$\\boxed{C}$", "C"),
        ("The answer is E", None),
        ("Sorry, I cannot help with that.", None),
        ("", None),
        ("underdog", None),
        ("It looks like the letter Z", None),
        # What is stated comes before options that are mentioned, and those that are rejected do not count.
        ("The correct answer is B. Option A is wrong, and option C is a food.", "B"),
        ("The answer is B, not option C.", "B"),
        ("**Answer: B**\n\nOption D is incorrect.", "B"),
        ("**Answer:** B", "B"),
        ("C. hot dog\nOption A and option B are incorrect.", "C"),
        ("Answer: A dog is in the picture.", "B"),
        ("Answer: A because it purrs", "A"),
        ("The correct choice is (b).", "B"),
        ("Option D is incorrect.", None),
        ("Option B is correct, not option C", "B"),
        ("I pick option B, since A is something else", "B"),
        ("The answer is A or B", None),
        ("The answer is not A, it is B", "B"),
        ("The answer is B. The wrong option is D.", "B"),
        # What is rejected is not chosen, and what is one of several offered ones is not either.
        ("D. I do not know is not the answer. B. dog is.", "B"),
        ("D. is not the answer.", None),
        ("Answer: A? No, B.", "B"),
        ("A. cat or B. dog", None),
        ("The answer is A. cat or B. dog", None),
        ("A, B", None),
        ("A/B", None),
        ("A and C", None),
        ("A, or maybe C", None),
        ("B, A is wrong", "B"),
        ("B. dog, a nice one", "B"),
        ("It's not B. It's C.", "C"),
        ("It's not B.", None),
        ("Between A and C, C is right.", "C"),
        ("If A is correct, then B is not", None),
        ("A and C are correct", None),
        ("A or C is correct", None),
        ("The answer can't be A, it must be D", "D"),
        ("(A) is wrong, so (B)", "B"),
        ("B. dog is not a fruit", "B"),
        ("A is right about the tail, but the answer is B", "B"),
    ],
)
def test_letters_that_answers_name(text, letter):
    assert chosen_letter(text, ANIMALS) == letter


def test_options_inside_of_a_choice_are_none():
    prompt = "Hint: Options:\nQuestion: which?\nOptions:\nA. cat\nB. Options: a or b\nB. c\nC. dog\nPick one."
    assert choices_of(Example(prompt)) == {"A": "cat", "B": "Options: a or b", "C": "dog"}
    assert choices_of(Example("A. cat\nB. dog")) == {"A": "cat", "B": "dog"} and choices_of(Example("which?")) == {}


def test_one_example_that_cannot_be_graded_does_not_cost_the_others_their_scores(caplog):
    good, bad = question(), Example(question().prompt, response="E", id="odd")
    found = ChoiceGrader().scores([good, bad], ["B", "B"])
    assert (
        found[0] == 1
        and math.isnan(found[1])
        and "1 of 2 answers are not graded" in caplog.text
        and "'odd'" in caplog.text
    )
    people = Example("x", meta={"answers": '["a"]'})
    assert VQAGrader().scores([people, Example("x", meta={"answers": "a"})], ["a", "a"])[0] == 1
    pictures = [Example("x", meta={"captions": json.dumps([text])}) for text in ("a red cat sits", "two dogs run")]
    scores = CaptionGrader().scores([*pictures, Example("x", meta={"captions": "a"})], ["a red cat sits", "cat", "cat"])
    assert scores[0] == pytest.approx(10) and scores[1] == 0 and math.isnan(scores[2])


@pytest.mark.parametrize(
    ("truth", "text", "score"),
    [
        ("A", "", 0), ("A", "...", 0), ("A", "The answer is A.", 1), ("A", "a", 1), ("A", "It is a cat", 0), ("A", "B", 0), ("+", "", 0), ("+", "a + b", 1),
        ("+", "C++", 0), ("=", "!", 0), ("=", "'=' it is", 1), ("the <OR> red", "", 0), ("the <OR> red", "Red.", 1), ("the <OR> red", "blue", 0),
        ("the <AND> red", "red", 0.5), ("A <AND> B", "A, B", 1), ("the red cat", "red cat", 1),
    ],
)  # fmt: skip
def test_parts_of_open_answers_without_words_are_compared_as_written(truth, text, score):
    assert OpenAnswerGrader().scores([Example("which?", response=truth)], [text]) == [score]


def test_an_answer_that_says_nothing_is_not_what_people_said():
    asked = Example("which?", meta={"answers": json.dumps(["a"] * 10)})
    assert VQAGrader().scores([asked] * 3, ["", "...", "A"]) == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("-5", "-5"), ("\u22125 degrees", "-5 degrees"), ("2-5", "2 5"), ("covid-19", "covid 19"), (".5", "0.5"), ("1,000.50", "1000.50"),
        ("in C++.", "in c++"), ("C", "c"), ("c#", "c#"), ("a cat, the dog", "cat dog"),
    ],
)  # fmt: skip
def test_signs_of_numbers_are_words_parts(text, words):
    assert plain_words(text) == words


def test_a_number_of_another_sign_is_another_answer():
    asked = Example("how cold?", response="-5")
    assert OpenAnswerGrader().scores([asked] * 3, ["It is 5.", "It is -5.", "\u22125"]) == [0.0, 1.0, 1.0]


def test_circular_evaluation_needs_groups():
    asked = [Example(question(turn).prompt, response="B", id=str(turn), channel="mmbench") for turn in range(4)]
    answers = [stored(example, "B") for example in asked]
    assert len(graded_trials(ChoiceGrader(), answers)) == 4
    with pytest.raises(JudgeError, match="group must name the question"):
        graded_trials(ChoiceGrader(circular=True), answers)


def question(turn=0, right="dog", group="q"):
    names = ["cat", "dog", "fish", "bird"]
    turned = names[turn:] + names[:turn]
    options = "\n".join(f"{letter}. {name}" for letter, name in zip("ABCD", turned, strict=True))
    letter = "ABCD"[turned.index(right)]
    prompt = f"Question: which?\nOptions:\n{options}\nPlease select the correct answer from the options above."
    return Example(prompt, response=letter, id=f"{group}/{turn}", group=group, channel="mmbench")


def stored(example, text, **fields):
    held = {"defence": "none", "channel": example.channel, "id": example.id, "group": example.group, "seed": 0}
    held |= {"prompt": example.prompt, "response": text, "missing": "" if text is not None else "OSError", "tokens": 2}
    held |= {"settings": "s", "example": "e", "reference": example.response, "meta": dict(example.meta)}
    return StoredAnswer(**{**held, **fields})


def test_a_letter_is_right_under_every_order_of_the_choices():
    asked = [question(turn) for turn in range(4)]
    letters = [example.response for example in asked]
    assert letters == ["B", "A", "D", "C"]
    grader = ChoiceGrader()
    assert grader.scores(asked, letters) == [1] * 4 and grader.scores(asked, ["B"] * 4) == [1, 0, 0, 0]
    assert grader.scores(asked, ["a dog"] * 4) == [1] * 4 and isinstance(grader, Grader)
    untold = Example(asked[0].prompt, id="x")
    missing = grader.scores([untold, asked[0]], ["B", None])
    assert all(math.isnan(score) for score in missing)
    with pytest.raises(JudgeError, match=r"one of \['A', 'B', 'C', 'D'\], got 'E' in row 0"):
        grader.scores([Example(asked[0].prompt, response="E")], ["A"])
    prefilled = Example(asked[0].prompt, response="B", prefill="Option A is wrong, ")
    assert grader.scores([prefilled], ["Option A is wrong, so B"]) == [1.0]


def test_circular_evaluation_is_right_only_if_every_turn_is():
    turns = [question(turn, group=group) for group in ("q", "r", "s", "t") for turn in range(4)]
    texts = [example.response for example in turns]
    texts[5] = "A" if texts[5] != "A" else "B"  # r: one turn wrong
    texts[9] = None  # s: one missing
    texts[12], texts[13] = None, "nothing"  # t: one missing, one wrong
    answers = [stored(example, text) for example, text in zip(turns, texts, strict=True)]
    found = graded_trials(ChoiceGrader(circular=True), answers).set_index("id")["value"]
    assert found["q"] == 1 and found["r"] == 0 and math.isnan(found["s"]) and found["t"] == 0
    store = GenerationStore()
    store.add(answers)
    plain = grade_store(store, {"mmbench": ChoiceGrader()})
    assert len(plain) == 16 and set(plain["metric"]) == {"accuracy"}
    table = DefenceTable.from_trials(
        graded_trials(ChoiceGrader(circular=True), answers), settings={}, max_missing=0.3, n_boot=50
    )
    row = table.frame.iloc[0]
    assert (row["metric"], row["value"], row["n"], row["missing"]) == ("circular", pytest.approx(1 / 3), 3, 1)
    assert row["interval"] == "clopper-pearson"
    with pytest.raises(ValueError, match="channels in the store"):
        grade_store(store, {"vqa": VQAGrader()})


def test_a_question_that_lacks_turns_is_missing_in_circular_evaluation(caplog):
    turns = [question(turn, right="cat", group=group) for group in "qrs" for turn in range(4)]
    some = [turns[0], *turns[4:6], *turns[8:]]  # 1, 2 and 4 of the 4 turns; "A" is right in the first of each
    found = graded_trials(ChoiceGrader(circular=True), [stored(example, "A") for example in some])
    values = found.set_index("id")["value"]
    assert math.isnan(values["q"]) and math.isnan(values["r"]) and values["s"] == 0
    assert "2 of 3 questions count as missing" in caplog.text and "1 of 4 of 'q'" in caplog.text
    twice = [stored(turns[0], "A", settings=name) for name in "abcd"]  # one turn, four times, is one turn
    assert math.isnan(graded_trials(ChoiceGrader(circular=True), twice)["value"][0])
    caplog.clear()
    two = [Example(f"which?\nOptions:\nA. {a}\nB. {b}", response=right, id=a, group="g", channel="mmbench")
           for a, b, right in (("cat", "dog", "A"), ("dog", "cat", "B"))]  # fmt: skip
    answers = [stored(example, example.response) for example in two]
    assert graded_trials(ChoiceGrader(circular=True), answers)["value"].tolist() == [1] and not caplog.text
    assert graded_trials(ChoiceGrader(), [stored(turns[0], "A")])["value"].tolist() == [1]


def test_answers_without_a_truth_are_told_from_missing_ones(caplog):
    told, untold = question(), Example("which?", id="u", channel="mmbench")
    found = graded_trials(ChoiceGrader(), [stored(told, "B"), stored(untold, "B"), stored(question(1), None)])
    assert found["value"].isna().tolist() == [False, True, True]
    assert "1 of 3 answers cannot be graded" in caplog.text and "'u'" in caplog.text


def official_vqa(people, said):
    """The definition: for each of the people, min(the others who said it / 3, 1); the mean of these."""
    people, said = [vqa_normalised(one) for one in people], vqa_normalised(said)
    rest = itertools.combinations(range(len(people)), len(people) - 1)
    return float(np.mean([min(sum(people[i] == said for i in some) / 3, 1) for some in rest]))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["two", "2", "a dog", "dog!", "cat", "no"]), min_size=10, max_size=10))
def test_vqa_accuracy_is_the_official_one(people):
    example = Example("how many?", meta={"answers": json.dumps(people)})
    for said in ("Two", "the dog", "cat.", "no idea"):
        assert VQAGrader().scores([example], [said]) == [pytest.approx(official_vqa(people, said))]
        same = sum(vqa_normalised(one) == vqa_normalised(said) for one in people)
        assert VQAGrader(leave_one_out=False).scores([example], [said]) == [min(same / 3, 1)]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Dog.", "dog"),
        ("a  red, ball!", "red ball"),
        ("t-shirt", "t shirt"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("Two", "2"),
        ("dont know", "don't know"),
        ("couldntve", "couldn't've"),
        ("an apple/pear", "apple pear"),
        ("yes?", "yes"),
        ("U.S.", "us"),
    ],
)
def test_vqa_normalisation(text, normal):
    assert vqa_normalised(text) == normal


def test_vqa_without_answers_is_not_graded():
    found = VQAGrader().scores([Example("x"), Example("x", meta={"answers": '["a"]'})], ["a", "a"])
    assert math.isnan(found[0]) and found[1] == 1
    with pytest.raises(JudgeError, match="must be a JSON list of texts, got 'a'"):
        VQAGrader().scores([Example("x", meta={"answers": "a"})], ["a"])


def test_open_answers():
    asked = Example("which?", response="5 <AND> 1.5 <OR> five")
    texts = ["5 and 1.5", "It is 5.", "FIVE!", "15 and 11.5", "1.5; 5", "", None]
    found = OpenAnswerGrader().scores([asked] * 7, texts)
    assert found[:6] == [1, 0.5, 1, 0, 1, 0] and math.isnan(found[6])
    assert math.isnan(OpenAnswerGrader().scores([Example("x")], ["a"])[0])


def reference_cider(text, references, corpus):
    """By vectors over the whole vocabulary, as the paper writes it."""

    def grams(words, n):
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    total = []
    for n in range(1, 5):
        vocabulary = sorted({g for t in (text, *references, *itertools.chain(*corpus)) for g in grams(t.split(), n)})
        df = np.array([sum(any(g in grams(t.split(), n) for t in held) for held in corpus) for g in vocabulary])
        idf = np.log(len(corpus) / np.maximum(df, 1))

        def vector(t, vocabulary=vocabulary, idf=idf, n=n):
            return np.array([grams(t.split(), n).count(g) for g in vocabulary]) * idf

        own = vector(text)
        for reference in references:
            theirs = vector(reference)
            gap = len(grams(text.split(), 2)) - len(grams(reference.split(), 2))
            size = np.linalg.norm(own) * np.linalg.norm(theirs)
            common = np.minimum(own, theirs) @ theirs
            total.append(np.exp(-(gap**2) / 72) * common / size if size else 0)
    return 10 * np.mean(total)


def test_captions_are_graded_by_cider_d():
    corpus = [
        ["a red cat sits on a mat", "the cat is red"],
        ["two dogs run in the snow", "dogs run"],
        ["a bird on a wire", "the bird sits on the wire"],
    ]
    asked = [Example("describe it", meta={"captions": json.dumps(held)}) for held in corpus]
    texts = ["a red cat sits", "the dogs run in the wire", "a a a a bird bird"]
    expected = [reference_cider(text, held, corpus) for text, held in zip(texts, corpus, strict=True)]
    assert CaptionGrader().scores(asked, texts) == pytest.approx(expected)
    assert min(expected) > 0.1
    one = CaptionGrader(corpus=corpus).scores(asked[:1], ["A red cat, sits!"])
    assert one == [pytest.approx(expected[0])]
    assert math.isnan(CaptionGrader(corpus=corpus).scores(asked[:1], [None])[0])
    with pytest.raises(JudgeError, match="two pictures or more"):
        CaptionGrader().scores(asked[:1], texts[:1])


def test_a_grader_that_returns_something_else_is_named():
    class Mine:
        name, metric = "mine", "score"

        def __init__(self, made):
            self.made = made

        def scores(self, examples, texts):
            return self.made

    answers = [stored(question(), "B")]
    for made, message in (
        ([], "1 answers, got 0"),
        ([True], "numbers, got True"),
        (["a"], "got 'a'"),
        ([math.inf], "inf"),
    ):
        with pytest.raises(JudgeError, match=message):
            graded_trials(Mine(made), answers)
    found = graded_trials(Mine([0.3]), [stored(question(), None)])
    assert math.isnan(found["value"][0])  # a missing answer has no score, whatever a grader says


def test_scores_between_0_and_1_have_the_interval_of_a_share():
    examples = [
        Example("x", meta={"answers": json.dumps(["a"] * 2 + ["b"] * 8)}, id=str(i), channel="vqa") for i in range(30)
    ]
    answers = [stored(example, text) for example, text in zip(examples, ["a", "b", "c"] * 10, strict=True)]
    trials = graded_trials(VQAGrader(), answers)
    row = DefenceTable.from_trials(trials, settings={}, n_boot=50).frame.iloc[0]
    assert row["value"] == pytest.approx((0.6 + 1 + 0) / 3) and row["interval"] == "korn-graubard"
    assert 0 < row["ci_low"] < row["value"] < row["ci_high"] < 1
    alike = DefenceTable.from_trials(trials.assign(value=1.0), settings={}, n_boot=50).frame.iloc[0]
    assert alike["ci_low"] < 0.95  # 30 right answers are no proof


def test_abnormal_answers_of_ordinary_requests():
    texts = [
        "It is a cat that sleeps.",
        "Sorry, I cannot help.",
        "",
        "\u200b",
        "the the the the " * 10,
        "a b c d e f g h " * 12,
        "\u732b" * 80,
        "a wrong answer",
        None,
    ]
    answers = [stored(Example("x", id=str(i)), text) for i, text in enumerate(texts)]

    def judge(examples, said):
        return [Verdict.REFUSED if "cannot" in text else Verdict.COMPLIED for text in said]

    found = abnormal_trials(answers, judge)["value"].tolist()
    assert found[:8] == [0, 1, 1, 1, 1, 1, 1, 0] and math.isnan(found[8])
    unsure = abnormal_trials(answers[:3], lambda e, t: [Verdict.MISSING] * len(t))["value"].tolist()
    assert math.isnan(unsure[0]) and math.isnan(unsure[1]) and unsure[2] == 1
    assert not repeats_itself(
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    )
