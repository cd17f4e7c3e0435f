"""The previews of one training run: draw, publish, and keep every failure away from training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..loops.collectives import AgreedError, any_rank
from ..loops.complaints import warn_on_rank_zero
from ..loops.isolation import sigterm_deferred
from ..loops.loop import LiveModel
from ..publishing.publish import Preview
from ..publishing.publisher import Publisher
from .preview import Moment, Previewer

Shape = tuple[int, ...] | None


@dataclass
class PreviewRun:
    """A previewer, its publisher, and what happens if a preview fails.

    Args:
        previewer: draws.
        publisher: shows. None: nothing is shown.
        on_error: 'warn' or 'raise'.
        terminate: acts on a SIGTERM that arrived in a preview; see ``sigterm_deferred``.
    """

    previewer: Previewer
    publisher: Publisher | None
    on_error: str = "warn"
    terminate: Callable[[], object] | None = None

    def preview(self, model: LiveModel, moment: Moment, shape: Callable[[], Shape]) -> bool:
        """Draw and publish a preview with every kind of weights. Every rank must call it.

        Args:
            model: the live model.
            moment: the place in the training.
            shape: returns the shape of one sample, the same on every rank.

        Returns:
            False if a signal stopped it.

        Raises:
            RuntimeError: on every rank, if any rank failed and ``on_error`` is 'raise'.
        """
        failure: AgreedError | None = None
        loop = self.previewer.loop
        with sigterm_deferred(self.terminate) as termination:
            try:
                agreed = shape()
                shown: list[Preview] = []
                for weights in self.previewer.recipe.kinds:
                    drawn = self.previewer.preview(model, moment, weights, agreed, termination)
                    shown += [drawn] if drawn is not None else []
                    if termination.agreed:
                        break
                else:
                    self._publish(shown, moment.step)
            except AgreedError as error:
                failure = error
            # includes a signal during publishing, so that all ranks stop at the same place
            (termination.agreed,) = any_rank([termination.arrived], loop.world_size, model.device)
            stopped = termination.agreed
        if failure is not None:
            message = f"the preview at step {moment.step} failed: {failure}"
            if self.on_error == "raise":
                raise RuntimeError(message) from failure
            warn_on_rank_zero(f"{message}; training goes on as if there had been none")
        return not stopped

    def _publish(self, previews: list[Preview], step: int) -> None:
        if self.publisher is None:
            return
        try:
            self.publisher.publish(previews)
            for name, text in self.previewer.new_tables().items():
                self.publisher.write(name, text, step)
        except Exception as error:  # of rank 0, which the publisher raises on every rank
            raise AgreedError(f"{type(error).__name__}: {error}") from error
        if self.on_error == "raise":
            self.publisher.require_published()

    def trial(self, model: LiveModel, shape: Shape, step: int) -> None:
        """Draw a trial image that is not shown, so that errors appear before a long run.

        Raises:
            RuntimeError: on every rank, if any rank failed.
        """
        failure: AgreedError | None = None
        with sigterm_deferred(self.terminate) as termination:
            try:
                self.previewer.trial(model, shape, termination)
            except AgreedError as error:
                failure = error
        if failure is not None:
            raise RuntimeError(
                f"previews cannot be drawn; one image was tried, at step {step}: {failure}"
            ) from failure
