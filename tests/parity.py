"""Check pmvis against folders of reference outputs, one line a quantity.

    python tests/parity.py vis_eval --golden DIR

A folder is laid out like the golden one of the same kind; the kinds are the rows of `KINDS`, each
a module of this folder with ``check(golden)``, which yields (quantity, equal, detail). Exit code 1
if anything differs, 2 if there was nothing to check.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

KINDS = {
    "vis_eval": "evaluation: summaries, categories, curves, IoUs and matches with ==",
    "deaot": "AOT and DeAOT: weights by name, stages, logits, masks",
    "idol": "IDOL: names, every stage, losses, BoxInst, tracker, rows, whole clips",
    "rle": "masks: texts byte for byte, areas, boxes, merges, IoUs, polygons",
}


def main() -> int:
    """Run one kind of check and print its lines."""
    lines = "\n".join(f"  {name:<10} {what}" for name, what in KINDS.items())
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"kinds:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--golden", type=Path, required=True, metavar="DIR")
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    check = importlib.import_module(f"tests.parity_{options.kind}").check
    verdicts = []
    for quantity, equal, detail in check(options.golden):
        verdicts.append(equal)
        print(f"{'equal ' if equal else 'DIFFER'} {quantity}{f'  ({detail})' if detail else ''}")
    if not verdicts:
        print(f"nothing to check in `{options.golden}`", file=sys.stderr)
        return 2
    print(f"{sum(verdicts)} of {len(verdicts)} equal")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
