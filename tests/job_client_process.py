"""A client that begins to send a job, says so, and never ends: to be killed.

python job_client_process.py TARGET JOB_ID
"""

import sys
import threading
from collections.abc import Iterator

from job_calls import JobCalls, points, upload

COUNT = 200_000


def first_parts(job_id: str) -> Iterator[bytes]:
    yield from upload(job_id, "dense", points(COUNT, 3))[:3]
    print("sent", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    target, job_id = sys.argv[1:]
    with JobCalls(target) as calls:
        calls.send(first_parts(job_id))
