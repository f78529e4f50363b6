"""The driver's side: hands out groups of windows to workers, puts the results in order, replaces lost workers.

A worker gets its next group when it has returned one, so a slow GPU gets fewer. Ray finds places for workers, also on a
machine that joins later, and reports when one is lost.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from latentsync.errors import UserError
from latentsync.painting import Group
from latentsync.windows import AlignedFrame, Window
from optim.cluster.actor import QUEUED, Order, Prepared, Worker
from optim.cluster.messages import PaintedGroup, pack, unpack_result

# Seconds for a group, after which a worker counts as lost: it may hang. Before the first group of a run is painted
# nobody knows how long one takes; on a slow processor it can be hours.
FIRST_GROUP_SECONDS = {"cpu": 86400.0, "cuda": 3600.0}
MIN_GROUP_SECONDS = 600.0
SLOWEST_FACTOR = 20.0  # of the slowest group that the run's workers have painted
POLL_SECONDS = 0.1  # between two calls of on_step while workers paint
SEARCH_SECONDS = 1.0  # between two looks for a place for another worker
START_SECONDS = 600.0  # that a job waits for a worker while it has none: a large model may come from a slow disk
REFUSED_SECONDS = 10.0  # the same where a machine was refused
MAX_LOSSES = 3  # of workers in a row that had painted nothing, or by one group: the job is given up
AHEAD = 2  # groups held for each that workers have: how far fast workers may get ahead of a slow one

log = logging.getLogger(__name__)


def places(kind: str) -> int:
    """How many workers Ray has room for: GPUs or, for workers on a processor, the cores that were set aside for it.

    Raises UserError where there is none.
    """
    resource = {"cpu": "CPU", "cuda": "GPU"}[kind]
    if not (count := int(ray.cluster_resources().get(resource, 0))):
        raise UserError(f"The cluster has no {resource} for a worker: add a machine that has one, with `ray start`.")
    return count


@dataclass
class Member:
    """A worker, as the driver sees it. actor: Ray's handle of it; prepared: None while it starts."""

    actor: Any
    prepared: Prepared | None = None
    ready_at: float = 0.0  # seconds of time.monotonic
    working_since: float = 0.0  # on the group that it must return next
    groups: int = 0  # that it has painted
    lost: bool = False

    @property
    def name(self) -> str:
        return self.prepared.name if self.prepared else "a worker that was starting"


@dataclass(eq=False)
class Place:
    """A group's place in the result. task: its windows in Ray's object store, None once they are painted."""

    group: Group
    task: Any
    losses: int = 0  # workers that were lost while they had it


class SpareWorkers:
    """Workers that have ended a run and are ready for the next one. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._actors: list[tuple[str, Any]] = []  # with the model that it has loaded

    def put(self, model: str, actor: Any) -> None:
        with self._lock:
            self._actors.append((model, actor))

    def take(self, model: str) -> Any | None:
        """One of them, if possible with that model loaded."""
        with self._lock:
            self._actors.sort(key=lambda spare: spare[0] == model)  # those with it go to the end
            return self._actors.pop()[1] if self._actors else None

    def end(self) -> None:
        """End all of them."""
        with self._lock:
            while self._actors:
                with suppress(RayError):
                    ray.kill(self._actors.pop()[1])


class RayWorkers:
    """Implements `painting.Workers` in the Ray that this process is connected to; use it in a `with` block.

    count: workers that are expected, from which follows how many groups are held; limit: of workers at a time;
    resolution, own_face: of the model, see `pack`. on_message: called with a sentence when a worker is lost, refused,
    or runs short of memory. spare: where workers are taken from, and go to after a run without an error.
    """

    def __init__(
        self,
        order: Order,
        count: int,
        limit: int,
        resolution: int,
        own_face: bool,
        on_message: Callable[[str], None],
        spare: SpareWorkers | None = None,
    ):
        self.kind, self.name = order.kind, f"{count} × {order.kind}"
        self.max_groups = AHEAD * QUEUED[order.kind] * count
        self.members: list[Member] = []
        self._order, self._limit, self._on_message = order, limit, on_message
        self._resolution, self._own_face, self._spare = resolution, own_face, spare
        self._waits: dict[Any, tuple[Member, Place | None]] = {}  # by Ray's reference; without a place: it starts
        self._waiting: deque[Place] = deque()  # for a worker
        self._fruitless = 0  # workers that were lost in a row without having painted
        self._problem = ""  # of the last of them
        self._refusal: UserError | None = None  # of the last machine that cannot take part
        self._searched = -SEARCH_SECONDS
        self._had_worker = time.monotonic()
        self._slowest: float | None = None  # seconds of a group

    def __enter__(self) -> "RayWorkers":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for member in self.members:
            idle = member.prepared is not None and not member.lost and not self._works(member)
            if self._spare is not None and error is None and idle:
                self._spare.put(self._order.model, member.actor)
                continue
            with suppress(RayError):
                ray.kill(member.actor)
        self._waits.clear()

    def wait_until_ready(self, count: int = 1, on_step: Callable[[], None] = lambda: None) -> Prepared:
        """Start the workers; returns one when so many are ready. Raises UserError where none gets ready.

        on_step: called several times a second; what it raises ends the waiting.
        """
        while True:
            prepared = [member.prepared for member in self._ready() if member.prepared is not None]
            if len(prepared) >= count:
                return prepared[0]
            self._start_workers()
            self._receive(POLL_SECONDS)
            on_step()

    def paint_groups(self, groups: Iterable[Group], on_step: Callable[[], None], done: int) -> Iterator[AlignedFrame]:
        """Paint every window of every group; yields the finished frames in order, see `painting.paint_groups`.

        Of several people, the iterator of a later one takes its frames from that of an earlier one, in the same thread:
        whichever runs hands out the groups of both and takes what the workers return. Raises UserError where no worker
        is left.
        """
        groups, taken, more = iter(groups), 0, True
        order: deque[Place] = deque()  # the groups whose frames have not been yielded
        while more or order:
            while order and order[0].task is None:
                yield from (frame for part in order.popleft().group for frame in _new_frames(part))
            self._hand_out()
            has_room = more and not self._waiting and len(order) < self.max_groups and self._least_busy() is not None
            if has_room:
                if (group := next(groups, None)) is None:
                    more = False
                    continue
                taken += sum(len(_new_frames(part)) for part in group)
                task = pack(group, self._resolution, self._own_face) if taken > done else None
                order.append(Place(group, None if task is None else ray.put(task)))
                if task is not None:
                    self._waiting.append(order[-1])
            self._start_workers()
            self._receive(0 if has_room else POLL_SECONDS)
            self._lose_hanging()
            on_step()

    def summary(self) -> list[dict[str, Any]]:
        """What each worker did, ready for JSON."""
        now = time.monotonic()
        return [
            {"name": m.name, "groups": m.groups, "lost": m.lost, "seconds": round(now - m.ready_at, 3)}
            for m in self.members
            if m.prepared is not None
        ]

    def _ready(self) -> list[Member]:
        return [member for member in self.members if member.prepared is not None and not member.lost]

    def _ever_ready(self) -> bool:
        return any(member.prepared is not None for member in self.members)

    def _least_busy(self) -> Member | None:
        """The worker that has the fewest groups, if one has room for another."""
        given = {id(member): 0 for member in self._ready()}
        for member, place in self._waits.values():
            if place is not None:
                given[id(member)] += 1
        free = [member for member in self._ready() if given[id(member)] < QUEUED[self.kind]]
        return min(free, key=lambda member: given[id(member)], default=None)

    def _hand_out(self) -> None:
        while self._waiting and (member := self._least_busy()) is not None:
            place = self._waiting.popleft()
            if not self._works(member):
                member.working_since = time.monotonic()
            self._waits[member.actor.paint.remote(place.task)] = member, place

    def _works(self, member: Member) -> bool:
        """Whether a worker has a group, or something that it has returned has not been taken yet."""
        return any(other is member for other, _ in self._waits.values())

    def group_seconds(self) -> float:
        """How long a worker may take for a group until it counts as lost."""
        if self._slowest is None:
            return FIRST_GROUP_SECONDS[self.kind]
        return max(MIN_GROUP_SECONDS, SLOWEST_FACTOR * self._slowest)

    def _lose_hanging(self) -> None:
        """Let workers go that have returned nothing for too long."""
        limit, now = self.group_seconds(), time.monotonic()
        for member in self._ready():
            if now - member.working_since <= limit or not self._works(member):
                continue
            references = [reference for reference, (other, _) in self._waits.items() if other is member]
            if not ray.wait(references, timeout=0)[0]:  # else it was this process that took its time
                self._lose(member, f"it has returned nothing for {limit / 60:.0f} minutes")

    def _start_workers(self) -> None:
        """Start a worker in every place that Ray has for one, up to the limit. Raises UserError where none is had."""
        now = time.monotonic()
        alive = [member for member in self.members if not member.lost]
        if self._ready():
            self._had_worker = now
        waited = now - self._had_worker
        if self._refusal and not alive and (waited > REFUSED_SECONDS or not self._ever_ready()):
            raise self._refusal
        if waited > START_SECONDS or (self._fruitless >= MAX_LOSSES and not alive):
            raise UserError(f"No worker is left to paint: {self._problem or 'none could be started.'}")
        if now - self._searched < SEARCH_SECONDS or self._fruitless >= MAX_LOSSES:
            return
        self._searched = now
        resource = {"cpu": "CPU", "cuda": "GPU"}[self.kind]
        starting = sum(member.prepared is None for member in alive)
        wanted = self._limit - len(alive)
        while wanted > 0 and self._spare is not None and (actor := self._spare.take(self._order.model)) is not None:
            self._prepare(actor)
            wanted -= 1
        places = int(ray.available_resources().get(resource, 0)) if not starting else 0
        for _ in range(min(places, wanted)):
            options = {"num_cpus": 1} if self.kind == "cpu" else {"num_cpus": 0, "num_gpus": 1}
            self._prepare(ray.remote(Worker).options(max_concurrency=QUEUED[self.kind] + 1, **options).remote())

    def _prepare(self, actor: Any) -> None:
        self.members.append(Member(actor))
        self._waits[actor.prepare.remote(self._order)] = self.members[-1], None

    def _receive(self, timeout: float) -> None:
        """Take what workers return, waiting so many seconds for something."""
        if not self._waits:
            time.sleep(timeout)
            return
        references = list(self._waits)
        ready, _ = ray.wait(references, num_returns=1 if timeout else len(references), timeout=timeout)
        for reference in ready:
            if reference in self._waits:  # no longer, where its worker was lost meanwhile
                member, place = self._waits.pop(reference)
                try:
                    result = ray.get(reference)
                except RayError as error:
                    self._on_error(error, member, place)
                else:
                    self._on_result(result, member, place)

    def _on_result(self, result: Any, member: Member, place: Place | None) -> None:
        if place is None:
            member.prepared, member.ready_at = result, time.monotonic()
            log.info(f"worker on {member.name} is ready")
            return
        painted: PaintedGroup = result
        unpack_result(painted, place.group, self._resolution, self._own_face)
        place.task = None
        now = time.monotonic()
        self._slowest = max(self._slowest or 0.0, now - member.working_since)
        member.working_since = now
        member.groups += 1
        self._fruitless = 0
        for message in painted.messages:
            self._on_message(f"{member.name}: {message}")

    def _on_error(self, error: RayError, member: Member, place: Place | None) -> None:
        """Let a worker go that has failed; raise what would happen to the others, too."""
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, UserError) and place is not None:
            raise cause
        if isinstance(cause, UserError):  # it keeps its place, so that Ray starts no other one there
            member.lost, self._refusal = True, cause
            self._on_message(str(cause))
            return
        self._lose(member, _first_line(cause or error), place)

    def _lose(self, member: Member, reason: str, place: Place | None = None) -> None:
        """End a worker and give what it had to the others; place: what it had, besides what is waited for."""
        member.lost = True
        with suppress(RayError):
            ray.kill(member.actor)
        self._fruitless += not member.groups
        self._problem = f"{member.name} was lost ({reason})."
        places = [] if place is None else [place]
        for reference, (other, had) in list(self._waits.items()):
            if other is member:
                del self._waits[reference]
                places += [] if had is None else [had]
        for had in places:
            had.losses += 1
            if had.losses >= MAX_LOSSES:
                raise UserError(f"{had.losses} workers were lost over the same part of the job: {self._problem}")
        self._waiting.extendleft(reversed(places))
        self._on_message(f"{self._problem} Its windows go to the others.")


def _new_frames(part: Window | AlignedFrame) -> list[AlignedFrame]:
    return part.new if isinstance(part, Window) else [part]


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
