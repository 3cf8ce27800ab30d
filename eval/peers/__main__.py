"""``python -m eval.peers``: run the jobs that are still missing, then write table and chart."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from compress.errors import CompressError
from eval.peers.environment import HOME
from eval.peers.jobs import PEERS, PRUNING, RECIPES, TOOLKITS, Setting, Text, jobs
from eval.peers.measure import Row, known, nll, read, run
from eval.peers.summary import chart, markdown, summarize


def main() -> None:
    options = _options()
    text = Text(options.data, options.samples, options.length, options.held_out)
    settings = [Setting(bits, options.group) for bits in options.bits]
    settings += [s for s in PRUNING if options.prune]
    methods, missing = known([*RECIPES, *PEERS])
    if missing:
        _say(f"not there, left out: {', '.join(missing)}")
    methods = [m for m in methods if not options.toolkits or m.toolkit in options.toolkits]
    methods = [m for m in methods if not options.methods or m.name in options.methods]
    wanted = list(
        jobs(methods, settings, options.seeds, model=options.model, text=text,
             threads=options.threads)
    )  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    rows = {row.job.key: row for row in read(file)}
    for number, job in enumerate(wanted, start=1):
        if job.key in rows and not _again(rows[job.key], options):
            continue
        start = time.perf_counter()
        _say(f"[{number}/{len(wanted)}] {job.label} …")
        try:
            row = run(job, options.home)
        except CompressError as error:
            row = Row(job, error=str(error))
        rows[job.key] = row
        with file.open("a") as stream:
            stream.write(row.line() + "\n")
        _say(f"    {row.error or f'{time.perf_counter() - start:.0f} s'}")
    alike = [
        row
        for row in rows.values()
        if (row.job.model, row.job.text, row.job.threads) == (options.model, text, options.threads)
    ]
    found = summarize(alike, nll(options.model, text))
    table = markdown(found)
    (options.out / "peers.md").write_text(table)
    (options.out / "peers.png").write_bytes(chart(found))
    print(table)
    for row in alike:
        if row.error:
            _say(f"failed: {row.job.label}: {row.error}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.peers", description=__doc__)
    add = parser.add_argument
    add("--model", default="demo", help="demo, or a folder")
    add("--data", default="demo", help="the text, as in a recipe")
    add("--bits", type=int, nargs="*", default=[4, 3, 2])
    add("--group", type=lambda g: None if g == "channel" else int(g), default=64,
        help="inputs that share a scale, or channel")  # fmt: skip
    add("--prune", action="store_true", help="pruning at 50%%, 2:4 and 70%% as well")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--toolkits", nargs="+", choices=TOOLKITS)
    add("--methods", nargs="+", choices=sorted({m.name for m in (*RECIPES, *PEERS)}),
        metavar="NAME", help="by their names in the table, e.g. gptq")  # fmt: skip
    add("--samples", type=int, default=128, help="windows of calibration text")
    add("--length", type=int, default=256, help="tokens of a window")
    add("--held-out", type=int, default=128, help="windows to measure on")
    add("--threads", type=int, default=1)
    add("--home", type=Path, default=HOME, help="where the toolkits' environments are made")
    add("--out", type=Path, default=Path("runs/peers"))
    add("--redo", nargs="*", default=[], help="toolkits to run again")
    add("--retry", action="store_true", help="run again what failed")
    return parser.parse_args()


def _again(row: Row, options: argparse.Namespace) -> bool:
    return row.job.method.toolkit in options.redo or (options.retry and bool(row.error))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
