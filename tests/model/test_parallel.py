import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_two_ranks_equal_one():
    """Experts on two gloo ranks, the rest sharded with FSDP2: hidden states, loss and every gradient."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(HERE / "parallel_worker.py")]  # fmt: skip
    root = HERE.parent.parent
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=root,
        env={"PYTHONPATH": f"{root}:{HERE}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "equal on 2 ranks" in done.stdout
