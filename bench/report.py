"""The README's CPU tables and the plots, from the CSVs that ``bench/run.py`` and ``bench/memory.py`` write.

python bench/report.py            # writes bench/results/cpu_ratios.png, cpu_roofline.png and README.md's tables
python bench/report.py --check    # exit status 1 if the README's tables are not what the CSVs give; writes nothing

Of each measurement the last one counts. Without ``<name>_memory.csv`` beside the CSV its table stays as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gpu_results import write_atomically
from readme_table import MARKERS, MEMORY_MARKERS, between, memory_table, table_of, with_table
from table import latest, read

ROOT = Path(__file__).resolve().parent.parent


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=ROOT / "bench" / "results" / "cpu.csv", help="of bench/run.py")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="with the markers")
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
    tables = [(MARKERS, table, options.csv)]
    memory = options.csv.with_name(f"{options.csv.stem}_memory.csv")
    if memory.is_file():
        tables.append((MEMORY_MARKERS, memory_table(latest(read(memory))), memory))
    for markers, _, _ in tables:
        if between(readme, markers) is None:
            print(f"{options.readme} needs the lines {markers[0]} and {markers[1]}, in this order", file=sys.stderr)
            return 1
    if options.check:
        differing = [source for markers, table, source in tables if between(readme, markers) != table]
        for source in differing:
            print(f"{options.readme}: the table differs from {source}; run python bench/report.py", file=sys.stderr)
        return int(bool(differing))
    from plots import ratios, roofline

    written = [options.readme]
    for name, draw in (("ratios", ratios), ("roofline", roofline)):
        path = options.csv.with_name(f"{options.csv.stem}_{name}.png")
        if draw(rows, path):
            written.append(path)
    for markers, table, _ in tables:
        readme = with_table(readme, table, markers)
    write_atomically(options.readme, readme)
    print("\n".join(str(path) for path in written))
    return 0


def _relative(path: Path, to: Path) -> Path:
    path, to = path.resolve(), to.resolve()
    return path.relative_to(to) if path.is_relative_to(to) else path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
