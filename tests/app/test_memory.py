"""What stays is left out of the collections of garbage, and what a session leaves is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import gc, sys, weakref
sys.path.insert(0, sys.argv[1])
import memory

class Ring:
    pass

before = gc.get_freeze_count()
memory.keep("a")
held = gc.get_freeze_count()
assert held > before + 1000, held
memory.keep("a")
assert gc.get_freeze_count() == held, "once"
ring = Ring()
ring.itself = ring
seen = weakref.ref(ring)
del ring
gc.collect(2)
assert seen() is None, "later garbage is found"
model = [[] for _ in range(1000)]
memory.keep("b", last=True)
assert gc.get_freeze_count() >= held + 1000
model, held = [[] for _ in range(1000)], gc.get_freeze_count()
memory.keep("c")
assert gc.get_freeze_count() <= held, "a model may be loaded by now"
del model
print(len(gc.get_objects()))
"""


def test_what_stays_is_left_out_and_later_garbage_is_found() -> None:
    app = Path(__file__).parents[2] / "app"
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(app)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1000 and not done.stderr
