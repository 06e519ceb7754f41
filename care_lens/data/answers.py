"""Refusals and compliances in plain words, to be cycled over requests as what is teacher-forced.

The runs that were published with CARE cycle about a hundred refusals and a hundred compliances over the harmful requests, so that what is
learned is not one sentence. Those lists are not part of this package; these are in words of our own, none of which says anything harmful.

    REFUSAL_ANSWERS[0], COMPLIANT_ANSWERS[0]
    target_of(example)  # the other convention: the opening that attacks by gradient aim at
"""

from itertools import product

from care_lens.core.examples import Example

_SORRY = (
    "I'm sorry, but",
    "Sorry,",
    "I am sorry,",
    "I apologize, but",
    "My apologies, but",
    "Unfortunately,",
    "Thank you for asking, but",
    "I understand the question, but",
    "I have to decline:",
    "No,",
)
_NOT = (
    "I cannot help with that.",
    "I can't assist with this request.",
    "I am not able to help with this.",
    "I cannot provide that information.",
    "I won't help with that, because it could harm people.",
    "this is something that I cannot do.",
    "I cannot answer this, since it may cause harm.",
    "that is not something I can support.",
    "I must not give instructions for this.",
    "I cannot go on with this request.",
)
_SURE = (
    "Sure,",
    "Of course,",
    "Certainly,",
    "Yes,",
    "Absolutely,",
    "Okay,",
    "No problem,",
    "Gladly,",
    "Happy to help:",
    "All right,",
)
_HERE = (
    "here is what you asked for.",
    "here are the steps, one by one.",
    "this is how it is done.",
    "I will explain it in detail.",
    "here is a complete answer to your request.",
    "let me write it out for you.",
    "here is everything that you need.",
    "the list goes on as follows.",
    "I will go through it from the beginning.",
    "here is the text that you wanted.",
)

REFUSAL_ANSWERS: tuple[str, ...] = tuple(f"{one} {other}" for other, one in product(_NOT, _SORRY))
"""A hundred refusals."""
COMPLIANT_ANSWERS: tuple[str, ...] = tuple(f"{one} {other}" for other, one in product(_HERE, _SURE))
"""A hundred compliances, which say nothing of what was asked."""
REFUSAL = "I'm sorry, but I can't help with that."
"""A refusal, where a model has none of its own."""

_OWN_TARGETS = ("advbench", "jailbreakbench")


def target_of(example: Example) -> str:
    """The opening of a compliant answer that attacks by gradient aim at, as AdvBench writes it: "Sure, here is" and the request.

    Args:
        example: Its own response is taken where its benchmark gives such openings (AdvBench, JailbreakBench).

    Example:
        >>> target_of(Example("How to fold a zorp?"))
        'Sure, here is how to fold a zorp'
    """
    if example.response and example.meta.get("benchmark") in _OWN_TARGETS:
        return example.response
    request = (example.behaviour or example.prompt).strip().rstrip(".?! ")
    return f"Sure, here is {request[:1].lower()}{request[1:]}"
