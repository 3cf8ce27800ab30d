"""Classifiers of text and of images: made, taught, compressed, and measured on a data set."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from tiny import BERT, GPT2, VIT, save
from torch import Tensor

import compress
from compress.errors import DataError, NotMeasurable, RecipeError
from eval.benchmarks.classifiers import SCRIPT
from eval.compare import paired
from eval.harness import evaluate
from eval.labelled import read
from eval.metrics.embedding import spearman
from eval.results import Result

WORDS = ("return", "import", "class")
Rows = dict[str, Result]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("scripts")
    for name in ("accuracy", "f1"):
        (folder / f"{name}.py").write_text(SCRIPT % name)
    return {name: f"evaluate:{folder / name}.py" for name in ("accuracy", "f1")}


def sentences(count: int, seed: int) -> list[dict[str, Any]]:
    """Which of three words is in a line; a tenth of the labels are wrong."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        kind = draw.randrange(3)
        line = ["x"] * draw.randint(1, 4) + [WORDS[kind]] + ["= 1"] * draw.randint(0, 3)
        label = kind if draw.random() < 0.9 else draw.randrange(3)
        rows.append({"line": " ".join(line), "kind": label, "source": f"s{i % 2}", "number": i})
    return rows


def pictures(count: int, seed: int) -> tuple[Tensor, list[int]]:
    """[count, 3, 32, 32] with one quarter brighter than the others."""
    noise = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 32, 32, generator=noise)
    labels = torch.randint(4, (count,), generator=noise).tolist()
    for image, label in zip(images, labels, strict=True):
        top, left = divmod(label, 2)
        image[:, 16 * top : 16 * top + 16, 16 * left : 16 * left + 16] += 1.5
    return images, labels


def relabelled(config: Any, classes: int) -> Any:
    """A copy of a configuration, for so many classes."""
    made = copy.deepcopy(config)
    made.num_labels = classes
    made.initializer_range = 0.1
    return made


def taught(folder: Path, step: Callable[[Any, int], Tensor], steps: int) -> None:
    """Train the model in ``folder`` for some steps, in place."""
    torch.manual_seed(0)
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, kind).from_pretrained(folder).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for number in range(steps):
        step(model, number).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A BERT-like classifier, itself with a twentieth of its weights, and rows to measure on."""
    root = tmp_path_factory.mktemp("text")
    config = relabelled(BERT, 3)
    model = Path(save(root / "bert", "BertForSequenceClassification", config))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token

    def step(model: Any, number: int) -> Tensor:
        rows = sentences(32, number)
        coded = tokenizer([row["line"] for row in rows], padding=True, return_tensors="pt")
        labels = torch.tensor([row["kind"] for row in rows])
        return model(coded["input_ids"], coded["attention_mask"], labels=labels).loss

    taught(model, step, 60)
    stages = [{"use": "magnitude", "sparsity": 0.95, "targets": ["all"]}]
    compress.apply({"stages": stages}, model=str(model), out=root / "sparse", verify=False)
    lines = root / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in sentences(80, 10_000)))
    return str(model), str(root / "sparse"), str(lines)


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """The same of a ViT, and pixel values that ``datasets`` saved."""
    root = tmp_path_factory.mktemp("vision")
    config = relabelled(VIT, 4)
    config.patch_size = 8
    model = Path(save(root / "vit", "ViTForImageClassification", config, tokenizer=False))

    def step(model: Any, number: int) -> Tensor:
        images, labels = pictures(32, number)
        return model(images, labels=torch.tensor(labels)).loss

    taught(model, step, 150)
    compress.apply({"stages": [{"use": "rtn", "bits": 2}]}, model=str(model), out=root / "2bit",
                   verify=False)  # fmt: skip
    images, labels = pictures(60, 10_000)
    rows = datasets.Dataset.from_dict({"pixel_values": images.tolist(), "label": labels})
    rows.save_to_disk(root / "rows")
    return str(model), str(root / "2bit"), str(root / "rows")


def rows(folder: str, metrics: list[str] | None, dataset: str, **options: Any) -> Rows:
    events = evaluate([folder], metrics, dataset=dataset, **options)
    return {row.metric: row for row in events if isinstance(row, Result)}


def both(model: str, small: str, *options: Any, **more: Any) -> tuple[Rows, Rows]:
    """The original compared with itself, and what was made of it."""
    return rows(model, *options, baseline=model, **more), rows(small, *options, **more)


COLUMNS = {"text": "line", "label": "kind"}


def test_a_text_classifier(text: tuple[str, str, str], scripts: dict[str, str]) -> None:
    model, small, lines = text
    metrics = ["accuracy", *scripts.values(), "kl", "top1_agreement", "size_bytes"]
    dense, compressed = both(model, small, metrics, lines, columns=COLUMNS)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    right = []
    for row in map(json.loads, Path(lines).read_text().splitlines()):
        with torch.no_grad():
            logits = loaded(**tokenizer(row["line"], return_tensors="pt")).logits
        right.append(float(logits.argmax() == row["kind"]))
    assert dense["accuracy"].samples == right
    assert dense["accuracy"].value == sum(right) / 80 > 0.8
    for found in (dense, compressed):
        row = found[scripts["accuracy"]]
        assert row.value == found["accuracy"].value
        assert row.samples == found["accuracy"].samples  # pseudo-values of a mean
        assert row.stderr == pytest.approx(found["accuracy"].stderr)
        assert row.higher_is_better is True
    assert compressed["accuracy"].value < dense["accuracy"].value  # type: ignore[operator]
    assert paired(compressed["accuracy"], dense["accuracy"]).verdict == "worse"
    assert paired(compressed[scripts["f1"]], dense[scripts["f1"]]).verdict == "worse"
    assert (compressed["kl"].value or 0) > 0
    assert compressed["top1_agreement"].value != 1
    slices = dense["accuracy"].slices
    assert set(slices) == {"source", "number", "kind", "letters"}
    halves = [slices["source"][f"s{i}"] for i in (0, 1)]
    assert [sum(part.sums) for part in halves] == [sum(right[0::2]), sum(right[1::2])]


def test_pseudo_values_give_f1_the_spread_of_other_samples(scripts: dict[str, str]) -> None:
    """The jackknife's standard error of a difference of F1, beside many fresh samples of rows."""
    from eval.metrics.huggingface import HuggingFaceMetric

    metric = HuggingFaceMetric(scripts["f1"] + "?of=0")
    assert metric.arguments == {"of": 0}
    script = metric._load()
    draw = random.Random(0)

    def f1(pairs: list[tuple[int, int]]) -> float:
        hits = sum(p == r == 0 for p, r in pairs)
        return 2 * hits / sum((p == 0) + (r == 0) for p, r in pairs)

    def sample() -> list[tuple[int, int]]:
        truth = [draw.randrange(2) for _ in range(60)]
        return [(r if draw.random() < 0.8 else 1 - r, r) for r in truth]

    assert script.compute(predictions=[0, 0, 1], references=[0, 1, 1], of=0)["f1"] == f1(
        [(0, 0), (0, 1), (1, 1)]
    )
    seen = torch.tensor([f1(sample()) for _ in range(2000)]).std().item()
    claimed = []
    for _ in range(40):
        pairs = sample()
        whole = f1(pairs)
        values = [60 * whole - 59 * f1(pairs[:i] + pairs[i + 1 :]) for i in range(60)]
        claimed.append(torch.tensor(values).std().item() / 60**0.5)
    assert sum(claimed) / 40 == pytest.approx(seen, rel=0.12)


def test_an_image_classifier(vision: tuple[str, str, str], scripts: dict[str, str]) -> None:
    model, small, images = vision
    metrics = ["accuracy", scripts["accuracy"], "kl", "top1_agreement"]
    dense, compressed = both(model, small, metrics, images)
    pixels, labels = pictures(60, 10_000)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(model).eval()
    with torch.no_grad():
        chosen = loaded(pixels).logits.argmax(-1)
    assert dense["accuracy"].samples == (chosen == torch.tensor(labels)).double().tolist()
    assert dense[scripts["accuracy"]].value == dense["accuracy"].value > 0.6
    assert (dense["kl"].value, dense["top1_agreement"].value) != (
        compressed["kl"].value, compressed["top1_agreement"].value,
    )  # fmt: skip
    assert compressed["accuracy"].data == dense["accuracy"].data
    assert compressed["accuracy"].data["examples"] == 60


def test_what_applies_by_default(vision: tuple[str, str, str], monkeypatch: Any) -> None:
    monkeypatch.setattr("eval.metrics.DEFAULT", ("nll", "kl", "size_bytes"))
    monkeypatch.setattr("eval.harness.DEFAULT", ("nll", "kl", "size_bytes"))
    _, small, images = vision
    assert set(rows(small, None, images)) == {"accuracy", "kl", "size_bytes"}


def test_a_decoder_that_classifies_without_a_padding_token(tmp_path: Path) -> None:
    config = copy.deepcopy(GPT2)
    config.num_labels = 3
    folder = save(tmp_path / "gpt2", "GPT2ForSequenceClassification", config)
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in sentences(12, 3)))
    row = rows(folder, ["accuracy"], str(lines), columns=COLUMNS)["accuracy"]
    loaded = transformers.GPT2ForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for asked, right in zip(sentences(12, 3), row.samples, strict=True):
        with torch.no_grad():
            logits = loaded(tokenizer(asked["line"], return_tensors="pt")["input_ids"]).logits
        assert right == float(logits.argmax() == asked["kind"])


def test_embeddings_beside_their_original(
    folders: dict[str, str], text: tuple[str, str, str], tmp_path: Path
) -> None:
    lines = text[2]
    names = ["embedding_cosine", "embedding_neighbours"]
    small = str(tmp_path / "small")
    compress.apply({"stages": [{"use": "rtn", "bits": 3}]}, model=folders["encoder"], out=small,
                   verify=False)  # fmt: skip
    found = rows(small, names, lines, columns={"text": "line"}, limit=20)
    same = rows(folders["encoder"], names, lines, columns={"text": "line"}, limit=20,
                baseline=folders["encoder"])  # fmt: skip
    assert [same[name].value for name in names] == pytest.approx([1, 1])
    models = [compress.load(folder) for folder in (small, folders["encoder"])]
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    vectors = []
    for model in models:
        own = []
        for row in sentences(80, 10_000)[:20]:
            with torch.no_grad():
                coded = tokenizer(row["line"], return_tensors="pt")
                own.append(model(coded["input_ids"]).last_hidden_state[0].double().mean(0))
        vectors.append(torch.stack(own))
    cosines = torch.cosine_similarity(*vectors, dim=1)
    assert found["embedding_cosine"].samples == pytest.approx(cosines.tolist(), abs=1e-5)
    expected = []
    for i in range(20):
        near = [torch.cosine_similarity(v[i][None], v, dim=1) for v in vectors]
        ranks = [sorted(n[j] for j in range(20) if j != i) for n in near]
        places = [[ranks[k].index(near[k][j]) for j in range(20) if j != i] for k in (0, 1)]
        gaps = sum((a - b) ** 2 for a, b in zip(*places, strict=True))
        expected.append(1 - 6 * gaps / (19 * (19**2 - 1)))
    assert found["embedding_neighbours"].samples == pytest.approx(expected, abs=0.02)
    assert 0 < found["embedding_neighbours"].value < 1  # type: ignore[operator]
    with pytest.raises(NotMeasurable, match="no embedding model"):
        rows(text[1], names, lines, columns=COLUMNS)


def test_equal_values_share_their_rank() -> None:
    a = torch.tensor([[1.0, 2.0, 2.0, 3.0]])
    assert spearman(a, a).item() == pytest.approx(1)
    assert spearman(a, torch.tensor([[1.0, 2.0, 3.0, 4.0]])).item() == pytest.approx(0.948683)


def test_data_sets_are_read_from_many_places(tmp_path: Path) -> None:
    made = datasets.Dataset.from_list(sentences(6, 0))
    made.to_csv(tmp_path / "a.csv")
    made.to_parquet(tmp_path / "a.parquet")
    made.to_json(tmp_path / "a.jsonl")
    datasets.DatasetDict({"train": made, "test": made.select(range(4))}).save_to_disk(
        tmp_path / "both"
    )
    found = [read(str(tmp_path / f"a.{kind}"), COLUMNS) for kind in ("csv", "parquet", "jsonl")]
    assert len({data.describe()["hash"] for data in found}) == 1
    assert found[0].labels == [row["kind"] for row in sentences(6, 0)]
    assert len(read(str(tmp_path / "a.csv"), COLUMNS, limit=3)) == 3
    assert len(read(str(tmp_path / "both"), COLUMNS)) == 4


def test_mistakes_are_named(text: tuple[str, str, str], tmp_path: Path) -> None:
    model, _, lines = text
    with pytest.raises(RecipeError, match="no column 'lin'; did you mean 'line'"):
        rows(model, ["accuracy"], lines, columns={"text": "lin"})
    with pytest.raises(RecipeError, match="no role is called 'txt'; did you mean 'text'"):
        rows(model, ["accuracy"], lines, columns={"txt": "line"})
    with pytest.raises(DataError, match="say which column it is: --columns text=NAME"):
        rows(model, ["accuracy"], lines)
    with pytest.raises(DataError, match="say --columns label=NAME"):
        rows(model, ["accuracy"], lines, columns={"text": "line"})
    with pytest.raises(DataError, match="label 3 is no class of the model"):
        rows(model, ["accuracy"], lines, columns={"text": "line", "label": "number"})
    with pytest.raises(DataError, match="does not load"):
        rows(model, ["accuracy"], str(tmp_path / "nowhere.csv"))
    with pytest.raises(NotMeasurable, match="give --dataset"):
        rows("demo", ["accuracy"], lines, columns=COLUMNS)
