"""One accepted request inside the engine: its images, its timing, and the events that go back to its handler."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from torch import Tensor

from app.errors import ServiceError
from models.request import Run
from models.reuse.plans import StepRows
from models.trajectory import Trajectory

Pixels = Tensor
"""A decoded image [height, width, 3] as bytes on the CPU; whoever encodes the file makes a picture of it."""


@dataclass(frozen=True)
class Queued:
    """The job was accepted behind `position` others."""

    position: int


@dataclass(frozen=True)
class Progress:
    """`step` of `total_steps` evaluations over all images are done."""

    step: int
    total_steps: int


@dataclass(frozen=True)
class Preview:
    """What one image looks like after `step` evaluations."""

    image: Pixels
    step: int
    index: int


@dataclass(frozen=True)
class Finished:
    """All images are there. `ran` says what the steps of each really did, where gates had decided."""

    images: list[Pixels]
    ran: Sequence[Sequence[StepRows]] | None = None


@dataclass(frozen=True)
class Failed:
    """The job ends without images."""

    error: ServiceError


Group = tuple[str, int, int, Hashable]
"""What can share a forward: the same model at the same width and height, and what its family keeps apart."""

Event = Queued | Progress | Preview | Finished | Failed


@dataclass
class Timing:
    """Moments of a job on the monotonic clock, in seconds, 0 until they come; `started` when the first tick took it."""

    submitted: float = 0.0
    started: float = 0.0
    encoded: float = 0.0
    denoised: float = 0.0
    finished: float = 0.0

    @property
    def queue(self) -> float:
        """Seconds in the queue."""
        return self.started - self.submitted

    @property
    def denoise(self) -> float:
        """Seconds from the start, text encoding included, to the last step."""
        return self.denoised - self.started

    @property
    def decode(self) -> float:
        """Seconds from the last step to the last picture."""
        return self.finished - self.denoised

    def stages(self, now: float) -> Iterator[tuple[str, float, float]]:
        """The stages that it reached, each with its begin and end; what was broken off ended with the job, or `now`.

        Other than the property, `denoise` begins here where `encode` ends.
        """
        moments = (self.submitted, self.started, self.encoded, self.denoised, self.finished)
        for name, (begin, end) in zip(("queue", "encode", "denoise", "decode"), pairwise(moments), strict=True):
            if begin:
                yield name, begin, end or self.finished or now


@dataclass(eq=False)
class Lane:
    """One image of a job on its way through the engine; what the batcher orders."""

    job: Job
    index: int
    group: Group
    trajectory: Trajectory | None = None
    image: Pixels | None = None
    feature_bytes: int = 0
    reserved: int = 0

    @property
    def started(self) -> bool:
        """Whether its trajectory exists."""
        return self.trajectory is not None

    @property
    def step(self) -> int:
        """Evaluations done."""
        return 0 if self.trajectory is None else self.trajectory.step

    @property
    def num_rows(self) -> int:
        """Rows of the coming step."""
        return self.job.run.steps[self.step].num_rows

    @property
    def work(self) -> float:
        """Rows that its whole job has still to do."""
        return self.job.rows_left

    @property
    def request(self) -> Hashable:
        """The job itself."""
        return self.job

    @property
    def share(self) -> Hashable:
        """Who is served with it."""
        return self.job.share

    @property
    def weight(self) -> float:
        """How much of the device its share gets, beside one of weight 1."""
        return self.job.weight


@dataclass(eq=False)
class Job:
    """A run of one model, and `post`, which hands an event to whoever waits (any thread, returns at once).

    `share` is whom the batcher serves with it, its client or a class of its client's work, and `weight` what share of
    the device that gets; all of one share have the same weight.
    """

    id: str
    model: str
    run: Run
    acceleration: str
    post: Callable[[Event], None]
    progress: bool = False
    previews: int = 0
    kind: Hashable = ()
    """Of its group: what the family of its model says of the run."""
    share: Hashable = ""
    weight: float = 1.0
    timing: Timing = field(default_factory=Timing)
    expected: float | None = None
    """Seconds from start to end by the profile that it was chosen from; None without one, or with others in a tick."""
    lanes: list[Lane] = field(init=False)
    preview_steps: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        group = (self.model, self.run.width, self.run.height, self.kind)
        self.lanes = [Lane(self, index, group) for index in range(len(self.run.seeds))]
        self.preview_steps = shown(preview_steps(self.previews, len(self.run.steps)), self.run.steps)
        rows = (step.num_rows for step in reversed(self.run.steps))
        self._rows_left = [0, *accumulate(rows)][::-1]

    @property
    def group(self) -> Group:
        """Equal for jobs that can share a forward."""
        return self.lanes[0].group

    @property
    def steps_done(self) -> int:
        """Evaluations done, over all images."""
        return sum(lane.step for lane in self.lanes)

    @property
    def total_steps(self) -> int:
        """Evaluations of the whole job."""
        return len(self.run.steps) * len(self.lanes)

    @property
    def rows_left(self) -> int:
        """Rows over all steps and images still to be computed."""
        return sum(self._rows_left[lane.step] for lane in self.lanes)


def preview_steps(count: int, num_steps: int) -> frozenset[int]:
    """The steps after which a partial image is shown: `count` of them evenly over the run, never the last step."""
    return frozenset(k * num_steps // (count + 1) for k in range(1, count + 1)) - {0, num_steps}


def shown(wanted: Iterable[int], steps: Sequence[StepRows]) -> frozenset[int]:
    """Each wanted step, or the first after it at which a tick ends: steps that are foretold pass within one tick.

    Where only foretold steps are left the finished image is next, and nothing is shown.
    """
    ends = [step for step in range(1, len(steps)) if not steps[step].foretold]
    found = (next((end for end in ends if end >= step), None) for step in wanted)
    return frozenset(step for step in found if step is not None)
