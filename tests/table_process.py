"""A process that uses a table of jobs, to be raced with or killed.

python table_process.py claim URL FOLDER
    Claims what "a", which is dead, has accepted, once a line comes in. Prints the
    uids that it got.
python table_process.py commit URL FOLDER UID
    For each line that comes in, starts a process that commits one chunk after the
    other for "a", and prints its pid, and then the index of each chunk.
"""

import os
import sys
from itertools import count

from jacserve_server.jobs.table import ChunkRecord, JobTable


def claim(url: str, folder: str) -> None:
    table = JobTable(url, folder)
    sys.stdin.readline()
    server = f"server-{os.getpid()}"
    got: set[str] = set()
    while job := table.claim(server, ["f@1"], lambda name: name != "a", running=got):
        got.add(job.uid)
        print(job.uid, flush=True)


def commit(url: str, folder: str, uid: str) -> None:
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            commit_on(JobTable(url, folder), uid)
        os.waitpid(child, 0)
        print("dead", flush=True)


def commit_on(table: JobTable, uid: str) -> None:
    print(os.getpid(), flush=True)
    for index in count(len(table.chunks(uid))):
        chunk = ChunkRecord(index, 10, index % 3, 10 * index, 0.5)
        ready = 10 * (index + 1)
        assert table.commit(
            uid, "a", chunk, boot="b", points_per_s=1.0, ready_count=ready
        )
        print(index, flush=True)


if __name__ == "__main__":
    {"claim": claim, "commit": commit}[sys.argv[1]](*sys.argv[2:])
