"""A client in a process of its own, whose memory is watched.

Run as `python -m benchmarks.jobs.job_client TARGET`. For each line of JSON it submits a
job of the points of an .npy file, waits for it, saves its Jacobians to another, and
writes the job's id.
"""

import json
import sys

import jacserve
from benchmarks.jobs.setting import finished, mapped


def main() -> None:
    """Answers until stdin ends."""
    [target] = sys.argv[1:]
    with jacserve.Client(target) as client:
        for line in sys.stdin:
            request = json.loads(line)
            job = client.submit_job(
                "sphere",
                mapped(request["points"]),
                quantities=("jacobian", "slogdet"),
                batch_size=request["batch_size"],
            )
            finished(job)
            job.save(request["save"], "jacobian")
            print(json.dumps(job.id), flush=True)


if __name__ == "__main__":
    main()
