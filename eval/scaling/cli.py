"""``compress fit``: the laws in tables for people, or as one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from compress.sizes import parse_size

if TYPE_CHECKING:
    from eval.scaling.study import Study


def fit(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR…", help="Evaluated checkpoint folders, their originals too."),
    ],
    ladder: Annotated[
        Path | None, typer.Option(help="Rows of dense models; default: the demo model's.")
    ] = None,
    predict: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="e.g. bits=3,group=64")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="What is best within 30% or 500KB of weights?")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Draw it: an .html or .png file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No tables.")] = False,
) -> None:
    """Fit scaling laws: what checkpoints are worth in parameters, what others would lose.

    [bold]compress fit runs/bits/*/ --predict bits=7 --size 35%[/]
    """
    from eval.scaling.predict import answers
    from eval.scaling.study import study

    found = study([Path(f) for f in folders if not Path(f).is_file()], ladder=ladder)
    asked = [answer for text in predict or [] for answer in answers(found, text)]
    fitting, mixes = _within(found, size) if size else ([], [])
    if out is not None:
        from eval.scaling.figure import draw

        draw(found, out)
    records = [
        *_curve(found), *_equivalents(found), *_laws(found), *_held_out(found),
        *({"kind": "prediction", **_prediction(answer.loss), "nll": answer.nll,
           "nll_low": answer.low, "nll_high": answer.high} for answer in asked),
        *({"kind": "best", "size": size, **_prediction(choice.prediction), "bytes": choice.size}
          for choice in fitting),
        *({"kind": "best_bits", "size": size, **vars(mix)} for mix in mixes),
    ]  # fmt: skip
    if as_json:
        for record in records:
            print(json.dumps(record))
    elif not quiet:
        _show(records, found.notes)


def _within(found: Study, size: str) -> tuple[list[Any], list[Any]]:
    from compress.errors import DataError
    from eval.scaling.budget import best, best_bits
    from eval.scaling.ladder import parameters

    if not found.compressed:
        raise DataError(f"--size {size}: there is no compressed checkpoint among the folders")
    originals = {parameters(item.original): item.original for item in found.compressed}
    N, original = max(originals.items())
    budget = parse_size(size, original.size or 0)
    mixes = []
    for law in found.laws if found.ladder else ():
        mixes += best_bits(law, found.ladder.curve, budget)  # type: ignore[union-attr]
    return best(found.laws, budget, N), sorted(mixes, key=lambda mix: mix.nll)


def _curve(found: Study) -> list[dict[str, Any]]:
    import numpy as np

    from eval.scaling.law import Law

    if found.ladder is None:
        return []
    ladder, curve = found.ladder, found.ladder.curve
    sizes = sorted({rung.parameters for rung in ladder.rungs})
    record: dict[str, Any] = {
        "kind": "curve", "ladder": ladder.source, "sizes": sizes, "tokens": ladder.tokens,
        "form": "interpolation",
    }  # fmt: skip
    if ladder.undertrained:
        record["undertrained"] = [rung.parameters for rung in ladder.undertrained]
    if isinstance(curve, Law):
        record |= {"form": "E + A/N^alpha", "E": curve.E, "A": curve.A, "alpha": curve.alpha}
        for name, column in zip(("E", "A", "alpha"), curve.draws.T, strict=True):
            record |= {f"{name}_95": [float(x) for x in np.percentile(column, [2.5, 97.5])]}
    held = ladder.held_out()
    if held:
        rung, nll, low, high = held
        record["held_out"] = {
            "parameters": rung.parameters, "nll": rung.nll, "predicted": nll,
            "low": low, "high": high, "error": nll - rung.nll,
        }  # fmt: skip
    return [record]


def _equivalents(found: Study) -> list[dict[str, Any]]:
    records = []
    for item in found.compressed:
        record = {
            "kind": "equivalent", "checkpoint": str(item.checkpoint.folder),
            "name": item.checkpoint.name, "delta": item.delta, "delta_stderr": item.stderr,
            "bytes": item.checkpoint.size, "bytes_share": item.size_share,
        }  # fmt: skip
        worth = item.equivalent
        if worth is not None:
            record |= {
                "original": worth.original, "parameters": worth.parameters,
                "stderr": worth.stderr, "low": worth.low, "high": worth.high,
                "share": worth.share, "text": worth.text,
            }  # fmt: skip
        records.append(record)
    return sorted(records, key=lambda record: record["delta"])


def _laws(found: Study) -> list[dict[str, Any]]:
    import numpy as np

    records = []
    for law in found.laws:
        record: dict[str, Any] = {
            "kind": "degradation", "method": law.method, "setting": law.setting,
            "form": law.form, "scatter": law.scatter, "checkpoints": len(law.losses),
            "within_noise": len(law.unseen), "from": law.settings[0], "to": law.settings[1],
        }  # fmt: skip
        ends = np.percentile(law.draws, [2.5, 97.5], axis=0).T
        for name, value, interval in zip(law.names, law.coefficients, ends, strict=True):
            record |= {name: float(value), f"{name}_95": [float(x) for x in interval]}
        records.append(record)
    return records


def _held_out(found: Study) -> list[dict[str, Any]]:
    return [
        {"kind": "held_out", "name": held.loss.name, **_prediction(held.prediction),
         "measured": held.loss.delta, "measured_stderr": held.loss.stderr}
        for held in found.held_out
    ]  # fmt: skip


def _prediction(found: Any) -> dict[str, Any]:
    return {
        "method": found.method, found.setting: found.value, "setting": found.setting,
        "group": found.group, "parameters": found.parameters, "delta": found.delta,
        "low": found.low, "high": found.high,
    }  # fmt: skip


def _show(records: list[dict[str, Any]], notes: list[str]) -> None:
    """The same records as tables."""
    console = Console(highlight=False)
    console.width = max(console.width, 100)  # a law on one line, in a log too
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)
    for record in by_kind.get("curve", []):
        _show_curve(console, record)
    for kind, (title, headings, cells) in TABLES.items():
        if kind in by_kind:
            table = Table(*headings, title=title, title_justify="left", title_style="bold",
                          box=None, pad_edge=False, header_style="dim")  # fmt: skip
            for column in table.columns[1:]:
                column.justify = "right"
            for record in by_kind[kind]:
                table.add_row(*cells(record))
            console.print()
            console.print(table)
    for note in notes:
        console.print(f"[yellow]note[/] {note}", soft_wrap=True)


def _show_curve(console: Console, record: dict[str, Any]) -> None:
    from eval.scaling.equivalent import count

    sizes = record["sizes"]
    tokens = f", {count(record['tokens'])} tokens each" if record["tokens"] else ""
    console.print(
        f"[bold]Dense ladder[/] {record['ladder']}: {len(sizes)} sizes, "
        f"{count(sizes[0])} to {count(sizes[-1])} parameters{tokens}"
    )
    if "undertrained" in record:
        left = " and ".join(map(count, record["undertrained"]))
        console.print(f"left out: {left}, no better than smaller ones; they read too few tokens")
    if "alpha" in record:
        ends = {name: "{:.3g} to {:.3g}".format(*record[f"{name}_95"]) for name in ("E", "alpha")}
        console.print(
            f"L(N) = {record['E']:.3g} + {record['A']:.3g} / N^{record['alpha']:.3f}   "
            f"(95%: E {ends['E']}, α {ends['alpha']})"
        )
    held = record.get("held_out")
    if held:
        console.print(
            f"held out {count(held['parameters'])}: predicted {held['predicted']:.4f} "
            f"({held['low']:.4f} to {held['high']:.4f}), measured {held['nll']:.4f}, "
            f"error {held['error']:+.4f} nats/token"
        )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _range(record: dict[str, Any], low: str = "low", high: str = "high", digits: int = 3) -> str:
    return f"{record[low]:.{digits}g} to {record[high]:.{digits}g}"


def _worth(record: dict[str, Any]) -> list[str]:
    from eval.scaling.equivalent import count

    loss = f"{record['delta']:+.4f} ± {record['delta_stderr']:.4f}"
    if "text" not in record:
        return [record["name"], loss, "–", "–", "–", _share(record["bytes_share"])]
    ends = f"{count(record['low'])} to {count(record['high'])}"
    return [record["name"], loss, record["text"], ends if record["stderr"] else "–",
            _share(record["share"]), _share(record["bytes_share"])]  # fmt: skip


def _law(record: dict[str, Any]) -> list[str]:
    x, rest = {"bits": ("b", ""), "sparsity": ("s", "(1−s)"), "ratio": ("(1−r)", "r")}[
        record["setting"]
    ]
    form = {"steps": "ln(2^b−1)", "power": f"ln {x}", "odds": f"ln({x}/{rest})"}
    sign = "−" if record["setting"] == "bits" else "+"
    text = f"{record['c']:.3g} {sign} {record['p']:.3g}·{form.get(record['form'], x)}"
    text += f" + {record['g']:.2g}·ln group" if "g" in record else ""
    text += f" − {record['a']:.2g}·ln N" if "a" in record else ""
    checkpoints = str(record["checkpoints"])
    if record["within_noise"]:
        checkpoints += f" (+{record['within_noise']} within noise)"
    return [record["method"], text.replace("+ -", "− ").replace("− -", "+ "),
            _range(record, "from", "to"), checkpoints,
            f"×{2.718281828 ** record['scatter']:.2f}"]  # fmt: skip


def _setting(record: dict[str, Any]) -> str:
    group = f" group={record['group']:g}" if record["group"] > 1 else ""
    return f"{record['method']} {record['setting']}={record[record['setting']]:g}{group}"


def _mega(value: float) -> str:
    from eval.chart import bytes_text

    return bytes_text(value)


def _mix(record: dict[str, Any]) -> list[str]:
    from eval.scaling.equivalent import count

    return [f"{record['bits']:g}", count(record["parameters"]), f"{record['nll']:.4f}",
            _range(record, digits=4)]  # fmt: skip


TABLES: dict[str, tuple[str, tuple[str, ...], Any]] = {
    "equivalent": (
        "Worth a dense model of",
        ("checkpoint", "Δ nll", "parameters", "95%", "of itself", "for its bytes"), _worth),
    "degradation": (
        "Degradation laws: ln Δ nll",
        ("method", "law", "settings", "checkpoints", "scatter"), _law),
    "held_out": (
        "Held out: a third of the checkpoints, predicted by the laws of the others",
        ("checkpoint", "predicted Δ", "95%", "measured", "ratio"),
        lambda r: [r["name"], f"{r['delta']:.4f}", _range(r), f"{r['measured']:.4f}",
                   f"{r['delta'] / r['measured']:.2f}"]),
    "prediction": (
        "Predicted", ("setting", "Δ nll", "95%", "nll", "95%"),
        lambda r: [_setting(r), f"{r['delta']:.4f}", _range(r), f"{r['nll']:.4f}",
                   _range(r, "nll_low", "nll_high", 4)]),
    "best": (
        "Best within the budget, by the laws", ("setting", "bytes", "Δ nll", "95%"),
        lambda r: [_setting(r), _mega(r["bytes"]), f"{r['delta']:.4f}", _range(r)]),
    "best_bits": (
        "Bits and size for the same bytes, the best first",
        ("bits a weight", "parameters", "nll", "95%"), _mix),
}  # fmt: skip
