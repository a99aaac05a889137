"""A party of tests: the functions party(engine) of test modules, on one engine (Cheetah)."""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import tell  # noqa: E402

from private.engine import Engine  # noqa: E402

rank, client, server, *modules = sys.argv[1:]
engine = Engine(int(rank), [client, server], "cheetah", timeout=60, connect_timeout=60)
seen = {}
for name in modules:
    engine.costs = []
    seen[name] = importlib.import_module(name).party(engine)
tell(engine, seen)
