"""A job from its settings to its output: what `trtpool run` does once the command line is understood."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

from trtpool.broker.pool import Pool
from trtpool.ipc.errors import ConfigError
from trtpool.ipc.layout import ModelLayout

from .columns import check_names
from .functions import load_function
from .images import ImageWriter, complete, describe, image_layout
from .journal import JobFolder, JobRecord, JobSettings
from .produce import ProducerConfig
from .sinks import open_sink
from .sources import Inputs, check_unchanged, choose, holds_images
from .work import JobOptions, Outcome, Show, Work

CHUNK_BYTES: Final = 16 * 1024 * 1024
"""A chunk's results are at most this large, or a row: it is held in memory, and lost with a crash."""

CHUNK_ROWS: Final = 1024
CHUNKS_A_PRODUCER: Final = 8
"""At least, in small jobs: for an even end, and for the progress bar."""

WINDOW: Final = 64
"""Most slots that a producer has in flight."""


class Job:
    """One job.

    Args:
        settings: what to do.
        options: how.
        find_inputs: gives the inputs, unless the job was planned before.
        output: the file to write.
        show: see `Show`.
    """

    def __init__(
        self,
        settings: JobSettings,
        options: JobOptions,
        find_inputs: Callable[[], Inputs],
        output: Path,
        show: Show,
    ) -> None:
        self._settings = settings
        self._options = options
        self._find_inputs = find_inputs
        self._output = output
        self._show = show
        self._stop = False

    def stop(self) -> None:
        """Ask for an early end, from a signal handler."""
        self._stop = True

    def run(self) -> Outcome | None:
        """Do the job, or what is left of it; None if there was nothing left.

        Raises:
            ConfigError: it cannot be done so; the text says why.
            TooManyErrors, Stopped: it can be resumed.
            PoolError: the pool, or a producer, gave up; it can be resumed.
        """
        if self._output.exists() and not self._options.overwrite:
            if self._options.resume and not self._output.with_name(self._output.name + ".job").exists():
                return None
            if not self._options.resume:
                raise ConfigError(f"{self._output} is there already; use --overwrite, or name another --output")
        for option, dotted in (("--decode", self._settings.decode), ("--post", self._settings.post)):
            if dotted:
                load_function(dotted, option)  # here too, to say so before anything is started
        with JobFolder(self._output) as folder:
            try:
                return self._run_in(folder)
            finally:
                folder.discard_if_new()

    def _run_in(self, folder: JobFolder) -> Outcome | None:
        record = self._planned_before(folder)
        if record is not None and folder.all_written:
            folder.finish()
            return None
        inputs = record.inputs if record is not None else self._find_inputs()
        if not inputs.rows:
            raise ConfigError("the inputs have no rows, so there is nothing to do")
        with Pool(self._settings.model[0], **self._options.pool) as pool:
            (model,) = pool.models
            config = self._producer_config(pool, model, inputs)
            if record is None:
                rows = self._chunk_rows(model, inputs.rows)
                record = JobRecord(settings=self._settings, inputs=inputs, chunk_rows=rows, folder=str(Path.cwd()))
                folder.begin(record)
            safe = folder.entries()
            sink = open_sink(self._settings.sink, folder.path, self._output, safe, inputs.rows)
            try:
                run = Work(
                    self._options, self._show, folder, record, safe, sink, pool, config, stopping=lambda: self._stop
                )
                run.all_chunks()
                return run.outcome(run.complete())
            finally:
                sink.close()

    def _planned_before(self, folder: JobFolder) -> JobRecord | None:
        """The interrupted job to go on with."""
        if not folder.begun or self._options.overwrite:
            return None
        if not self._options.resume:
            raise ConfigError(
                f"a job for {self._output} was interrupted, and what it did is in {folder.path}: "
                "use --resume to go on with it, or --overwrite to start anew"
            )
        record = folder.load()
        if differing := [
            name
            for name in JobSettings.__struct_fields__
            if getattr(record.settings, name) != getattr(self._settings, name)
        ]:
            was, now = (getattr(one, differing[0]) for one in (record.settings, self._settings))
            raise ConfigError(
                f"--resume: the job was begun with other settings ({differing[0]}: {was!r}, now {now!r}); "
                "give the same ones, or start anew with --overwrite"
            )
        if record.folder != str(Path.cwd()):
            raise ConfigError(
                f"--resume: the job was begun in {record.folder}; go there, since its inputs may be relative"
            )
        check_unchanged(record.inputs)
        return record

    def _producer_config(self, pool: Pool, model: ModelLayout, inputs: Inputs) -> ProducerConfig:
        spec, settings = model.spec, self._settings
        names = [one.name for one in spec.inputs]
        columns = choose(inputs, settings.columns, names, any_type=bool(settings.decode))
        if not settings.post:
            check_names(tuple(one.name for one in spec.outputs))
        image = settings.image
        pictures = [one for one in spec.inputs if image_layout(one) is not None]
        if pictures:
            image = complete(image, pictures[0], spec.outputs)
        if not settings.decode:
            if len(names) > 1 and not columns:
                raise ConfigError(f"the model has the inputs {', '.join(names)}; name a function with --decode")
            if holds_images(inputs, columns):
                ImageWriter(spec.inputs[0], image)  # says what does not fit
                self._show.say(f"images: {describe(image, spec.inputs[0])}")
        share = (model.slots - model.max_batch) // self._options.producers
        return ProducerConfig(
            parent_pid=os.getpid(),
            mark_fd=-1,
            run_dir=os.fspath(pool.run_dir),
            model=spec.name,
            kind=inputs.kind,
            columns=columns,
            decode=settings.decode,
            post=settings.post,
            image=image,
            sink=settings.sink,
            window=max(1, min(WINDOW, share)),
        )

    def _chunk_rows(self, model: ModelLayout, rows: int) -> int:
        if self._options.rows_per_group:
            return self._options.rows_per_group
        row_bytes = sum(spec.item_bytes for spec in model.spec.outputs)
        even = -(-rows // (self._options.producers * CHUNKS_A_PRODUCER))
        return max(1, min(CHUNK_BYTES // max(1, row_bytes), CHUNK_ROWS, even))
