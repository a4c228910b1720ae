"""What becomes of a request for other engines.

::

    request --> examining --> loading --------> switching --------> leaving ------> answered: Reloaded
                a child looks  workers with     the broker sends    the old ones
                at the files   them stand by    work to these only  finish and end
                   |              |
                   '--------------'--> refused: nothing has changed

All places get new workers, and these get work at one moment, or none ever: a mixture of old and new engines would
answer by chance for as long as the slowest takes to load.  Until that moment whatever goes wrong ends the new workers.
From then on the new files are what a worker that is started again loads, and every broker is told so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Final

import msgspec

from trtpool.broker.children import Child, Children
from trtpool.broker.crew import Crew, Place
from trtpool.broker.desk import Asked, Asker, Desk
from trtpool.broker.planning import error_of, requests
from trtpool.broker.succession import Succession
from trtpool.ipc.errors import ConfigError, ModelError, PoolBusy, PoolClosed, StartFailed, TrtpoolError
from trtpool.ipc.layout import Layout
from trtpool.ipc.process import describe_exit
from trtpool.ipc.settings import GpuInfo, ModelSource, PoolSettings
from trtpool.ipc.signature import differences

from .examine import ExamineConfig, Examined
from .requests import Progress, Reloaded, ReloadRequest

log = logging.getLogger("trtpool.supervisor")

_UNCHANGED: Final = "nothing has changed"


class Reloads:
    """See the module.

    Args:
        settings: of the pool, with the files that it serves now.
        gpus: what its GPUs are.
        layout: its arena.
        children, crew, succession, desk: of the supervisor.
    """

    def __init__(
        self,
        settings: PoolSettings,
        gpus: tuple[GpuInfo, ...],
        layout: Layout,
        children: Children,
        crew: Crew,
        succession: Succession,
        desk: Desk,
    ) -> None:
        self._settings = settings
        self._gpus = gpus
        self._layout = layout
        self._children = children
        self._crew = crew
        self._succession = succession
        self._desk = desk
        self._asker: Asker | None = None
        self._wanted = settings  # with the files that were asked for
        self._names: tuple[str, ...] = ()
        self._examiner: Child | None = None
        self._answer_fd = -1
        self._over = False

    # ------------------------------------------------------------------ what happens

    def hear(self, asked: Asked) -> None:
        """A command said something."""
        asker, request = asked.asker, asked.request
        if isinstance(request, ReloadRequest):
            try:
                self._begin(asker, request)
            except TrtpoolError as error:
                asker.refuse(error)
                self._desk.dismiss(asker)
        elif asker is self._asker and not self._is_switched:
            self._fail(PoolClosed(f"whoever asked is gone; {_UNCHANGED}"))

    def is_child(self, pidfd: int) -> bool:
        """Whether this is the pidfd of who examines files."""
        return self._examiner is not None and self._examiner.pidfd == pidfd

    def examined(self, returncode: int) -> None:
        """That child was reaped."""
        self._examiner = None
        fd, self._answer_fd = self._answer_fd, -1
        with os.fdopen(fd, "rb") as file:
            file.seek(0)
            answer = file.read()
        if self._asker is None:  # it was called off
            return
        try:
            if returncode or not answer:
                raise StartFailed(f"looking at the new files ended with {describe_exit(returncode)}; {_UNCHANGED}")
            self._check(msgspec.json.decode(answer, type=Examined))
        except TrtpoolError as error:
            self._fail(error)
        except OSError as error:
            self._fail(StartFailed(f"the new workers cannot be started: {error.strerror}; {_UNCHANGED}"))

    def candidate_ended(self, place: Place, returncode: int) -> None:
        """A worker that stood by, or was to, was reaped."""
        error = place.start_error(returncode)
        self._crew.candidates.remove(place)
        self._fail(type(error)(f"the new engines could not be loaded beside those that serve, {_UNCHANGED}: {error}"))

    def advance(self) -> None:
        """Go on, if what is waited for has happened."""
        crew = self._crew
        if crew.candidates and all(place.ready for place in crew.candidates):
            crew.switch()
            self._settings = self._wanted
            log.info("other engines serve from now on: %s", self._describe())
            self._say(
                "switched: the new engines answer from now on, and the old ones finish what they have", switched=True
            )
        elif self._asker is not None and self._is_over:
            self._asker.tell(Reloaded(crew.generation))
            self._end()

    def close(self) -> None:
        """The pool is being stopped: what is not switched never is."""
        self._over = True
        if self._asker is not None and not self._is_switched:
            self._fail(PoolClosed(f"the pool is being stopped; {_UNCHANGED}"))

    # ------------------------------------------------------------------ steps

    @property
    def _is_switched(self) -> bool:
        """Whether what is wanted serves; asked only while somebody wants something."""
        return self._wanted is self._settings

    @property
    def _is_over(self) -> bool:
        """Whether it serves, so that no broker forgets it, and no old engine runs."""
        told = self._succession.generation == self._crew.generation
        return self._is_switched and told and not self._crew.leaving

    def _begin(self, asker: Asker, request: ReloadRequest) -> None:
        if self._over:
            raise PoolClosed("the pool is being stopped; start it again with the new files")
        if self._asker is not None or self._examiner is not None:
            raise PoolBusy("another reload is under way; try again when it is over")
        sources = _resolve(request.models, self._settings.models)
        self._names = tuple(source.name for source in sources)
        new = {source.name: source for source in sources}
        models = tuple(new.get(source.name, source) for source in self._settings.models)
        wanted = msgspec.structs.replace(self._settings, models=models)
        requests(wanted)  # refuses a plan on the CPU
        self._answer_fd = os.memfd_create("trtpool-answer", os.MFD_CLOEXEC)
        config = ExamineConfig(os.getpid(), self._answer_fd, wanted, self._names, self._gpus)
        with self._children.room():
            self._examiner = self._children.spawn("trtpool.broker.reload.examine", config, [self._answer_fd])
        self._asker, self._wanted = asker, wanted
        self._say(f"looking at {', '.join(source.path for source in sources)}")

    def _check(self, examined: Examined) -> None:
        if examined.refusal is not None:
            raise error_of(examined.refusal)
        layouts = {layout.spec.name: layout for layout in self._layout.models}
        for spec in examined.specs:
            if wrong := differences(layouts[spec.name], spec):
                raise ModelError(
                    f"{spec.path} cannot take the place of model {spec.name!r}: {'; '.join(wrong)}; {_UNCHANGED}, and "
                    "it needs a pool of its own"
                )
        self._wanted = msgspec.structs.replace(self._wanted, models=examined.models)
        self._crew.stand_by(requests(self._wanted))
        self._say(f"loading in {len(self._crew.candidates)} new workers, while the old ones answer")

    def _fail(self, error: TrtpoolError) -> None:
        log.warning("a reload came to nothing: %s", error)
        if self._examiner is not None:
            self._examiner.process.kill()
        self._crew.discard("the reload that it was started for came to nothing")
        if self._asker is not None:
            self._asker.refuse(error)
        self._end()

    def _end(self) -> None:
        if self._asker is not None:
            self._desk.dismiss(self._asker)
        self._asker = None

    def _say(self, text: str, *, switched: bool = False) -> None:
        if self._asker is not None:
            self._asker.tell(Progress(text, switched))

    def _describe(self) -> str:
        new = [f"{one.name} from {one.path}" for one in self._settings.models if one.name in self._names]
        return f"generation {self._crew.generation}, {', '.join(new)}"


def _resolve(asked: Sequence[ModelSource], served: Sequence[ModelSource]) -> list[ModelSource]:
    """The files with the names of the models that they are for."""
    names = [model.name for model in served]
    found: dict[str, ModelSource] = {}
    for source in asked:
        if not source.name and len(names) > 1:
            raise ConfigError(f"which model is {source.path} for? Say NAME=FILE; there are {', '.join(names)}")
        name = source.name or names[0]
        if name not in names:
            raise ConfigError(f"no model is called {name!r}; there are {', '.join(names)}")
        if name in found:
            raise ConfigError(f"two files are given for model {name!r}, {found[name].path} and {source.path}; name one")
        found[name] = ModelSource(source.path, name)
    return list(found.values())
