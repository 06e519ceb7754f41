"""From an example to the text that the model reads: its conversation in the model's own chat template.

What a template leaves out or puts elsewhere is an error, never a silent loss: many templates have no system prompt, some put
pictures before all text.
"""

import re
from typing import Any

from jinja2.exceptions import TemplateError

from care_lens.core.conversation import PICTURE, ExampleError, parts
from care_lens.core.examples import Example
from care_lens.lvlm.families import Family


def messages(example: Example) -> list[dict[str, Any]]:
    """The conversation as Hugging Face's chat templates take it, without the answer."""
    told = [] if example.system is None else [("system", example.system, 0)]
    told += [(turn.role, turn.text, len(turn.images)) for turn in example.turns]
    told += [("user", example.prompt, len(example.own_images))]
    return [{"role": role, "content": parts(text, n)} for role, text, n in told]


def format_prompt(processor: Any, example: Example, family: Family) -> str:
    """The conversation in the processor's chat template, up to where the answer begins.

    Args:
        processor: The processor.
        example: The example.
        family: The model's family.

    Returns:
        The text, with a placeholder for each picture.

    Raises:
        ExampleError: If there is no chat template and the family needs one, or the template refuses the conversation, leaves a
            text out or changes the order of texts and pictures that the example gives.
    """
    if family.prompt is not None:
        if example.system is not None or example.turns or PICTURE in example.prompt:
            raise ExampleError(
                f"an example for {family.name} must be one prompt with its pictures before it: the family has no chat template, "
                "so that there are no system prompts, turns or places; put everything into the prompt"
            )
        return family.prompt(processor, example.prompt, len(example.images))
    if not processor.chat_template:
        raise ExampleError("processor must have a chat template, got none; set processor.chat_template")
    conversation = messages(example)
    try:
        text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise ExampleError(
            f"the processor's chat template must take the conversation, it refuses roles "
            f"{[message['role'] for message in conversation]}: {error}; leave the system prompt out or put it into the prompt, "
            "and let user and assistant take turns"
        ) from error
    if example.system is not None or example.turns or PICTURE in example.prompt:
        _require_whole(text, conversation, family.image_text(processor))
    return text


def _require_whole(text: str, conversation: list[dict[str, Any]], placeholder: str) -> None:
    """Refuse a formatted conversation in which a part is missing or stands before one that it should follow."""
    at = 0
    for message in conversation:
        for part in message["content"]:
            wanted = placeholder if part["type"] == "image" else part["text"].strip()
            found = text.find(wanted, at)
            if found < 0:
                what = "a picture" if part["type"] == "image" else repr(wanted[:40])
                missing = "leaves it out" if wanted not in text else "puts it before what it should follow"
                raise ExampleError(
                    f"the processor's chat template must write {what} of the {message['role']}'s message in its place, but it "
                    f"{missing}; {_advice(message['role'])}"
                )
            at = found + len(wanted)


def _advice(role: str) -> str:
    if role == "system":
        return "it has no system prompt: put the text into the first user's message"
    return "let pictures stand before the text, and user and assistant take turns"


def require_no_markers(processor: Any, example: Example, family: Family, row: str) -> None:
    """Refuse texts in which the user typed what stands for a picture among the model's own tokens.

    Raises:
        ExampleError: Naming the example, the field and the token.
    """
    marks = image_markers(processor, family)
    texts = {
        "prompt": example.prompt,
        "system": example.system,
        "prefill": example.prefill,
        "response": example.response,
    }
    texts |= {f"turns[{i}]": turn.text for i, turn in enumerate(example.turns)}
    for name, text in texts.items():
        if found := next((mark for mark in marks if text and mark in text), None):
            has = f"{len(example.images)} image{'s' * (len(example.images) != 1)}"
            raise ExampleError(
                f"{row} must hold no image placeholder in its {name}, got {found!r}, which is this model's own token for images (the "
                f"example has {has}); the chat template adds it, so take it out: pictures are given as image, and U+FFFC says where "
                "in the text they stand"
            )


_BOUNDARY = re.compile(
    r"[<\[].*(image|img|vision|video|patch|tile|(?<![a-z])[be]oi(?![a-z])|row_\d+_col_\d+).*[>\]]", re.IGNORECASE
)
"""Added tokens that stand for pictures or parts of them, or enclose them."""


def image_markers(processor: Any, family: Family) -> list[str]:
    """The texts of the tokens that stand for pictures or enclose them, the longest first."""
    tokenizer = processor.tokenizer
    ids = [*family.image_ids(processor)]
    for owner in (processor, tokenizer):
        for name, value in {**vars(type(owner)), **vars(owner)}.items():
            if name.endswith("_token_id") and isinstance(value, int) and _about_images(name):
                ids.append(value)
    found = {tokenizer.convert_ids_to_tokens(token) for token in ids if isinstance(token, int)}
    for owner in (processor, tokenizer):
        for name in dir(owner):
            if name.endswith("_token") and not name.startswith("__") and _about_images(name):
                value = getattr(owner, name, None)
                found.add(value if isinstance(value, str) else getattr(value, "content", None))
    # What a tokenizer was taught beside its words: many boundaries (Qwen's <|vision_start|>) are known to no attribute.
    found |= {token for token in tokenizer.get_added_vocab() if _BOUNDARY.fullmatch(token)}
    found.add(family.image_text(processor))
    return sorted((mark for mark in found if isinstance(mark, str) and mark.strip()), key=len, reverse=True)


def _about_images(name: str) -> bool:
    return any(word in name for word in ("image", "img", "vision", "boi", "eoi", "patch", "tile", "video"))
