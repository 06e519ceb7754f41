"""One set of generation settings for every suite of an evaluation, safety and utility alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from care_lens.core.examples import Example
from care_lens.lvlm.errors import GenerationOptionError


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are generated. What is None is as the model's own generation configuration says.

    Attributes:
        max_new_tokens: Most tokens of an answer.
        min_new_tokens: Least tokens of an answer.
        do_sample: Whether to sample.
        temperature: Of the samples.
        top_p: Share of the probability that is sampled from.
        top_k: Number of tokens that are sampled from.
        system: System prompt of the examples that have none of their own.

    Raises:
        GenerationOptionError: If a number is out of range, or there are fewer new tokens at most than at least.

    Example:
        >>> GenerationSettings(max_new_tokens=64, do_sample=True, temperature=0.7).options()
        {'max_new_tokens': 64, 'do_sample': True, 'temperature': 0.7}
    """

    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | int | None = None
    top_p: float | int | None = None
    top_k: int | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("min_new_tokens", 0), ("top_k", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise GenerationOptionError(f"{name} must be {least} or more, got {value}")
        if self.temperature is not None and not self.temperature > 0:
            raise GenerationOptionError(
                f"temperature must be above 0, got {self.temperature}; for the likeliest token say do_sample=False"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerationOptionError(f"top_p must be in (0, 1], got {self.top_p}")
        if None not in (self.max_new_tokens, self.min_new_tokens) and self.max_new_tokens < self.min_new_tokens:  # type: ignore[operator]
            raise GenerationOptionError(
                f"max_new_tokens must be min_new_tokens or more, got {self.max_new_tokens} and {self.min_new_tokens}"
            )

    def given(self) -> dict[str, Any]:
        """The settings that are set, the system prompt among them, as arguments of :func:`~care_lens.evaluation.evaluate`.

        Example:
            >>> GenerationSettings(max_new_tokens=64, system="Be brief.").given()
            {'max_new_tokens': 64, 'system': 'Be brief.'}
        """
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def options(self, further: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The options of ``generate`` that are set, joined with further ones.

        Args:
            further: Other options of ``generate``.

        Raises:
            GenerationOptionError: If an option is given in both with two values.
        """
        joined = dict(further or {})
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "system" and value is not None and joined.setdefault(field.name, value) != value:
                raise GenerationOptionError(
                    f"{field.name} must be given once, got {value} and {joined[field.name]} in generation"
                )
        return joined

    def examples(self, examples: Sequence[Example]) -> list[Example]:
        """The examples with the system prompt, where they have none."""
        if self.system is None:
            return list(examples)
        return [example if example.system is not None else replace(example, system=self.system) for example in examples]
