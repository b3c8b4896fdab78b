import os
import time
from contextlib import closing
from pathlib import Path

from jacserve_server.jobs.folder import JobFolder


def test_a_sweep_removes_what_dead_servers_left_and_names_what_is_old(
    tmp_path: Path,
) -> None:
    with closing(JobFolder(tmp_path)) as folder:
        uploads = tmp_path / "uploads"
        for name in ("old", "new", "half.dead", f"half.{folder.presence.id}"):
            (uploads / name).mkdir()
        an_hour_ago = time.time() - 3700
        os.utime(uploads / "old", (an_hour_ago, an_hour_ago))
        # As what another server removes between the listing and the look.
        (uploads / "gone").symlink_to("nowhere")
        assert folder.sweep() == ["old"]
        left = {path.name for path in uploads.iterdir()}
        assert left == {"old", "new", "gone", f"half.{folder.presence.id}"}
