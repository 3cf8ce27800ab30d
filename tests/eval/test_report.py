"""The report of a family of made-up checkpoints: what it says, that it stands alone, that it works.

The numbers are drawn, but ordered as real ones are: 8 bits cost nothing, 2 bits ruin the model.
"""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from compress.errors import CheckpointError, DataError
from eval.chart import WIDTH, Point, bytes_text, pareto, specification
from eval.labels import place
from eval.measured import read_checkpoint
from eval.report import write_report
from eval.results import Part, Result, write
from eval.table import gap, number, plus_minus, share

ORIGINAL = 2_892_912
ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WINDOWS = 64
TEXT = {"name": "demo", "part": "evaluation", "hash": "5be1c0ffee1234ab", "windows": WINDOWS,
        "length": 256}  # fmt: skip
FAMILIES = {"int8": "quantization", "nf4": "quantization", "rtn": "quantization",
            "magnitude": "pruning", "svd": "low-rank", "lora": "distillation",
            "distill": "distillation"}  # fmt: skip
VERSIONS = {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"}
PROMPT = "class Stack:\n    def __init__(self"
WRITTEN = ", items=None):\n        self.items = list(items or [])\n\n    def push(self, item):\n"
SAMPLE: dict[str, tuple[int, float, float, list[dict[str, Any]]]] = {
    "int8": (1_533_000, 0.0004, 0.012, [{"use": "int8"}]),
    "nf4": (930_000, 0.031, 0.07, [{"use": "nf4", "group": 64}]),
    "rtn-4": (905_000, 0.048, 0.09, [{"use": "rtn", "bits": 4, "group": 64, "symmetric": False}]),
    "rtn-2": (580_000, 5.2, 1.4, [{"use": "rtn", "bits": 2, "group": 64}]),
    "magnitude-50": (1_640_000, 0.41, 0.3, [{"use": "magnitude", "sparsity": 0.5}]),
    "svd-50": (1_720_000, 0.93, 0.45, [{"use": "svd", "ratio": 0.5}]),
    "svd-50-lora": (
        1_740_000, 0.22, 0.45, [{"use": "svd", "ratio": 0.5}, {"use": "lora", "rank": 8}]
    ),
    "half-width-distilled": (1_450_000, 0.12, 0.0, [{"use": "distill", "steps": 2000}]),
    "magnitude-50-rtn-4": (
        760_000, 0.52, 0.35, [{"use": "magnitude", "sparsity": 0.5}, {"use": "rtn", "bits": 4}]
    ),
}  # fmt: skip


def results(folder: Path, size: float, loss: float, base: list[float]) -> list[Result]:
    """All metrics of one checkpoint whose nll is ``loss`` above ``base``."""
    noise = random.Random(folder.name)
    spread = 0.0 if loss == 0 else 0.004 + 0.1 * loss
    samples = [value + loss + noise.gauss(0, spread) for value in base]
    nll = sum(samples) / len(samples)

    def row(metric: str, value: float | None, unit: str, **more: Any) -> Result:
        return Result(checkpoint=str(folder), metric=metric, value=value, unit=unit,
                      versions=VERSIONS, **more)  # fmt: skip

    cut = len(WRITTEN) if loss < 0.001 else noise.randrange(5, 40)
    text = {"prompt": PROMPT, "completion": WRITTEN[:cut] + WRITTEN[cut:][::-1]}
    prefill, decode = 5200 * noise.uniform(0.6, 1.1), 310 * noise.uniform(0.7, 1.6)
    right = [float(noise.random() < 0.8 - 0.3 * min(loss, 1)) for _ in range(WINDOWS)]
    sizes = [{"batch": batch, "prompt": 128, "median": 300.0 * batch, "low": 290.0 * batch,
              "high": 310.0 * batch, "ratio": 1.25} for batch in (1, 8)]  # fmt: skip
    return [
        row("nll", nll, "nats/token", stderr=0.03, samples=samples, data=TEXT,
            setup={"seed": 0, "weights": folder.name}, slices=halves(samples, loss)),
        row("task:demo_brackets", sum(right) / WINDOWS, "acc", stderr=0.05, samples=right,
            data={"name": "demo_brackets", "hash": "b4ac", "examples": WINDOWS},
            higher_is_better=True),
        row("perplexity", 2.718281828**nll, "perplexity", data=TEXT),
        row("bits_per_byte", nll / 2.4, "bits/byte", data=TEXT),
        row("kl", loss * 0.9, "nats/token", data=TEXT),
        row("top1_agreement", max(0.04, 1 - 0.35 * loss**0.5), "share", data=TEXT),
        row("size_bytes", size, "bytes"),
        row("bits_per_param", 8 * size / 1_438_208, "bits/parameter"),
        row("prefill_tokens_per_s", prefill, "tokens/s", detail={"ratio": prefill / 5200}),
        row("decode_tokens_per_s", decode, "tokens/s",
            detail={"ratio": decode / 310, "sizes": sizes}),
        row("generation", None, "share", detail={"texts": [text]}),
    ]  # fmt: skip


def halves(samples: list[float], loss: float) -> dict[str, dict[str, Part]]:
    """The windows' predictions, of which rare tokens pay 1.6 times the loss and common ones 0.4."""
    places = list(range(len(samples)))
    counts = [100.0] * len(samples)
    rare = [100 * (x + 0.6 * loss) for x in samples]
    common = [100 * (x - 0.6 * loss) for x in samples]
    return {
        "token frequency": {
            "≤ 30": Part(examples=places, sums=rare, counts=counts),
            "> 30": Part(examples=places, sums=common, counts=counts),
        }
    }


def record(name: str, size: float, error: float, stages: list[dict[str, Any]]) -> dict[str, Any]:
    """A ``compression.json``."""
    noise = random.Random(name)
    places = [(f"layers.{block}.{role}", role, block) for block in range(6) for role in ROLES]
    sites = [
        {"name": name, "role": role, "block": block, "shape": [128, 128], "stage": stage["use"],
         "kind": "quantized", "bytes": int(32768 * size / ORIGINAL), "bytes_before": 32768,
         "relative_error": error * noise.uniform(0.3, 1) if error else None}
        for stage in stages
        for name, role, block in [*places, ("embed_tokens", "embed", None)]
    ]  # fmt: skip
    return {
        "format": 1,
        "base": {"model": "demo", "hash": "ab12cd34", "bytes": 2876416, "parameters": 1438208},
        "seed": 0, "recipe": {"model": "demo", "seed": 0, "stages": stages}, "name": name,
        "sites": sites, "versions": VERSIONS | {"compresskit": "0.1.0"},
        "families": {stage["use"]: FAMILIES.get(stage["use"], "other") for stage in stages},
        "bytes": {"disk": size, "original": ORIGINAL, "ideal": size, "loaded": 2876416},
    }  # fmt: skip


def make(root: Path, name: str, *, title: str | None = None) -> Path:
    """The folder of one checkpoint of ``SAMPLE``, or of the plain original."""
    folder = root / name
    folder.mkdir(parents=True)
    rolls = random.Random(7)
    base = [rolls.gauss(2.1, 0.4) for _ in range(WINDOWS)]
    if name not in SAMPLE:
        (folder / "model.safetensors").write_bytes(bytes(ORIGINAL))
        rows = results(folder, ORIGINAL, 0.0, base)
        write(folder, [row for row in rows if row.metric != "size_bytes"])
        return folder
    size, loss, error, stages = SAMPLE[name]
    made = record(title or name, size, error, stages)
    (folder / "compression.json").write_text(json.dumps(made))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(made["recipe"], sort_keys=False))
    write(folder, results(folder, size, loss, base))
    return folder


def make_all(root: Path) -> list[Path]:
    """The original and everything made of it."""
    return [make(root, name) for name in ("pycoder-1m", *SAMPLE)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    out = root / "report.html"
    files = [root / f"report.{kind}" for kind in ("html", "md", "png", "csv")]
    assert write_report(make_all(root), out) == files
    return out


def test_a_wide_interval_does_not_make_the_headline(tmp_path: Path) -> None:
    """No measurable difference, only because of its noise: beaten by one as small, it is not it."""
    folders = [make(tmp_path, name) for name in ("pycoder-1m", "int8", "nf4")]
    noisy = make(tmp_path / "other", "nf4", title="noisy")
    rolls = random.Random(7)
    base = [rolls.gauss(2.1, 0.4) for _ in range(WINDOWS)]
    samples = [value + (0.55 if i % 2 else -0.45) for i, value in enumerate(base)]
    rows = {row.metric: row for row in results(noisy, 930_000, 0.2, base)}
    change = {"samples": samples, "value": sum(samples) / WINDOWS, "slices": {}}
    rows["nll"] = rows["nll"].model_copy(update=change)
    (noisy / "results.jsonl").unlink()
    write(noisy, list(rows.values()))

    def headline(*shown: Path) -> str:
        page = write_report(shown, tmp_path / "report.html")[0].read_text()
        found = re.search(r"<h1[^>]*>(.*?)</h1>", page, re.S)
        assert found is not None
        return found[1]

    assert "noisy" in headline(*folders[:2], noisy)
    assert "noisy" not in headline(*folders, noisy)


def test_chains_are_joined_to_what_they_go_on_from(report: Path, tmp_path: Path) -> None:
    rows = {row.name: row for row in map(read_checkpoint, make_all(tmp_path))}
    joined = {(a, b) for a in rows for b in rows if rows[a].continues(rows[b])}
    assert ("svd-50-lora", "svd-50") in joined
    assert ("magnitude-50-rtn-4", "magnitude-50") in joined
    assert len(joined) == 2
    page = report.read_text()
    assert page.count('"from_size"') >= 2
    assert "A dashed line leads" in page


@pytest.fixture(autouse=True)
def one_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chart at every width takes seconds; the shared ``report`` has them all."""
    monkeypatch.setattr("eval.report.WIDTHS", (WIDTH,))


def test_the_page_refers_to_nothing_outside(report: Path) -> None:
    text = report.read_text()
    page = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert text.count("<script>") == text.count("</script>") == 2
    assert "<link" not in page
    assert "@import" not in text
    assert not re.search(r"""\b(src|href)\s*=\s*["']?https?:""", text)
    assert not re.search(r"url\(\s*[\"']?https?:", text)


def test_page_and_markdown_name_every_checkpoint(report: Path) -> None:
    page, markdown = report.read_text(), report.with_suffix(".md").read_text()
    specs = json.loads(re.search(r"const specs = (.*);\n", page)[1])  # type: ignore[index]
    for name in ("pycoder-1m", *SAMPLE):
        assert f"<b>{name}</b>" in page
        assert f"| {name} |" in markdown
        for scheme in specs.values():
            for spec in scheme.values():
                (row,) = [row for row in spec["data"]["values"] if row["name"] == name]
                assert row["size"] == (SAMPLE[name][0] if name in SAMPLE else ORIGINAL)


def test_the_story_is_told_from_the_data(report: Path) -> None:
    page = report.read_text()
    assert "int8 takes 53% of the original’s bytes, with no measurable difference in nll." in page
    assert re.search(r"Best within half the bytes\s+<b>nf4</b>", page)
    assert "healed low-rank" in page
    assert "svd ratio=0.5 → lora rank=8" in page
    assert "compress apply" in page
    assert "--data demo" in page
    assert "hash 5be1c0ffee1234ab" in page
    assert "torch 2.13.0" in page
    assert "Peak memory" not in page  # no checkpoint has it


def test_markdown_is_complete(report: Path) -> None:
    markdown = report.with_suffix(".md").read_text()
    assert "![Quality against size](report.png)" in markdown
    tables: list[list[str]] = [[]]
    for line in markdown.splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    numbers, tasks, slices, *_ = tables
    assert len(numbers) == len(tasks) == 2 + 1 + len(SAMPLE)
    assert len(slices) == 2 + len(SAMPLE)
    for table in (numbers, tasks, slices):
        assert {line.count("|") for line in table} == {table[0].count("|")}
    assert "```yaml\nmodel: demo" in markdown
    assert report.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_slices_and_tasks_are_told(report: Path) -> None:
    page = report.read_text()
    assert re.search(r"<b>svd-50</b>.*?token frequency ≤ 30: \+1\.4\d", page, re.DOTALL)
    assert page.count("none stands out") <= 3
    assert 'class="worst"' in page
    assert re.search(r"<button[^>]*>demo_brackets</button><small>acc, 64 examples</small>", page)
    assert "would settle it" in page
    assert "write, batch 8, prompt 128" in page
    assert '<button type="button">task:demo_brackets' not in page  # said once


def test_csv_has_every_number(report: Path) -> None:
    with report.with_suffix(".csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    of = {(line["checkpoint"], line["metric"], line["slice"]): line for line in lines}
    assert float(of["rtn-4", "size_bytes", ""]["value"]) == SAMPLE["rtn-4"][0]
    whole, rare = of["rtn-4", "nll", ""], of["rtn-4", "nll", "≤ 30"]
    assert float(whole["difference"]) == pytest.approx(0.048, abs=0.01)
    assert whole["verdict"] == rare["verdict"] == "worse"
    assert float(rare["difference"]) > float(whole["difference"])
    assert (rare["column"], whole["column"]) == ("token frequency", "")
    assert of["pycoder-1m", "nll", ""]["difference"] == ""
    assert of["int8", "nll", ""]["needed"]
    assert {line["metric"] for line in lines} >= {"task:demo_brackets", "kl", "perplexity"}


def test_a_classifier_is_charted_by_its_accuracy(tmp_path: Path) -> None:
    folders = [make(tmp_path, name) for name in ("pycoder-1m", "int8", "nf4")]
    for folder in folders:
        path = folder / "results.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [row for row in rows if row["metric"] in ("task:demo_brackets", "size_bytes")]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    page, *_ = write_report(folders, tmp_path / "report.html")
    assert "task:demo_brackets minus the original" in page.read_text()
    assert "--dataset" not in page.read_text()
    assert "Higher is better" in page.read_text()


def test_missing_results_say_what_to_run(tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    with pytest.raises(
        CheckpointError, match=r"bare: no results; run `compress eval .*bare` first"
    ):
        write_report([folder], tmp_path / "report.html")
    with pytest.raises(CheckpointError, match=r"demo: no such folder, .* `dense: \[\]`, makes one"):
        write_report([Path("demo")], tmp_path / "report.html")
    assert not list(tmp_path.glob("report.*"))


def test_results_without_quality_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path, "int8")
    (folder / "results.jsonl").unlink()
    write(folder, [Result(checkpoint="int8", metric="size_bytes", value=9, unit="bytes")])
    with pytest.raises(CheckpointError, match="no checkpoint has a quality to chart"):
        write_report([folder], tmp_path / "report.html")


def test_out_must_be_html(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"must end in \.html"):
        write_report([make(tmp_path, "int8")], tmp_path / "report.pdf")


def test_a_hostile_name_stays_text(tmp_path: Path) -> None:
    name = "</script><img src=x onerror=alert(1)>|`*"
    folders = [make(tmp_path, "pycoder-1m"), make(tmp_path, "int8", title=name)]
    page, markdown, *_ = write_report(folders, tmp_path / "report.html")
    assert "<img src=x" not in page.read_text()
    assert page.read_text().count("</script>") == 2
    assert "<img" not in markdown.read_text().replace("\\<", "")


def test_a_baseline_outside_the_folders_is_added(tmp_path: Path) -> None:
    folders = [make(tmp_path, "rtn-4"), make(tmp_path, "nf4")]
    base = make(tmp_path, "svd-50")
    page, *_ = write_report(folders, tmp_path / "report.html", baseline=base)
    assert "Differences are to svd-50" in page.read_text()


def test_a_single_checkpoint_is_a_report_too(tmp_path: Path) -> None:
    page, *_ = write_report([make(tmp_path, "int8")], tmp_path / "report.html")
    assert "None of these checkpoints is smaller than int8." in page.read_text()


def test_other_text_is_not_compared(tmp_path: Path) -> None:
    folders = [make(tmp_path, name) for name in ("pycoder-1m", "int8", "nf4")]
    path = folders[2] / "results.jsonl"
    path.write_text(path.read_text().replace("5be1c0ffee1234ab", "0ther"))
    page, *_ = write_report(folders, tmp_path / "report.html")
    assert re.search(r"Not in the chart: .*nf4.* measured on different text", page.read_text())


def test_ruined_and_foreign_metrics_are_shown(tmp_path: Path) -> None:
    folders = [make(tmp_path, name) for name in ("pycoder-1m", "int8", "rtn-2")]
    broken = Result(checkpoint="rtn-2", metric="nll", value=float("nan"), unit="nats/token")
    own = Result(checkpoint="int8", metric="carbon", value=12.5, unit="grams")
    write(folders[1], [own])
    with (folders[2] / "results.jsonl").open("a") as file:
        file.write(json.dumps(broken.model_dump()) + "\n")
    page, *_ = write_report(folders, tmp_path / "report.html")
    text = page.read_text()
    assert "not a number" in text
    assert "Not in the chart: rtn-2" in text
    assert re.search(r'title="grams"><button type="button">carbon<', text)


def test_higher_can_be_better(tmp_path: Path) -> None:
    folders = [make(tmp_path, name) for name in ("pycoder-1m", "int8", "nf4", "rtn-2")]
    page, *_ = write_report(folders, tmp_path / "report.html", metric="top1_agreement")
    assert "Higher is better" in page.read_text()
    assert "Δ top1_agreement" in page.read_text()


@pytest.mark.parametrize(
    ("uses", "family"),
    [
        ([], "original"),
        (["rtn"], "quantization"),
        (["svd", "lora"], "healed low-rank"),
        (["lora", "distill"], "distillation"),
        (["magnitude", "rtn", "lora"], "chain"),
        (["wishful"], "other"),
    ],
)
def test_families(tmp_path: Path, uses: list[str], family: str) -> None:
    folder = make(tmp_path, "int8")
    stages = [{"use": use} for use in uses]
    made = record("int8", 1.0, 0.1, stages)
    (folder / "compression.json").write_text(json.dumps(made))
    assert read_checkpoint(folder).family == family


def test_the_last_record_of_a_site_counts(tmp_path: Path) -> None:
    folder = make(tmp_path, "int8")
    site = {"name": "q", "role": "q_proj", "block": 0}
    first = site | {"bytes": 50, "bytes_before": 100, "relative_error": 0.5}
    last = site | {"bytes": 20, "bytes_before": 50, "relative_error": 0.25}
    (folder / "compression.json").write_text(json.dumps({"sites": [first, last]}))
    checkpoint = read_checkpoint(folder)
    assert checkpoint.final_sites == [last | {"bytes_before": 100}]
    assert checkpoint.relative_error_max == 0.25


def test_same_names_are_told_apart(tmp_path: Path) -> None:
    folders = [make(tmp_path / "a", "int8"), make(tmp_path / "b", "int8")]
    page, *_ = write_report(folders, tmp_path / "report.html")
    assert all(f"<b>{folder}</b>" in page.read_text() for folder in folders)


def test_gap_without_samples_is_not_paired() -> None:
    a = Result(checkpoint="a", metric="perplexity", value=8.5, stderr=0.2, unit="perplexity")
    b = a.model_copy(update={"checkpoint": "b", "value": 8.0})
    assert (gap(a, b).mean, gap(a, b).stderr, gap(a, b).verdict) == (0.5, 0.2, "")
    with pytest.raises(DataError, match="other text"):
        gap(a, b.model_copy(update={"data": {"hash": "x"}}))


def test_numbers_as_people_write_them() -> None:
    assert [bytes_text(n) for n in (12, 999.7, 1_234_000, 15e9)] == [
        "12 bytes", "1 kB", "1.23 MB", "15 GB",
    ]  # fmt: skip
    assert plus_minus(0.04812, 0.00143) == "+0.0481 ± 0.0014"
    assert plus_minus(-0.3, 0.0) == "−0.3"
    assert [share(v) for v in (0.533, 0.99987, 1.0)] == ["53.3%", ">99.9%", "100%"]
    assert [number(v) for v in (1472.3, 7.974, float("inf"))] == ["1,472", "7.974", "∞"]


def points() -> list[Point]:
    names = [*SAMPLE, "original"]
    sizes = [*(SAMPLE[name][0] for name in SAMPLE), ORIGINAL]
    losses = [*(SAMPLE[name][1] for name in SAMPLE), 0.0]
    return [
        Point(name, "quantization", size, loss, 0.01 * loss, {})
        for name, size, loss in zip(names, sizes, losses, strict=True)
    ]


def test_pareto_against_the_definition() -> None:
    every = points()
    best = {
        p.name
        for p in every
        if not any(q.size <= p.size and q.difference <= p.difference and q is not p for q in every)
    }
    assert {p.name for p in pareto(every)} == best
    assert [p.size for p in pareto(every)] == sorted(p.size for p in pareto(every))


@pytest.mark.parametrize("width", [280, 400, 1000])
def test_names_cover_neither_each_other_nor_points(width: int) -> None:
    every = points()
    spec = specification(every, title=["a", "b"], reference_size=ORIGINAL, width=width)
    assert sum("align" in row for row in spec["data"]["values"]) >= len(every) - 1


def test_places_do_not_overlap() -> None:
    spots = [(50.0, 50.0), (60.0, 52.0), (55.0, 60.0), (190.0, 50.0)]
    texts = ["first", "second", "third", "at the edge"]
    chosen = place(spots, texts, [], 200, 100)
    boxes = [p.box(*s, t) for p, s, t in zip(chosen, spots, texts, strict=True) if p]
    assert len(boxes) == 4
    assert not any(a.overlap(b) for a in boxes for b in boxes if a is not b)
    assert all(box.left >= 0 and box.right <= 200 for box in boxes)


CHROMIUM = shutil.which("chromium")


def chromium(page: Path, profile: Path, *options: str) -> tuple[str, str]:
    """What it prints, and what it logs: the console of the page among it."""
    assert CHROMIUM
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--disable-quic", "--enable-logging=stderr", "--virtual-time-budget=5000",
               f"--user-data-dir={profile}", *options, page.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


WATCH = """<script>
  window.wrong = [];
  addEventListener("error", event => wrong.push(event.message));
  addEventListener("unhandledrejection", event => wrong.push(String(event.reason)));
  for (const kind of ["error", "warn"]) console[kind] = (...said) => wrong.push(said.join(" "));
</script>"""
USE = """<script>
  const said = {}, table = document.getElementById("checkpoints");
  const keys = column => [...table.tBodies[0].rows].map(row => row.cells[column].dataset.sort);
  const size = [...table.querySelectorAll("thead button")].find(b => b.textContent === "Size");
  size.focus();
  said.focused = document.activeElement === size;
  size.click();
  said.up = keys(1);
  size.click();
  said.down = keys(1);
  for (const other of document.querySelectorAll("table.sortable"))
    for (const button of other.querySelectorAll("thead button")) button.click();
  document.querySelector(".slices thead tr:last-child button").click();
  said.names = [...document.querySelector(".slices tbody").rows].map(row => row.cells[0].innerText);
  size.click();
  setTimeout(() => {
    const point = [...document.querySelectorAll("#chart path")]
      .find(path => (path.getAttribute("aria-label") ?? "").startsWith("rtn-4:"));
    const box = point.getBoundingClientRect();
    const at = {bubbles: true, clientX: box.x + 2, clientY: box.y + 2};
    for (const kind of ["pointerover", "mouseover", "pointermove", "mousemove"])
      point.dispatchEvent(new (kind[0] === "p" ? PointerEvent : MouseEvent)(kind, at));
    setTimeout(() => {
      const tip = document.getElementById("tip");
      said.tip = tip.hidden ? "" : tip.innerText;
      said.fetched = performance.getEntriesByType("resource").map(entry => entry.name);
      said.wide = document.documentElement.scrollWidth > innerWidth;
      said.wrong = wrong;
      document.body.dataset.said = encodeURIComponent(JSON.stringify(said));
    }, 200);
  }, 2000);
</script></body>"""


def used(report: Path, tmp_path: Path, *options: str) -> tuple[str, dict[str, Any], str]:
    """The page after it was clicked and hovered: its DOM, what it said, and the log."""
    page = tmp_path / "used.html"
    text = report.read_text().replace("<head>", "<head>" + WATCH, 1)
    page.write_text(text.replace("</body>\n</html>", USE + "</html>"))
    dom, log = chromium(page, tmp_path / "profile", "--dump-dom", *options)
    said = re.search(r'data-said="([^"]*)"', dom)
    assert said, log
    return dom, json.loads(unquote(said[1])), log


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_works_in_a_browser(report: Path, tmp_path: Path) -> None:
    dom, said, log = used(report, tmp_path, "--window-size=1280,2400")
    assert said["wrong"] == said["fetched"] == []
    assert "CONSOLE" not in log
    assert not re.findall(r"https?://", log)
    for name in ("pycoder-1m", *SAMPLE):
        assert re.search(rf'<path aria-label="{name}: [^"]*Size', dom), name
        assert re.search(rf"<text[^>]*>{name}</text>", dom), name
    up, down = ([float(value) for value in said[way]] for way in ("up", "down"))
    assert up == sorted(up) == down[::-1]
    assert said["focused"] is True
    assert re.search(r'<th[^>]*aria-sort="\w+"[^>]*><button type="button">Size', dom)
    assert said["names"] == sorted(SAMPLE)
    assert said["tip"].startswith("rtn-4")
    assert "Size" in said["tip"]
    assert said["wide"] is False
    picture = tmp_path / "page.png"
    chromium(report, tmp_path / "profile", "--window-size=1280,2400", f"--screenshot={picture}")
    assert picture.stat().st_size > 50_000


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_fits_a_phone_in_the_dark(report: Path, tmp_path: Path) -> None:
    dark = ["--window-size=500,900", "--blink-settings=preferredColorScheme=0"]
    dom, said, _ = used(report, tmp_path, *dark)
    assert said["wrong"] == []
    assert said["wide"] is False  # tables scroll within themselves
    assert re.search(r'<path aria-label="rtn-4: ', dom)
