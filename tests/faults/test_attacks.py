"""What came of attacks is on record: benchmarks/bench_attacks.py."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LEAST = {"kills": 100, "files": 500, "options": 300}
PHASES = ("training", "evaluation", "saving", "pruning", "shards make", "compare")


def test_no_attack_on_record_found_anything():
    (path,) = RESULTS.glob("*/attacks.json")
    figures = json.loads(path.read_text())
    for section, least in LEAST.items():
        found = figures[section]
        # A command that ended before it was killed is no kill.
        kinds = found["by_kind"].items()
        assert sum(count for kind, count in kinds if "ended before" not in kind) >= least
        assert found["failures"] == []
        kinds = ("tracebacks", "hangs", "silent_losses", "files_outside")
        assert [found[kind] for kind in kinds] == [0, 0, 0, 0]
    killed = figures["kills"]["by_kind"]
    assert all(any(kind.startswith(f"{phase}, SIG") for kind in killed) for phase in PHASES)
