"""`python -m mutation`: draw mutants, try those without a result, list what survived. See `make mutants`.

`tests/mutants.json` lists what changes nothing, with the reason, and under `draws` what was found: which commit and
seed, how many were caught, and what became of the survivors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from mutation.draw import Mutant
from mutation.session import Session

ROOT = Path(__file__).resolve().parents[3]
ROOMS = ("spine", "methods", "cache", "ops", "decoding", "chase", "models")
LEAST = 0.9  # of the mutants that change something


def report(session: Session, tried: list[tuple[Mutant, dict[str, Any]]], listed: list[dict[str, str]]) -> float:
    """Print what survived and a table of the rooms; the share caught of the mutants that change something."""
    equivalent = {(entry["file"], _bare(entry["was"]), _bare(entry["now"])): entry["reason"] for entry in listed}
    rows = {room.name: Counter() for room in session.rooms}
    for mutant, result in tried:
        outcome, source = result["outcome"], session.sources[mutant.path]
        was, now = mutant.change(source.text)
        reason = equivalent.get((mutant.path, _bare(was), _bare(now)))
        if outcome == "survived" and reason:
            outcome = "equivalent"
        rows[session.room_of[mutant.path].name][outcome] += 1
        if outcome != "caught":
            why = reason or ("no test executes it" if not result["tests"] else f"{result['tests']} tests passed")
            why = result["output"][-1000:] if outcome == "broken" else why
            print(f"\n{mutant.path}:{mutant.spec.start_pos[0]} {outcome}: {why}\n-   {was}\n+   {now}")
    kinds = ("caught", "survived", "equivalent", "broken")
    print("\n| room | " + " | ".join(kinds) + " |\n| --- |" + " ---: |" * len(kinds))
    total = sum(rows.values(), Counter())
    for name, row in {**rows, "all": total}.items():
        print(f"| {name} | " + " | ".join(str(row[kind]) for kind in kinds) + " |")
    share = total["caught"] / max(total["caught"] + total["survived"] + total["broken"], 1)
    print(f"\n{share:.1%} of the mutants that change something were caught; at least {LEAST:.0%} are to be.")
    return share


def _bare(text: str) -> str:
    """Without white space, of which cosmic-ray leaves some behind."""
    return "".join(text.split())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=200, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="other seeds draw others")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--rooms", nargs="+", default=ROOMS, choices=ROOMS, help="rooms to mutate")
    parser.add_argument("--folder", type=Path, default=ROOT / "results" / "mutants", help="results, taken up again")
    parser.add_argument("--fresh", action="store_true", help="forget the results")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.folder, ignore_errors=True)
    session = Session(ROOT, options.rooms, options.folder, options.workers)
    tried = session.run(options.count, options.seed)
    listed = json.loads((ROOT / "tests" / "mutants.json").read_text())["equivalent"]
    sys.exit(0 if report(session, tried, listed) >= LEAST else 1)


if __name__ == "__main__":
    main()
