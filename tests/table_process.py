"""Processes that use a table of jobs, to be raced or killed.

    python table_process.py claim URL FOLDER
        Three processes claim what "a", which is dead, has accepted. Each prints its id,
        and a uid, for each job that it gets.
    python table_process.py commit URL FOLDER UID
        For each line that comes in, a process commits one chunk after the other for
        "a", until it is killed. It prints its id, and then the index of each chunk.

They are forks of one that has imported everything: that takes longest.
"""

import os
import sys
from itertools import count

from jacserve_server.jobs.table import ChunkRecord, JobTable


def tell(*words: object) -> None:
    # A line in one piece, as print does not always: others write to the same pipe.
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def claim(url: str, folder: str) -> None:
    for _ in range(3):
        if not os.fork():
            claim_from(JobTable(url, folder))
            os._exit(0)
    for _ in range(3):
        os.wait()


def claim_from(table: JobTable) -> None:
    server = str(os.getpid())
    got: set[str] = set()
    while job := table.claim(server, ["f@1"], lambda name: name != "a", running=got):
        got.add(job.uid)
        tell(server, job.uid)


def commit(url: str, folder: str, uid: str) -> None:
    for _ in sys.stdin:
        child = os.fork()
        if not child:
            commit_to(JobTable(url, folder), uid)
        os.waitpid(child, 0)
        tell("dead")


def commit_to(table: JobTable, uid: str) -> None:
    tell(os.getpid())
    for index in count(len(table.chunks(uid))):
        chunk = ChunkRecord(index, 10, index % 3, 10 * index, 0.5)
        ready = 10 * (index + 1)
        assert table.commit(
            uid, "a", chunk, boot="b", points_per_s=1.0, ready_count=ready
        )
        tell(index)


if __name__ == "__main__":
    {"claim": claim, "commit": commit}[sys.argv[1]](*sys.argv[2:])
