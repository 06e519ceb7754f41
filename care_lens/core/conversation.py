"""Conversations: earlier turns, pictures in their places, and the chat lists of Hugging Face as examples.

A picture stands in a text where :data:`PICTURE` is (Unicode's object replacement character); a text without it has its pictures
before it. That way wrapping or rewording a text keeps its pictures where they were.

    example = Example.from_messages(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "this is"}, {"type": "image", "image": picture}]},
            {"role": "assistant", "content": "a cat"},
            {"role": "user", "content": "what colour is it?"},
            {"role": "assistant", "content": "it is"},  # the beginning of the answer
        ]
    )
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from PIL import Image

from care_lens.core.errors import CareLensError
from care_lens.core.pictures import shown_picture

PICTURE = "\ufffc"
"""Stands in a text where a picture belongs."""

Role = Literal["user", "assistant"]


class ExampleError(CareLensError, ValueError, TypeError):
    """An example, a turn or a conversation holds what it cannot hold, or a model's processor cannot take it."""


@dataclass(frozen=True)
class Turn:
    """One earlier turn of a conversation.

    Attributes:
        role: Who speaks, "user" or "assistant".
        text: What is said, as plain text; pictures stand where :data:`PICTURE` is, or before the text.
        images: Its pictures, in order.

    Raises:
        ExampleError: If a field is of another type, or text and pictures do not match. It is a ValueError and a TypeError.
    """

    role: Role
    text: str
    images: tuple[Image.Image, ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise ExampleError(
                f"role must be one of {get_args(Role)}, got {self.role!r}; a system prompt is the example's own field"
            )
        require_text("text of a turn", self.text)
        object.__setattr__(self, "images", shown_pictures("images of a turn", tuple(self.images)))
        require_places("text of a turn", self.text, len(self.images))


def require_text(name: str, value: Any, *, optional: bool = False) -> None:
    """Refuse a field that is no text.

    Raises:
        ExampleError: Saying what to give instead.
    """
    if isinstance(value, str) or (optional and value is None):
        return
    advice = "give a str"
    if isinstance(value, bytes):
        advice = "decode it first: value.decode('utf-8')"
    elif isinstance(value, (list, tuple)):
        advice = "a conversation is made by Example.from_messages(messages)"
    elif value is None:
        advice = "for no text give ''"
    kind = "a str or None" if optional else "a str"
    raise ExampleError(f"{name} must be {kind}, got {type(value).__name__}; {advice}")


def shown_pictures(name: str, images: tuple[Any, ...]) -> tuple[Image.Image, ...]:
    """Pictures as a viewer shows them.

    Raises:
        ExampleError: If one is no PIL image.
    """
    for image in images:
        if not isinstance(image, Image.Image):
            raise ExampleError(
                f"{name} must be a PIL image, got {type(image).__name__}; make one with care_lens.data.open_picture(path) or "
                "PIL.Image.fromarray(array)"
            )
    return tuple(map(shown_picture, images))


def require_places(name: str, text: str, images: int) -> None:
    """Refuse a text with places for other than its number of pictures.

    Raises:
        ExampleError: Saying how many there are of each.
    """
    if (places := text.count(PICTURE)) not in (0, images):
        raise ExampleError(
            f"{name} must have a place (U+FFFC) for each of its {images} pictures, or none, got {places}; without any they stand "
            "before the text"
        )


def parts(text: str, images: int) -> list[dict[str, str]]:
    """A text and its pictures as the content of a message: pictures first, or where the text has places for them."""
    if PICTURE not in text:
        return [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": text}]
    made: list[dict[str, str]] = []
    for i, piece in enumerate(text.split(PICTURE)):
        made += [{"type": "image"}] if i else []
        made += [{"type": "text", "text": piece}] if piece else []
    return made


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fields of an example from a chat list.

    Args:
        messages: ``{"role": ..., "content": ...}`` each; content is a text or a list of ``{"type": "text", "text": ...}`` and
            ``{"type": "image", "image": picture}``. A system message may come first. The last user message is the prompt; an
            assistant message after it is the beginning of the answer.

    Returns:
        The fields "prompt", "image", "more_images", "system", "turns" and "prefill".

    Raises:
        ExampleError: Naming the message that is not as it must be.
    """
    if isinstance(messages, (str, bytes)) or not isinstance(messages, Sequence) or not messages:
        raise ExampleError(f"messages must be a list of role and content, got {messages!r:.80}; write Example(prompt)")
    read = [_message(message, i) for i, message in enumerate(messages)]
    system = None
    if read[0][0] == "system":
        _, system, pictures = read.pop(0)
        if pictures:
            raise ExampleError("message 0 must be text alone, got pictures in a system message; put them in a user's")
    if late := [role for role, *_ in read if role == "system"]:
        raise ExampleError(f"a system message must come first and once, got {len(late)} more; join them")
    prefill = None
    if read and read[-1][0] == "assistant":
        _, prefill, pictures = read.pop()
        if pictures:
            raise ExampleError("the beginning of an answer must be text alone, got pictures in the last message")
    if not read or read[-1][0] != "user":
        raise ExampleError(
            "messages must end with a user's, or with a user's and the beginning of the answer; an answer to teacher-force is "
            "the field response"
        )
    _, prompt, images = read.pop()
    turns = tuple(Turn(role, text, pictures) for role, text, pictures in read)  # type: ignore[arg-type]
    first, more = (images[0], images[1:]) if images else (None, ())
    return {
        "prompt": prompt, "image": first, "more_images": more, "system": system, "turns": turns, "prefill": prefill,
    }  # fmt: skip


def _message(message: Any, index: int) -> tuple[str, str, tuple[Image.Image, ...]]:
    """Role, text with places, and pictures of a message."""
    where = f"message {index}"
    if not isinstance(message, Mapping) or not {"role", "content"} <= {*message}:
        raise ExampleError(f"{where} must have a role and a content, got {message!r:.80}")
    role, content = message["role"], message["content"]
    if role not in ("system", *get_args(Role)):
        raise ExampleError(f"role of {where} must be 'system', 'user' or 'assistant', got {role!r}")
    if isinstance(content, str):
        return role, content, ()
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ExampleError(f"content of {where} must be a str or a list of parts, got {type(content).__name__}")
    text, images = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        elif kind == "image" and isinstance(part.get("image"), Image.Image):
            text += PICTURE
            images.append(part["image"])
        else:
            raise ExampleError(
                f"parts of {where} must be {{'type': 'text', 'text': str}} or {{'type': 'image', 'image': a PIL image}}, got "
                f"{part!r:.80}; open pictures with care_lens.data.open_picture"
            )
    return role, text, tuple(images)
