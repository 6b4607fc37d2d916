"""A server of commands: it has imported everything, and runs each command in a fork of its own, with limits.

A line of JSON comes in: `arguments`, the `folder` to run in, and the `file` where its output goes meanwhile. One goes
out: `status`, `out`, `err`, the most `bytes` of memory that it had, and whether it was `late`: it was ended after
LONGEST_S seconds of a processor, or LONGEST_REST_S of sleep.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "EXPERTGRID_ISOLATE": "0", "CUDA_VISIBLE_DEVICES": ""}

import json
import resource
import signal
import sys
import time
from pathlib import Path

LONGEST_S = float(os.environ.get("LONGEST_S", "60"))
LONGEST_REST_S = 10.0  # asleep
MOST_BYTES = 1 << 30


def state_of(process: int) -> tuple[bool, float]:
    """Whether a process sleeps, and the seconds of a processor that it has used so far."""
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return words[0] == "S", (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def run(arguments: list[str], folder: str, file: str) -> dict[str, object]:
    sys.stdout.flush()
    if child := os.fork():
        since, before, late = time.monotonic(), 0.0, False
        while not (ended := os.wait4(child, os.WNOHANG))[0]:
            sleeps, used = state_of(child)
            if used != before or not sleeps:
                since, before = time.monotonic(), used
            if late := used > LONGEST_S or time.monotonic() - since > LONGEST_REST_S:
                os.killpg(child, signal.SIGKILL)
                ended = os.wait4(child, 0)
                break
            time.sleep(0.01)
        out, err = (Path(f"{file}.{name}").read_text(errors="replace")[-50_000:] for name in ("out", "err"))
        size = 1024 * ended[2].ru_maxrss
        return {"status": os.waitstatus_to_exitcode(ended[1]), "out": out, "err": err, "bytes": size, "late": late}
    try:
        os.setpgid(0, 0)
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{file}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        limit = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + 3 * MOST_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(folder)
        sys.argv = ["expertgrid", *arguments]
        entry.main()
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    os._exit(70)


if __name__ == "__main__":
    import matplotlib.figure  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch

    import expertgrid.ablations.cli.bench
    import expertgrid.ablations.cli.hub
    import expertgrid.ablations.cli.quickstart
    import expertgrid.ablations.cli.rerun
    import expertgrid.ablations.results.report.findings
    import expertgrid.ablations.results.verify  # noqa: F401
    from expertgrid.ablations.cli import entry
    from expertgrid.bench import timing
    from expertgrid.model.training.data import load_data

    timing.LONGEST_WARM_UP_S, timing.LONGEST_REST_S, timing.OPENINGS, timing.LEAST_OPENINGS = 0.01, 0.0, 2, 2
    torch.set_num_threads(1)
    load_data("digits")
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
