"""The device's work, one piece at a time: a tick, then a few decoded images. Runs on the engine thread only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from app.engine.attempt import attempt, bisect
from app.engine.batcher import Batcher
from app.engine.budget import Admission, Budget
from app.engine.caps import Caps
from app.engine.decoder import Decoder
from app.engine.job import Event, Failed, Finished, Group, Job, Lane, Progress
from app.engine.pace import Pace
from app.engine.rows import said
from app.errors import ForwardFailed, Impossible, Internal, NonFinite, OutOfMemory, ServiceError
from app.logs import SERVER
from app.metrics import UNKNOWN, Metrics
from app.settings import Settings
from models.accelerators.gated import GatedCache
from models.backbone import Backbone
from models.denoise import advance
from models.device import Fence, out_of_memory, release_memory
from models.errors import RequestError
from models.generate import start
from models.profiles.choice import Outlook
from models.reuse.plans import StepRows
from models.trajectory import Trajectory, decided, effective_steps

Clock = Callable[[], float]


class Worker:
    """Owns the batcher and everything on the device. `started` and `ended` tell the engine what became of a job."""

    def __init__(
        self,
        backbones: Mapping[str, Backbone],
        max_rows: dict[str, int],
        settings: Settings,
        metrics: Metrics,
        pace: Pace,
        clock: Clock,
        started: Callable[[Job], None],
        ended: Callable[[Job, Event], None],
    ) -> None:
        self._backbones = backbones
        self._settings = settings
        self._metrics = metrics
        self._pace = pace
        self._clock = clock
        self._started = started
        self._ended = ended
        self._max_rows = max_rows
        self._caps = Caps(lambda group: max_rows[group[0]])
        self._batcher: Batcher[Lane, Group] = Batcher(self._caps)
        self._decoder = Decoder(backbones, settings.decode_chunk, metrics, self._end)
        self._feature_bytes: defaultdict[str, int] = defaultdict(int)
        self._budget = Budget(settings.max_feature_bytes)
        self._fence = Fence()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return len(self._decoder) > 0 or len(self._batcher) > 0

    def add(self, job: Job) -> None:
        """Take a job in; the tick that first takes one of its images starts it."""
        for lane in job.lanes:
            self._batcher.add(lane)

    def drop(self, job: Job) -> None:
        """Forget a job: its rows are in no later tick, and its memory is free."""
        for lane in job.lanes:
            self._batcher.discard(lane)
            self._remember(lane, 0)
            self._reserve(lane, 0)
            lane.trajectory = None
        self._decoder.drop(job)

    def work(self) -> None:
        """One tick and one chunk of decoding, so that neither keeps the other waiting."""
        admission, admitted = self._budget.admission(), set[Job]()
        lanes = self._batcher.next(lambda lane: self._admit(lane.job, admission, admitted))
        if lanes:
            self._tick(lanes)
        if len(self._decoder):
            self._decoder.work()
        for backbone in self._backbones.values():  # who was dropped since the last tick held features, too
            backbone.features.trim()

    def _admit(self, job: Job, admission: Admission, admitted: set[Job]) -> bool:
        """Whether a job may start: all its images do together, with what they will remember."""
        if job not in admitted and admission.admit(job.run.feature_bytes * len(job.lanes)):
            admitted.add(job)
        return job in admitted

    def _end(self, job: Job, event: Event) -> None:
        self.drop(job)
        job.timing.finished = self._clock()
        if job.expected and isinstance(event, Finished):
            self._pace.observe_run(job.model, (job.timing.finished - job.timing.started) / job.expected)
        self._ended(job, event)

    def _fail(self, lanes: Sequence[Lane], error: Callable[[str], ServiceError], message: str) -> None:
        for job in {lane.job for lane in lanes}:
            self._end(job, Failed(error(message)))

    # Starting

    def _start(self, jobs: Sequence[Job], backbone: Backbone) -> None:
        """Encode the prompts of all jobs as one batch, then make their trajectories; one that fails fails alone."""
        began = self._clock()
        error = attempt(partial(backbone.prepare, [job.run for job in jobs]))
        if error is not None:
            SERVER.warning("encoding the prompts of %d jobs together failed, one by one now: %s", len(jobs), error)
            if out_of_memory(error):
                self._make_room(backbone)
        for job in jobs:
            error = attempt(partial(self._start_one, job, backbone))
            if error is not None:
                if out_of_memory(error):
                    self._make_room(backbone)
                self._end(job, Failed(_start_error(error)))
                continue
            job.timing.started, job.timing.encoded = began, self._clock()
            self._metrics.queue_seconds.labels(job.model).observe(job.timing.queue)
            self._metrics.stage_seconds.labels("encode").observe(job.timing.encoded - began)
            self._started(job)

    def _start_one(self, job: Job, backbone: Backbone) -> None:
        for lane, trajectory in zip(job.lanes, start(backbone, job.run), strict=True):
            trajectory.watched = bool(job.preview_steps)
            lane.trajectory = trajectory
            self._batcher.begin(lane)
            self._reserve(lane, job.run.feature_bytes)
        if (chosen := job.run.profile) is not None:
            profile = backbone.spec.profiles[chosen.name]
            outlook = Outlook(step=self._pace.tick(job.model, len(backbone.spec.roles) * len(job.lanes)))
            job.expected = profile.by_name[chosen.candidate].seconds * outlook.plain(profile)

    # Denoising

    def _tick(self, lanes: Sequence[Lane]) -> None:
        model = lanes[0].job.model
        backbone = self._backbones[model]
        fresh = {lane.job: None for lane in lanes if not lane.started}
        if fresh:
            self._start(list(fresh), backbone)
        began = self._clock()
        plans = [lane.trajectory.plan for lane in lanes if lane.trajectory is not None]
        if not plans:
            return
        if any(lane.job is not lanes[0].job for lane in lanes):
            for lane in lanes:
                lane.job.expected = None
        stepped = self._advance(lanes, backbone)
        self._fence.mark(backbone.device)
        seconds = self._clock() - began
        if not stepped:
            return
        rows = sum(plan.num_rows for plan in plans)
        if rows:  # none where only foretold steps were left over from a tick that failed behind its forward
            self._pace.observe(model, rows, seconds)
            self._measure_rows(lanes[0].group, plans, rows, seconds)
        self._metrics.tick_seconds.labels(model).observe(seconds)
        self._metrics.tick_rows.labels(model).observe(rows)
        self._metrics.tick_plans.labels(model).observe(len({plan.signature for plan in plans}))
        self._after(stepped)

    def _measure_rows(self, group: Group, plans: Sequence[StepRows], rows: int, seconds: float) -> None:
        """Choose the rows of the next tick by those that are full steps at the model's own size: what others cost
        depends on more than their number."""
        model, width, height = group[:3]
        spec, chosen = self._backbones[model].spec, self._pace.rows.get(model)
        native = (width, height) == (spec.native_width, spec.native_height)
        if chosen is None or not native or any(plan.reduced for plan in plans):
            return
        before = chosen.cap
        self._max_rows[model] = chosen.observe(rows, seconds)
        if chosen.cap != before:
            costs = said(chosen.costs)
            SERVER.info("%s: up to %d rows a tick from now on; ms a row while serving: %s", model, chosen.cap, costs)

    def _advance(self, lanes: Sequence[Lane], backbone: Backbone) -> list[Lane]:
        """Advance what can be advanced and return it. A tick that fails is halved until who is at fault is alone."""
        before = {lane: lane.step for lane in lanes}
        whole = True

        def undone(part: list[Lane]) -> list[Lane]:
            return [lane for lane in part if lane.started and lane.step == before[lane]]

        def work(part: list[Lane]) -> None:
            advance(backbone, [lane.trajectory for lane in part if lane.trajectory is not None])

        for part, error in bisect(lanes, work, undone):
            # Some may have stepped before the error came.
            self._count_steps([lane for lane in part if lane.step > before[lane]], before)
            group, rows = part[0].group, [lane.job.run.steps[before[lane]].num_rows for lane in part]
            if error is None:
                if whole:
                    self._caps.held(group, sum(rows), max(rows))
                continue
            whole, memory = False, out_of_memory(error)
            if memory:
                self._make_room(backbone)
            if len(part) > 1:
                SERVER.warning("a tick of %d rows failed, trying halves: %r", sum(rows), error)
                if memory:
                    self._caps.fell(group, sum(rows))
            elif memory:
                self._fail(undone(part), OutOfMemory, "the device has not enough memory for this request")
            else:
                SERVER.error("a step of one image failed", exc_info=error)
                self._fail(undone(part), ForwardFailed, "the model failed on this request")
        return [lane for lane in lanes if lane.started and lane.step > before[lane]]

    def _make_room(self, backbone: Backbone) -> None:
        """Give back what can be, where memory ended."""
        self._metrics.out_of_memory.inc()
        backbone.release()
        release_memory()

    def _count_steps(self, lanes: Sequence[Lane], before: Mapping[Lane, int]) -> None:
        """Count the steps that these images have taken, of which all but the first need no forward."""
        for lane in lanes:
            job = lane.job
            steps = job.run.steps if lane.trajectory is None else effective_steps(lane.trajectory)
            for number, step in enumerate(steps[before[lane] : lane.step], before[lane]):
                kind = "reduced" if step.reduced else "full"
                self._metrics.steps.labels(job.model, job.acceleration, kind).inc()
                self._metrics.evaluations.labels(job.model, "forecast" if step.foretold else "computed").inc()
                self._metrics.forecasts.inc(step.foretold)
                if lane.trajectory is not None and (decision := decided(lane.trajectory, number)) is not None:
                    mode = next((a.mode for a in job.run.accelerators if isinstance(a, GatedCache)), UNKNOWN)
                    self._metrics.gates.labels(job.model, mode, decision).inc()

    def _after(self, lanes: Sequence[Lane]) -> None:
        """Hand over what a tick brought: progress, previews, finished latents."""
        for lane in lanes:
            if lane.trajectory is None:  # its job failed with another of its images
                continue
            self._remember(lane, lane.trajectory.memory_bytes())
            error = attempt(partial(self._hand_over, lane, lane.trajectory))
            if error is None:
                continue
            if out_of_memory(error):
                self._make_room(self._backbones[lane.job.model])
                self._fail([lane], OutOfMemory, "the device has not enough memory for this request")
            else:
                SERVER.error("what a step made could not be handed over", exc_info=error)
                self._fail([lane], ForwardFailed, "the model failed on this request")
        for job in {lane.job: None for lane in lanes if lane.started and lane.job.progress}:
            job.post(Progress(job.steps_done, job.total_steps))

    def _hand_over(self, lane: Lane, trajectory: Trajectory) -> None:
        if trajectory.done:
            self._reserve(lane, 0)
            self._batcher.discard(lane)
            if not trajectory.finite():
                self._fail([lane], NonFinite, "the image ended in NaN or infinity; another seed or scheduler may do")
                return
            self._decoder.add(lane, trajectory.latents)
            lane.job.timing.denoised = self._clock()
        elif trajectory.step in lane.job.preview_steps:
            self._decoder.add(lane, trajectory.preview(), trajectory.step)

    def _remember(self, lane: Lane, size: int) -> None:
        if size != lane.feature_bytes:
            self._feature_bytes[lane.job.model] += size - lane.feature_bytes
            lane.feature_bytes = size
            self._metrics.feature_bytes.labels(lane.job.model).set(self._feature_bytes[lane.job.model])

    def _reserve(self, lane: Lane, size: int) -> None:
        self._budget.reserved += size - lane.reserved
        lane.reserved = size


def _start_error(error: Exception) -> ServiceError:
    if isinstance(error, RequestError):
        return Impossible.of(error)
    if out_of_memory(error):
        return OutOfMemory("the device has not enough memory to start this request")
    SERVER.error("a request could not be started", exc_info=error)
    return Internal("the request could not be started")
