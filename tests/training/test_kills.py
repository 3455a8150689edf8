"""The short kill campaign; the long one is `python tests/training/kill_campaign.py --full`."""

import subprocess
import sys
from pathlib import Path


def test_kills_lose_nothing():
    script = Path(__file__).with_name("kill_campaign.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "nothing lost" in done.stdout, done.stdout + done.stderr
