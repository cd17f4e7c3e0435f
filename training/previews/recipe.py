"""What previews draw, and how: the arguments of the user, checked, without the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ...noising.utils.registry import lookup
from ...noising.utils.validation import whole_number
from ..media.options import Media
from .conditioning import Conditions
from .groups import PreviewConditions, grouped
from .render import Drawing

DEFAULT_IMAGES = 16
WEIGHTS: dict[str, tuple[str, ...]] = {"raw": ("raw",), "ema": ("ema",), "both": ("raw", "ema")}


@dataclass(frozen=True)
class Recipe:
    """What to draw and how, without the model."""

    drawing: Drawing
    conditions: Conditions
    guidance: dict[str, float]
    batch_size: int
    predict: Callable[..., Any] | None = None
    decode: Any = None
    decode_batch_size: int = 1
    pipeline: Any = None
    max_seconds: float | None = None
    weights: str = "raw"
    media: Media = field(default_factory=Media)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of weights to draw with, in order."""
        return WEIGHTS[self.weights]

    @property
    def seconds(self) -> float | None:
        """The time limit for each kind of weights, in seconds."""
        return None if self.max_seconds is None else self.max_seconds / len(self.kinds)

    def conditioned(self) -> Drawing:
        """Return the drawing with encoded conditions.

        Raises:
            ValueError: the conditions contradict each other or the guidance.
        """
        conditioning, unconditional = self.conditions.encoded()
        # a pipeline applies guidance itself
        guidance: dict[str, Any] = {} if self.pipeline is not None else self.guidance
        return replace(
            self.drawing, conditioning=conditioning, unconditional=unconditional, **guidance
        )


def recipe_of(
    given: PreviewConditions,
    *,
    num_images: int | None,
    seed: int,
    seeds: Sequence[int] | None,
    batch_size: int,
    weights: str,
    predict: Callable[..., Any] | None,
    decode: Any,
    decode_batch_size: int,
    pipeline: Any,
    max_seconds: float | None,
    media: Media | None,
) -> Recipe:
    """Return the recipe for the arguments of ``Previews`` and ``ValidationSampling``.

    Raises:
        ValueError: an invalid argument, or arguments that contradict each other.
    """
    media = grouped("media", media, Media, {})
    seeds = () if seeds is None else tuple(int(s) for s in seeds)
    if num_images is None:
        num_images = len(seeds or given.prompts or given.classes) or DEFAULT_IMAGES
    num_images = whole_number("num_images", num_images, least=1)
    recipe = Recipe(
        drawing=Drawing(num_images, int(seed), seeds=seeds, media=media),
        conditions=Conditions(
            num_images,
            tuple(given.prompts),
            given.negative_prompt,
            given.encode,
            tuple(given.classes),
            given.class_key,
            given.null_class,
            dict(given.conditioning or {}),
            given.unconditional,
        ),
        guidance={
            "guidance_scale": float(given.guidance_scale),
            "guidance_rescale": float(given.guidance_rescale),
        },
        batch_size=min(whole_number("batch_size", batch_size, least=1), num_images),
        predict=predict,
        decode=decode,
        decode_batch_size=whole_number("decode_batch_size", decode_batch_size, least=1),
        pipeline=pipeline,
        max_seconds=max_seconds,
        weights=lookup("weights", weights, {kind: kind for kind in WEIGHTS}),
        media=media,
    )
    _require_consistent(recipe)
    return recipe


def _require_consistent(recipe: Recipe) -> None:
    """Raise ValueError for contradicting arguments that are known before prompts are encoded."""
    encode, pipeline = recipe.conditions.encode, recipe.pipeline
    if recipe.conditions.prompts and encode is None and pipeline is None:
        raise ValueError(
            "prompts need encode=, a function from a list of texts to arguments of the network"
        )
    if pipeline is not None and (recipe.predict is not None or recipe.decode is not None):
        raise ValueError(
            "a pipeline brings its own network and decoder; leave predict and decode out, or "
            "pipeline"
        )
    if recipe.max_seconds is not None and not recipe.max_seconds > 0:
        raise ValueError(
            f"max_seconds must be above 0, got {recipe.max_seconds}; leave it out for no limit"
        )
    if encode is None:
        recipe.conditioned()
