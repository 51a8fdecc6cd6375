"""The verbs of a worker: `python -m medtrain.worker prepare | train | evaluate | predict`.

The parent process plans the run as the launcher did, claims an attempt, brings the data to the
node and runs torch's elastic agent; each rank is this module again with `--rank`. Its exit code is
0 (done), 42 (its own inputs do not allow it: never retried), 143 (stopped, and all is stored) or
200 (anything else: try again).
"""

import signal
import sys

from medtrain.worker.stop import STOP, STOP_SIGNALS, StopRequested

if __name__ == "__main__":
    # Before any other import: as PID 1 a process ignores SIGTERM until it has a handler.
    if "--rank" in sys.argv:
        # Until the process group is up a rank has nothing to save and ends at once.
        for _signum in STOP_SIGNALS:
            signal.signal(_signum, signal.SIG_DFL)
    else:
        STOP.listen()

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from medtrain.errors import MedTrainError, is_verdict
from medtrain.storage.runs import EXIT_RETRY, EXIT_STOPPED, EXIT_VERDICT

log = logging.getLogger("medtrain.worker")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; the exit code."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    if arguments.rank:
        from medtrain.worker.rank import run_rank

        run_rank(Path(arguments.rank))
    try:
        from medtrain.worker import parent

        STOP.interrupt()
        return parent.run(arguments)
    except StopRequested:
        log.info("stopped before anything was begun")
        return EXIT_STOPPED
    except MedTrainError as error:
        log.error("error: %s", error)
        return EXIT_VERDICT if is_verdict(error) else EXIT_RETRY
    except Exception:
        log.exception("error: unexpected")
        return EXIT_RETRY


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m medtrain.worker", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    verbs = parser.add_subparsers(dest="verb")
    for verb, text in (
        ("prepare", "Check the raw data and record membership of splits."),
        ("train", "Train one stage."),
        ("evaluate", "Judge a trained stage on the sealed test split."),
    ):
        sub = verbs.add_parser(verb, help=text, description=text, allow_abbrev=False)
        if verb == "evaluate":
            sub.add_argument("--run", required=True, help="run directory to judge")
        else:
            sub.add_argument("name", help="SYSTEM/VARIANT:STAGE+OVERLAY")
            sub.add_argument("--set", action="append", default=[], help="override key=value")
        if verb != "prepare":
            sub.add_argument("--data", required=True, help="run directory of prepare")
        if verb == "train":
            sub.add_argument("--parent", default="", help="run directory of the earlier stage")
        sub.add_argument("--again", type=int, default=0, help="number of a deliberate repetition")
        sub.add_argument("--key", default="", help="run key that the launcher computed")
    text = "Use a pulled model on raw images."
    predict = verbs.add_parser("predict", help=text, description=text, allow_abbrev=False)
    predict.add_argument("package", help="folder of a pulled model")
    predict.add_argument("images", nargs="+", help="raw images")
    predict.add_argument("--out", required=True, help="folder for results")
    predict.add_argument("--set", action="append", default=[], help="override key=value")
    return parser


if __name__ == "__main__":
    sys.exit(main())
