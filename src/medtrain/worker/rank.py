"""One rank: one process on one device."""

from __future__ import annotations

# --- the ranks -----------------------------------------------------------------------------------


def _run_rank(spec_path: Path) -> NoReturn:
    """Be one rank: work, leave a record on failure, and go without waiting for threads."""
    _die_with_parent()
    spec = json.loads(spec_path.read_text())
    rank = int(os.environ["RANK"])
    code = EXIT_DONE
    if rank != 0:
        logging.getLogger().setLevel(logging.ERROR)
    try:
        from medtrain.train.rank import evaluate_rank, train_rank  # noqa: F401
    except BaseException as error:
        code = EXIT_VERDICT if is_verdict(error) else EXIT_RETRY
        _leave_record(Path(spec["scratch"]), rank, code, error)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _leave_record(scratch: Path, rank: int, code: int, error: BaseException) -> None:
    record = {
        "rank": rank,
        "code": code,
        "type": type(error).__name__,
        "sentence": str(error) or type(error).__name__,
        "time_ns": time.time_ns(),
        "traceback": traceback.format_exc(),
    }
    temporary = scratch / f".rank{rank}.new"
    temporary.write_text(json.dumps(record))
    temporary.replace(scratch / f"rank{rank}.record.json")


def _die_with_parent() -> None:
    """Ask the kernel to kill this rank when the agent dies, so that no orphan holds a device."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
