"""The command line: `trtpool start`, `build`, `check`, `run`, `profile`, `reload`, `status`, `top`, `stop`, `doctor`.

Everything that can be wrong is checked before a child process starts, and is answered with one line on standard
error and an exit code of its own; `trtpool --help` prints their table.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from trtpool import __version__
from trtpool.ipc import errors, rundir
from trtpool.ipc.arena import format_bytes
from trtpool.ipc.errors import ConfigError, TrtpoolError
from trtpool.ipc.logs import set_up_logging
from trtpool.ipc.remote import connect
from trtpool.ipc.settings import DEFAULT_RECALL_TIMEOUT_S, EngineSettings, ShapeRange

from . import supervisor
from .cli_build import build
from .cli_build_options import build_options
from .cli_logs import log_options
from .cli_options import ENGINE_OPTIONS, add_options, pool_options
from .cli_top import top
from .cli_types import BATCH_OPTIONS, PER_MODEL, PerModel, only_by_model, per_model_option, split
from .config_file import with_file
from .doctor.cli import doctor
from .pool import make_settings
from .reload.command import reload
from .users import user_ids
from .view import show_report

_CODES: Final = (
    (0, "all went well; a pool drained and ended"),
    (1, "a pool was stopped with work in flight, a build, profile or job was stopped, or the doctor found a problem"),
    (2, "the command line cannot be understood"),
    (errors.ConfigError.exit_code, "an option is not possible"),
    (errors.ModelError.exit_code, "a model file cannot be served as it is"),
    (errors.ArenaTooLarge.exit_code, "more slots than memory"),
    (errors.RunDirError.exit_code, "the run directory cannot be used"),
    (errors.NameInUse.exit_code, "a pool of that name runs already"),
    (errors.DeviceUnavailable.exit_code, "the device cannot be used on this machine"),
    (errors.MissingExtra.exit_code, "an optional package is not installed"),
    (errors.PoolNotFound.exit_code, "no pool runs under that name"),
    (errors.AccessDenied.exit_code, "this user may not attach"),
    (errors.PoolBusy.exit_code, "the pool did not answer, or did not end, in time"),
    (errors.PoolClosed.exit_code, "the pool ended unexpectedly"),
    (errors.StartFailed.exit_code, "a broker or worker did not become ready"),
    (21, "a job is done, and some of its rows have errors"),
    (22, "a job has more errors than --max-errors"),
    (23, "a check found answers that are too far from the reference's"),
    (errors.ProtocolError.exit_code, "pool and client have different versions of trtpool"),
)

_LAZY: Final = {
    "check": "trtpool.broker.check.command",
    "profile": "trtpool.broker.profiling.command",
    "run": "trtpool.broker.jobs.command",
    "trace": "trtpool.broker.tracing.command",
}
"""Commands that are imported when they are called, so that the others stay quick, and where they are."""


class _Group(click.Group):
    """Adds the table of exit codes to ``--help`` and turns our errors into one line each."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in _CODES])
        super().format_epilog(ctx, formatter)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *_LAZY])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LAZY:
            module = importlib.import_module(_LAZY[cmd_name])
            command: click.Command = getattr(module, cmd_name)
            return command
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TrtpoolError as error:
            click.echo(f"trtpool: {error}", err=True)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "trtpool"
            click.echo(f"trtpool: {error.format_message().rstrip('.')}; see `{command} --help`", err=True)
            ctx.exit(error.exit_code)


def _parse_users(_ctx: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> tuple[int, ...]:
    try:
        return user_ids(values)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Run inference worker pools that producers feed through shared memory.

    \b
    Examples:
      trtpool start model.onnx
      trtpool start det.onnx --shape x=3x640x640 --workers 2 --max-batch 4
      trtpool start resnet50.plan --gpus 0,1
      trtpool build resnet50.onnx -o resnet50.plan --fp16
      trtpool start det=a.onnx cls=b.onnx --name ocr --slots det=32 --slots cls=512 --weight det=3
      trtpool start --config pool.toml
      trtpool run det.onnx --input 'pages/*.png' --output out.parquet
      trtpool check resnet50.plan --against resnet50.onnx --data photos/
      trtpool profile det.onnx --batch 1,8,32
      trtpool reload det=new.onnx --name ocr
      trtpool status --json
      trtpool top --name ocr
      trtpool stop --name ocr
      trtpool doctor
    """  # noqa: D301  # click wants the character itself, to leave the lines as they are


@cli.command()
@with_file
@click.argument("models", metavar="[MODEL]...", nargs=-1)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A TOML file with models and options; the command line goes before it.  See docs/configuration.md.",
)
@pool_options
@click.option("--device", metavar="cpu|gpu", help="What workers run on [default: the CPU, or the GPUs of --gpus].")
@add_options(ENGINE_OPTIONS)
@build_options
@add_options(BATCH_OPTIONS)
@per_model_option("--items-per-slot", 1, 2**20, "Items in a slot [default: 1].")
@per_model_option(
    "--max-slots-per-producer", 1, 2**24, "Slots that one client may hold [default: 3/4 of them, or all but a batch]."
)
@click.option(
    "--weight",
    type=PerModel(1, 1000),
    multiple=True,
    callback=only_by_model,
    metavar="MODEL=NUMBER",
    help="A model's share of the workers while others have work too [default: 1].  Again for each.",
)
@click.option(
    "--drain-timeout-s",
    type=click.FloatRange(0, 86_400),
    default=30.0,
    show_default=True,
    help="How long a stopping pool waits for work in flight.",
)
@click.option(
    "--allow-user",
    "allow_users",
    multiple=True,
    callback=_parse_users,
    metavar="NAME|UID",
    help="A user who may attach besides you, and is trusted with all data in the pool.  Again for each.",
)
@click.option(
    "--recall-timeout-s",
    type=click.FloatRange(0, 86_400),
    default=DEFAULT_RECALL_TIMEOUT_S,
    show_default=True,
    help="How long a client may hold idle slots while others wait before it is reported; 0: for ever.",
)
@click.option(
    "--evict/--no-evict", default=False, help="Kill the process of such a client if those who wait need its slots."
)
@click.option(
    "--busy-poll/--no-busy-poll",
    default=False,
    help="Spin instead of sleeping: lower latency, for a whole CPU each for broker, workers and clients that wait.",
)
@click.option(
    "--spin-us",
    type=click.IntRange(0, 1_000_000),
    help="Look so long at most for what comes next before sleeping, while that pays [default: 200 with 8 CPUs or more, "
    "else 0].",
)
@click.option(
    "--slow-ms",
    type=click.FloatRange(0, 86_400_000),
    default=0,
    help="Log requests that take longer, with where their time went, one a second at most [default: none].",
)
@click.option(
    "--metrics",
    default="",
    metavar="HOST:PORT",
    help="Serve figures for Prometheus at /metrics there, and /healthz and /readyz, such as on 127.0.0.1:9400.",
)
@log_options
def start(
    *,
    models: tuple[str, ...],
    name: str,
    run_dir: Path | None,
    threads: int,
    shapes: dict[str, ShapeRange],
    no_batch: tuple[str, ...],
    partial: str,
    lanes: int,
    flavour: str | None,
    graphs: bool,
    allow_host_code: bool,
    **options: Any,
) -> None:
    """Serve models until stopped.

    Each MODEL is an ONNX file, or with --gpus a TensorRT plan, or NAME=FILE; its name is the file's stem by default.
    The pool stays in the foreground: the first SIGTERM or Ctrl-C drains it, a second stops it at once.
    """
    set_up_logging("supervisor")
    common, per_model = split({option: options.pop(option) for option in PER_MODEL})
    engine = EngineSettings(
        threads=threads,
        shapes=shapes,
        no_batch=no_batch,
        partial=partial,
        lanes=lanes,
        flavour=flavour or "",
        graphs=graphs,
        host_code=allow_host_code,
    )
    settings = make_settings(
        models,
        rundir.run_dir_of(name, run_dir),
        name=name,
        engine=engine,
        per_model=per_model,
        **{**common, **options},
    )
    missing = [source.path for source in settings.models if not Path(source.path).exists()]
    if missing:
        raise errors.ModelError(f"there is no file {missing[0]}; name an .onnx file, or with --gpus a plan")
    sys.exit(supervisor.run(settings, _announce, _say))


def _say(line: str) -> None:
    """Say at once what the user waits for; whoever reads a pipe too."""
    click.echo(line)
    sys.stdout.flush()


def _announce(started: supervisor.Started) -> None:
    for model in started.layout.models:
        click.echo(
            f"model {model.spec.name}: {', '.join(map(str, model.spec.inputs))} -> "
            f"{', '.join(map(str, model.spec.outputs))}; {model.slots} slots of {format_bytes(model.slot_bytes)}, "
            f"batches of up to {model.max_batch}"
        )
    for number, gpu in enumerate(started.gpus):
        click.echo(f"GPU {number}: {gpu.name} ({gpu.uuid}), {_count(started.workers // len(started.gpus), 'worker')}")
    if started.metrics:
        click.echo(f"metrics: {started.metrics}")
    place = _count(len(started.gpus), "GPU") if started.gpus else "the CPU"
    _say(
        f"ready: pool {started.name!r} with {_count(started.workers, 'worker')} on {place}, "
        f"arena {format_bytes(started.layout.segment_bytes)}, in {started.run_dir}"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


@cli.command()
@pool_options
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def status(name: str, run_dir: Path | None, as_json: bool) -> None:
    """Show what a pool is doing."""
    with connect(name, run_dir=run_dir) as client:
        report = client.status()
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        show_report(report)


@cli.command()
@pool_options
@click.option(
    "--timeout-s",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds to wait for the pool to end.",
)
def stop(name: str, run_dir: Path | None, timeout_s: float) -> None:
    """Drain a pool: grant nothing new, finish what is in flight, end."""
    path = rundir.run_dir_of(name, run_dir)
    if not rundir.stop(path, timeout_s):
        raise errors.PoolBusy(
            f"the pool in {path} still drains after {timeout_s:g} s; "
            "wait, or run `trtpool stop` again to end it at once"
        )
    click.echo(f"pool {name!r} has ended" if run_dir is None else f"the pool in {path} has ended")


cli.add_command(build)
cli.add_command(doctor)
cli.add_command(reload)
cli.add_command(top)


def main() -> None:
    """The console script."""
    cli(prog_name="trtpool")


if __name__ == "__main__":
    main()
