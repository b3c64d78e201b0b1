"""Makes a sample fit: fewer tiles for its images, then fewer images or less text. Reads no pixels.

The ladder, of a sample that has too many tokens or too many tiles: the image with most tiles goes one step down
(:meth:`megavlm.data.tilings.Tiling.degrade`), again and again, until the sample fits or every image is at its fewest.
What then happens is the recipe's ``over_length``. The steps are those of Megatron-LM, which takes them for all images
of a sample at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from megavlm.data.chat_template import Segment
from megavlm.data.conversation import ImageRef
from megavlm.data.encoding import ImageSlot, TokenRun
from megavlm.data.expansion import ImageTokens, count_tokens
from megavlm.data.tilings import TileLayout

OverLengthPolicy = Literal["skip", "truncate_images", "truncate_text"]


@dataclass
class PlannedImage:
    """An image whose pixels are not yet read."""

    source: str
    size: tuple[int, int]
    index: int
    """Its number in the sample."""
    layout: TileLayout
    tokens: ImageTokens
    is_degraded: bool = False


@dataclass(frozen=True)
class SamplePlan:
    """A sample before its pixels are read."""

    segments: Sequence[Segment]
    runs: list[TokenRun | ImageSlot]
    images: list[PlannedImage] = field(default_factory=list)
    num_dropped_images: int = 0
    is_cut: bool = False

    @property
    def num_tokens(self) -> int:
        """S."""
        return count_tokens(self.runs, [image.tokens for image in self.images])

    @property
    def num_tiles(self) -> int:
        """T."""
        return sum(image.layout.num_tiles for image in self.images)


class OverLengthError(Exception):
    """A sample that does not fit; the text says by how much."""


@dataclass(frozen=True)
class Fitter:
    """Makes samples fit."""

    max_tokens: int
    max_tiles: int | None
    policy: OverLengthPolicy
    plan: Callable[[Sequence[Segment]], SamplePlan]
    """Encodes segments and lays out their images, each with as many tiles as its tiling chooses."""
    smaller: Callable[[PlannedImage], PlannedImage | None]
    """An image one step down the ladder; None: it is at its fewest tiles."""

    def fit(self, segments: Sequence[Segment]) -> SamplePlan:
        """Plan a sample that fits.

        Raises:
            OverLengthError: it does not, and the policy is to skip it, or nothing is left to learn.
        """
        plan, num_dropped, is_cut = self._planned(segments), 0, False
        had_trained = any(run.is_trained for run in plan.runs if isinstance(run, TokenRun))
        while not self._fits(plan):
            shorter = self._shorten(plan)
            if shorter is None:
                raise OverLengthError(self._message(plan))
            num_dropped += len(plan.images) - len(shorter.images)
            is_cut = is_cut or self.policy == "truncate_text"
            plan = shorter
        if is_cut and had_trained and not _learns(plan):
            raise OverLengthError(f"cut to data.seq_length={self.max_tokens} tokens, nothing is left to learn.")
        return replace(plan, num_dropped_images=num_dropped, is_cut=is_cut)

    def _planned(self, segments: Sequence[Segment]) -> SamplePlan:
        """Encode segments, and walk down the ladder as far as needed and possible."""
        plan = self.plan(segments)
        while not self._fits(plan):
            needs_shorter_text = plan.num_tokens > self.max_tokens
            for image in sorted(plan.images, key=lambda image: image.layout.num_tiles, reverse=True):
                if (smaller := self._step_down(image, needs_shorter_text)) is not None:
                    plan.images[plan.images.index(image)] = smaller
                    break
            else:
                break
        return plan

    def _step_down(self, image: PlannedImage, needs_shorter_text: bool) -> PlannedImage | None:
        """As many steps as it takes; tiles of the context are only taken where that makes the text shorter."""
        smaller = self.smaller(image)
        while smaller is not None and needs_shorter_text and smaller.tokens.num_tokens >= image.tokens.num_tokens:
            smaller = self.smaller(smaller)
        return smaller

    def _fits(self, plan: SamplePlan) -> bool:
        has_room = self.max_tiles is None or plan.num_tiles <= self.max_tiles
        return has_room and plan.num_tokens <= self.max_tokens

    def _shorten(self, plan: SamplePlan) -> SamplePlan | None:
        """Take one image or some text away; None: the policy allows no more."""
        places = [number for number, segment in enumerate(plan.segments) if isinstance(segment.content, ImageRef)]
        if self.policy == "truncate_images" and places:
            return self._planned([*plan.segments[: places[-1]], *plan.segments[places[-1] + 1 :]])
        if self.policy != "truncate_text":
            return None
        num_tokens = num_tiles = num_images = 0
        for number, run in enumerate(plan.runs):
            if isinstance(run, TokenRun):
                if num_tokens + len(run.ids) > self.max_tokens:
                    kept = replace(run, ids=run.ids[: self.max_tokens - num_tokens])
                    return replace(plan, runs=[*plan.runs[:number], kept], images=plan.images[:num_images])
                num_tokens += len(run.ids)
                continue
            image = plan.images[num_images]
            num_tokens, num_tiles = num_tokens + image.tokens.num_tokens, num_tiles + image.layout.num_tiles
            if num_tokens > self.max_tokens or (self.max_tiles is not None and num_tiles > self.max_tiles):
                return self._planned(plan.segments[: places[num_images]])
            num_images += 1
        return None

    def _message(self, plan: SamplePlan) -> str:
        num_image_tokens = sum(image.tokens.num_tokens for image in plan.images)
        length = plan.num_tokens
        if length <= self.max_tokens:
            return (
                f"{plan.num_tiles} tiles of {len(plan.images)} image(s), which cannot have fewer, are more than "
                f"data.max_tiles_per_sample={self.max_tiles}."
            )
        return (
            f"{length} tokens ({length - num_image_tokens} of text, {num_image_tokens} of {len(plan.images)} "
            f"image(s), which cannot take fewer) do not fit data.seq_length={self.max_tokens}."
        )


def _learns(plan: SamplePlan) -> bool:
    """Whether any token behind the first is trained."""
    runs = [run for run in plan.runs if isinstance(run, TokenRun) and run.ids]
    first_is_text = bool(plan.runs) and isinstance(plan.runs[0], TokenRun)
    return any(
        run.is_trained and (len(run.ids) > 1 or number > 0 or not first_is_text) for number, run in enumerate(runs)
    )
