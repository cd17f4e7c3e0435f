"""Conditioning of previews: prompts (encoded once), classes, any tensors, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .batches import require_rows, take_rows


@dataclass(frozen=True)
class Conditions:
    """Prompts or classes, and tensors, for each image of a preview.

    Image i takes prompt or class i modulo their number.

    Args:
        num_images: number of images.
        prompts: texts.
        negative_prompt: the text for "no condition" in guidance.
        encode: ``encode(texts)`` returns a mapping of tensors with a row for each text.
        classes: labels.
        class_key: the network's argument for classes.
        null_class: the label for "no condition" in guidance.
        conditioning: arguments of the network; tensors have a row for each image, or one for all.
        unconditional: the same, without condition, for guidance.

    Raises:
        ValueError: the arguments contradict each other.

    >>> Conditions(4, classes=(7, 9), class_key="y", null_class=10).encoded()[0]
    {'y': tensor([7, 9, 7, 9])}
    """

    num_images: int
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    encode: Callable[[list[str]], Mapping[str, Any]] | None = None
    classes: tuple[int, ...] = ()
    class_key: str = "class_labels"
    null_class: int | None = None
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    unconditional: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.prompts and self.classes:
            raise ValueError("previews show prompts or classes, not both; leave one out")
        for name, given in (("prompts", self.prompts), ("classes", self.classes)):
            if len(given) > self.num_images:
                raise ValueError(
                    f"{len(given)} {name} need as many images at least, got "
                    f"num_images={self.num_images}"
                )
        if self.encode is not None and not self.prompts:
            raise ValueError("encode= has nothing to encode; give prompts=")
        if self.classes and self.class_key in {**self.conditioning, **(self.unconditional or {})}:
            raise ValueError(
                f"conditioning has {self.class_key!r} already; leave it or classes out, or give "
                "class_key"
            )
        require_rows("conditioning", self.conditioning, self.num_images)
        require_rows("unconditional", self.unconditional or {}, self.num_images)

    @property
    def captions(self) -> tuple[str, ...]:
        """A caption for each image; an empty string if there is neither prompt nor class.

        >>> Conditions(3, prompts=("a cat", "a dog"), encode=lambda texts: {}).captions
        ('a cat', 'a dog', 'a cat')
        """
        shown = (
            self.prompts or tuple(f"{self.class_key} {label}" for label in self.classes) or ("",)
        )
        return tuple(shown[i % len(shown)] for i in range(self.num_images))

    def encoded(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return (conditioning, unconditional) with a row for each image.

        Calls ``encode`` once, with all texts.

        Raises:
            ValueError: the number of rows is wrong, or ``encode`` and ``conditioning`` have a name
                in common.
        """
        given, empty = self._of_texts() if self.encode is not None else self._of_classes()
        twice = sorted({*given} & {*self.conditioning})
        if twice:
            raise ValueError(
                f"encode returned {twice}, which conditioning= gives too; leave one out"
            )
        if empty is None and self.unconditional is None:
            return {**self.conditioning, **given}, None
        unconditional = dict(
            self.conditioning if self.unconditional is None else self.unconditional
        )
        return {**self.conditioning, **given}, unconditional | (empty or {})

    def _of_classes(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        if not self.classes:
            return {}, None
        labels = torch.tensor([self.classes[i % len(self.classes)] for i in range(self.num_images)])
        null = self.null_class
        return {self.class_key: labels}, None if null is None else {
            self.class_key: torch.full_like(labels, null)
        }

    def _of_texts(self) -> tuple[dict[str, Any], dict[str, Any]]:
        assert self.encode is not None
        texts = [*self.prompts, self.negative_prompt]
        rows = self.encode(texts)
        if not isinstance(rows, Mapping):
            raise ValueError(f"encode must return a mapping of tensors, got {type(rows).__name__}")
        _require_text_rows(rows, len(texts))
        each = [i % len(self.prompts) for i in range(self.num_images)]
        return _rows(rows, each), _rows(rows, [len(self.prompts)] * self.num_images)


def _rows(rows: Mapping[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    return {key: _detached(value) for key, value in take_rows(rows, indices, device=None).items()}


def _detached(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _detached(part) for key, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_detached(part) for part in value)
    return value.detach() if isinstance(value, Tensor) else value


def _require_text_rows(rows: Mapping[Any, Any], texts: int, name: str = "encode's") -> None:
    for key, value in rows.items():
        if isinstance(value, Mapping):
            _require_text_rows(value, texts, f"{name} {key!r}")
        elif type(value) in (list, tuple):
            _require_text_rows(dict(enumerate(value)), texts, f"{name} {key!r}")
        elif isinstance(value, Tensor) and (value.ndim == 0 or value.shape[0] != texts):
            raise ValueError(
                f"{name} {key!r} must have a row for each of {texts} texts (the prompts and the "
                "negative prompt), "
                f"got shape {tuple(value.shape)}"
            )
