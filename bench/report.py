"""The README's CPU table and the plots, from the CSV that ``bench/run.py`` writes: of each measurement the last.

python bench/report.py            # writes bench/results/cpu_ratios.png, cpu_roofline.png and README.md's table
python bench/report.py --check    # exit status 1 if the README's table is not what the CSV gives; writes nothing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_results import write_atomically
from readme_table import MARKERS, between, table_of, with_table
from table import latest, read

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "results" / "cpu.csv", help="of bench/run.py")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="with the two markers")
    parser.add_argument("--check", action="store_true", help="compare only")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    rows = latest(read(options.csv))
    if not rows:
        print(f"{options.csv} has no rows: run python bench/run.py first", file=sys.stderr)
        return 1
    readme = options.readme.read_text()
    plot = Path(f"{options.csv.stem}_ratios.png")
    table = table_of(rows, str(_relative(options.csv.with_name(plot.name), options.readme.parent)))
    if between(readme) is None:
        print(f"{options.readme} needs the lines {MARKERS[0]} and {MARKERS[1]}, in this order", file=sys.stderr)
        return 1
    if options.check:
        if between(readme) == table:
            return 0
        print(f"{options.readme}: the table differs from {options.csv}; run python bench/report.py", file=sys.stderr)
        return 1
    from plots import ratios, roofline

    written = [options.readme]
    for name, draw in (("ratios", ratios), ("roofline", roofline)):
        path = options.csv.with_name(f"{options.csv.stem}_{name}.png")
        if draw(rows, path):
            written.append(path)
    write_atomically(options.readme, with_table(readme, table))
    print("\n".join(str(path) for path in written))
    return 0


def _relative(path: Path, to: Path) -> Path:
    path, to = path.resolve(), to.resolve()
    return path.relative_to(to) if path.is_relative_to(to) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
