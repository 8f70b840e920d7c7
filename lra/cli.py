"""The command line: picks the sub-command and imports the rest late, so that help is instant."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lra.files import disk_is_full, full_disk

LOG = logging.getLogger("lra")

EPILOG = """\
examples:
  lra train task=listops attention=cosformer protocol=nystrom seed=0
  lra train -m task=listops attention=softmax,cosformer seed=0,1,2
  lra train -m 'task=glob(*)' 'attention=glob(*)' seed=0,1,2 --dry-run
  lra status
  lra eval runs/quick/listops/softmax/s0-1a2b3c4d
  lra maps runs/quick/listops/softmax/s0-1a2b3c4d runs/quick/listops/rfa/s0-5e6f7a8b
  lra bench attention=softmax,cosformer lengths=1024,2048
  lra report
  lra compare softmax cosformer --protocol quick
  lra data task=listops protocol=quick
  lra ls attention=rfa
  lra check attention=rfa attention.gate=true
"""

TRAIN_HELP = """\
usage: lra train [-m] [--dry-run] [KEY=VALUE ...]

Train one run, or with -m every combination of comma-separated values, each in its own process.
A finished run is kept, a cut one goes on from its checkpoint; both by the same command. --dry-run
starts nothing, and prints each run, how far it is and the time it will take.

  task=NAME attention=NAME protocol=NAME   what is trained, and how (lra ls)
  attention.OPTION=VALUE                   an option of the attention
  seed=0                                   initial weights, order of examples, dropout
  device=auto precision=auto               auto, cpu, cuda; auto, fp32, bf16
  tracker=wandb wandb.mode=offline         W&B is offline unless wandb.mode=online
  reuse=never                              start over instead of keeping or resuming
  keep_checkpoint=true                     keep the weights of a finished run, for lra eval
  activation_checkpointing=true            less memory: activations are computed again
  compile=true                             torch.compile the blocks of the model
  tune=lr                                  first choose the learning rate by validation, with seed 0
  sweep=NAME                               with -m: the runs of a paper's table (lra ls)
  launch=joblib runs_at_once=2             with -m: several runs at once, threads divided
  launch=slurm, launch=ray                 with -m: jobs of a cluster (conf/launch/*.md)
  model.KEY=VALUE train.KEY=VALUE          depart from the protocol; the run is marked as modified

conf/config.yaml and conf/protocol/ have every key and its meaning.
"""

BENCH_HELP = """\
usage: lra bench [KEY=VALUE ...]

Measure speed and memory of attentions by length, each cell in a fresh process, and write tables and
figures to results/. Cells that are measured are kept: the same command goes on where it was cut,
and other commands add rows.

  attention=NAME,NAME                      all that fit unless named; attention.OPTION=VALUE
  mode=train,infer                         training step, forward pass
  mode=decode                              generation token by token, to the length
  lengths=1024,2048,3072,4096 batch=32     of the sequences; the model is made for its length
  device=auto precision=auto threads=2     auto, cpu, cuda; auto, fp32, bf16
  model.layers=2 model.dim=64 ...          the model around the attention; shape=text or decode
  filled=false                             real lengths instead of whole ones
  micro_batches=1                          whole batches; auto: in pieces, as lra train runs them
  memory_gb=4 seconds=60                   limits of a cell; beyond them it is a cross, or marked
  reuse=never                              measure again
  out=results                              folder to write to

conf/bench.yaml and conf/shape/ have every key and its meaning.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `lra` and exits: 0 for success, 1 for a failed run, 2 for a mistake in the call."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    follows = os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"
    # What the first of several processes tells, the others need not.
    handler = _Console(logging.ERROR if follows else logging.INFO)
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be no text of its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if _processes() > 1 and (
            arguments[:1] != ["train"] or {"-h", "--help", "--dry-run"} & set(arguments)
        ):
            raise ValueError(
                f"torchrun is for training alone: type lra {' '.join(arguments)} without it."
            )
        if arguments[:1] == ["train"]:
            code = _train(arguments[1:])
        elif arguments[:1] == ["bench"]:
            code = _bench(arguments[1:])
        else:
            code = _other(arguments)
        sys.stdout.flush()
    except ValueError as error:
        if not follows:
            print(f"lra: {error}", file=sys.stderr)
        code = 2
    except BrokenPipeError:
        # The reader of our output has gone (`lra ls | head`); nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except OSError as error:
        told = f"{error.strerror}: {error.filename}" if error.filename else str(error)
        if disk_is_full(error):
            told = full_disk(error)
        print(f"lra: {told or type(error).__name__}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    finally:
        LOG.removeHandler(handler)
    sys.exit(code)


def _processes() -> int:
    """Returns how many processes torchrun has started.

    Raises:
        ValueError: If its environment variable is no number.
    """
    told = os.environ.get("WORLD_SIZE") or "1"
    if not (told.isdecimal() and int(told)):
        raise ValueError(
            f"The environment variable WORLD_SIZE is {told!r}, not the number of processes that "
            f"torchrun has started: type unset WORLD_SIZE, or start lra by torchrun."
        )
    return int(told)


class _Console(logging.Handler):
    """Prints messages above the progress bars."""

    def emit(self, entry: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(entry), file=sys.stdout)


def _train(arguments: list[str]) -> int:
    flags = [a for a in arguments if a.startswith("-")]
    overrides = [a for a in arguments if not a.startswith("-")]
    if {"-h", "--help"} & set(flags):
        print(TRAIN_HELP, end="")
        return 0
    if unknown := set(flags) - {"-m", "--multirun", "--dry-run"}:
        raise ValueError(
            f"lra train has no option {' '.join(sorted(unknown))}: it takes -m, --dry-run and "
            f"key=value."
        )
    multirun = bool({"-m", "--multirun"} & set(flags))
    if "--dry-run" in flags:
        from lra.plan import dry_run

        return dry_run(overrides, multirun)
    from lra import ranks

    with ranks.joined():
        if multirun:
            from lra.sweep import sweep

            return sweep(overrides)
        from lra.compose import load
        from lra.tune import train

        with ranks.together():
            config = load(overrides)
        record = train(config)
    return {"ok": 0, "interrupted": 130}.get(record.status, 1)


def _bench(overrides: list[str]) -> int:
    flags = [a for a in overrides if a.startswith("-")]
    if {"-h", "--help"} & set(flags):
        print(BENCH_HELP, end="")
        return 0
    if flags:
        raise ValueError(f"lra bench has no option {' '.join(flags)}: it takes key=value.")
    from lra.bench.run import bench

    return bench(overrides)


def _other(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="lra",
        description="Train attention mechanisms on the Long Range Arena and compare them.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train one run, or a sweep with -m", add_help=False)
    command = commands.add_parser("status", help="say how far runs are, at any time")
    command.add_argument(
        "what",
        nargs="*",
        metavar="FOLDER | KEY=VALUE",
        help="folder of runs (default: runs), or the overrides of lra train -m",
    )
    commands.add_parser("bench", help="measure speed and memory by length", add_help=False)
    command = commands.add_parser("eval", help="score a run's checkpoint on the test set again")
    command.add_argument("folder", type=Path, metavar="RUN_FOLDER")
    command = commands.add_parser("maps", help="draw the attention of runs with a checkpoint")
    command.add_argument("folders", type=Path, nargs="+", metavar="RUN_FOLDER")
    command.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    command = commands.add_parser("report", help="write the tables of all runs to results/")
    command.add_argument(
        "--runs", type=Path, nargs="+", default=[Path("runs")], help="folders of runs"
    )
    command.add_argument("--out", type=Path, default=Path("results"), help="folder to write to")
    command.add_argument(
        "--wandb", choices=["offline", "online"], help="log the tables to W&B, as an artefact"
    )
    command.add_argument("--project", default="lra", help="of W&B")
    command = commands.add_parser(
        "compare", help="compare two rows of the leaderboard on the same test examples"
    )
    for side in ("A", "B"):
        command.add_argument(
            side.lower(), metavar=side, help="a row's name, as 'linear feature=relu', or a folder"
        )
    command.add_argument(
        "--runs", type=Path, nargs="+", default=[Path("runs")], help="folders of runs"
    )
    command.add_argument("--protocol", help="of this protocol only")
    command = commands.add_parser("data", help="say what data is there, or prepare a task's")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="task=NAME prepares it")
    command = commands.add_parser("ls", help="list names, capabilities, options and data")
    command.add_argument(
        "what",
        nargs="*",
        metavar="WHAT",
        help="attention, attention=NAME, task=NAME [protocol=NAME]",
    )
    command = commands.add_parser("check", help="check that an attention keeps its contract")
    command.add_argument(
        "overrides", nargs="+", metavar="KEY=VALUE", help="attention=NAME and its options"
    )
    try:
        given = parser.parse_args(arguments)
    except SystemExit as end:  # after --help or a mistake, which argparse has told
        return int(end.code or 0)
    if given.command == "eval":
        return _evaluate(given.folder)
    if given.command == "maps":
        from lra.maps import write

        write(given.folders, given.out)
        return 0
    if given.command == "status":
        return _status(given.what)
    if given.command == "report":
        return _report(given)
    if given.command == "compare":
        from lra.report.compare import compare

        return compare(given.a, given.b, given.runs, given.protocol)
    if given.command == "data":
        from lra.listing import data

        return data(given.overrides)
    if given.command == "check":
        return _check(given.overrides)
    from lra.listing import listing

    print(listing(given.what))
    return 0


def _check(overrides: list[str]) -> int:
    from lra.compose import load_attentions

    attentions = load_attentions(overrides)
    from lra.conformance import check, table
    from models.attention import ATTENTIONS

    failed = 0
    for name, options in attentions:
        given = "".join(f" attention.{key}={value}" for key, value in options.items())
        results = check(ATTENTIONS.get(name), options)
        count = sum(r.outcome == "fail" for r in results)
        print(f"attention={name}{given}\n{table(results)}")
        print(f"{len(results)} checks, {count} failed\n", flush=True)
        failed += count
    return int(failed > 0)


def _status(what: list[str]) -> int:
    overrides = [word for word in what if "=" in word]
    folders = [Path(word) for word in what if word not in overrides]
    if len(folders) + bool(overrides) > 1:
        raise ValueError("lra status takes one folder of runs, or overrides as lra train -m does.")
    if overrides:
        from lra.plan import planned_status

        print(planned_status(overrides))
    else:
        from lra.status import status

        print(status(*folders or [Path("runs")]))
    return 0


def _report(given: argparse.Namespace) -> int:
    from lra.report import write

    tables = write(given.runs, given.out)
    if given.wandb:
        from lra.config import WandbConfig
        from lra.track import log_leaderboards

        settings = WandbConfig(given.wandb, given.project, None)
        log_leaderboards(tables, settings, given.out)
    return 0


def _evaluate(folder: Path) -> int:
    from lra.kept import evaluate_again
    from lra.run import describe

    record, score = evaluate_again(folder)
    print(f"recorded: {describe(record)}")
    print(f"now:      test {score.accuracy:.2%} of {score.n:,}, loss {score.loss:.6f}")
    return 0
