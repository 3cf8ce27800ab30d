"""YAML ⇄ a validated Recipe, every default filled in.

A recipe says everything before a weight is read, so everything it says is checked before, too: a
key that nobody knows, a value out of range, a stage that cannot follow another. A *comparison*
gives ``variants:`` instead of ``stages:``, and stands for one recipe a variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress import registry
from compress.anatomy import Anatomy, Site, matches, select
from compress.compressors.base import (
    CalibratedCompressor,
    Compressor,
    LayerCompressor,
)
from compress.compressors.budget import Budget
from compress.errors import RecipeError, did_you_mean


class Calibration(BaseModel):
    """The text that calibrated methods and training read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field("", description="demo, a local file or folder, or name:config:split:column")
    samples: int = Field(128, ge=1, description="windows of text")
    length: int | None = Field(
        None, ge=8, description="tokens in a window; 256, or as many as the model takes"
    )


class Evaluation(BaseModel):
    """What `compress run` measures."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metrics: list[str] = Field(default_factory=list, description="empty: all that apply")
    tasks: list[str] = Field(default_factory=list, description="names or YAML of lm-eval")
    dataset: str = Field("", description="rows with labels: a file, a folder, name:config:split")
    columns: dict[str, str] = Field(default_factory=dict, description="text, image, label → name")
    limit: int | None = Field(None, ge=2, description="questions or rows, at most")
    data: str = Field("", description="the calibration data's evaluation part, unless given")
    samples: int = Field(128, ge=1, description="windows of text")
    length: int | None = Field(None, ge=8, description="tokens in a window")


class Stage(BaseModel):
    """One compressor with its parameters, and the weights it takes.

    ``overrides`` maps a pattern, as in targets, to the compressor with other parameters, or to
    another one that solves the same layer problem; where several match a site, the last one counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    compressor: Compressor
    targets: list[str]
    skip: list[str] = Field(default_factory=list)
    blocks: list[int] | None = None
    overrides: dict[str, Compressor] = Field(default_factory=dict)
    budget: Budget | None = None

    @property
    def use(self) -> str:
        return self.compressor.name

    def compressor_for(self, site: Site) -> Compressor:
        """The compressor with the parameters that it has for one site."""
        own = [made for pattern, made in self.overrides.items() if matches(site, pattern)]
        return own[-1] if own else self.compressor

    def sites(self, anatomy: Anatomy) -> list[Site]:
        """The sites that this stage takes.

        Raises:
            RecipeError: a pattern matches nothing, or the method cannot take what it matches.
        """
        chosen = select(anatomy.sites, self.targets, self.skip, self.blocks, anatomy.layers)
        for pattern in self.overrides:
            select(chosen, [pattern], [], None, anatomy.layers)
        for site in chosen:
            compressor = self.compressor_for(site)
            if site.layout not in compressor.layouts:
                raise RecipeError(
                    f"{compressor.name} cannot compress {site.name}, an {site.layout}; "
                    f"it takes {', '.join(sorted(compressor.layouts))}"
                )
        return chosen

    def dump(self) -> dict[str, Any]:
        """As it stands in YAML, defaults included."""
        out: dict[str, Any] = {"use": self.use}
        out |= {k: v for k, v in self.compressor.model_dump(mode="json").items() if v is not None}
        out["targets"] = list(self.targets)
        budget = self.budget and self.budget.model_dump()
        more = {"skip": self.skip or None, "blocks": self.blocks, "budget": budget}
        out |= {key: value for key, value in more.items() if value is not None}
        if self.overrides:
            out["overrides"] = {p: self._changes(made) for p, made in self.overrides.items()}
        return out

    def _changes(self, made: Compressor) -> dict[str, Any]:
        """What an override says: where it differs, or all of another method's parameters."""
        own = made.model_dump(mode="json")
        if made.name != self.use:
            return {"use": made.name} | {k: v for k, v in own.items() if v is not None}
        common = self.compressor.model_dump(mode="json")
        return {k: v for k, v in own.items() if v != common[k]}


class Recipe(BaseModel):
    """A model, the text, and the stages that compress it, in order."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    model: str = "demo"
    calibration: Calibration = Field(default_factory=lambda: Calibration.model_validate({}))
    seed: int = Field(0, ge=0)
    untie: bool = Field(False, description="give a tied output head a table of its own")
    storage: Literal["plain", "compact"] = Field(
        "plain",
        description="plain: what transformers loads by itself wherever it can (sparse weights as "
        "dense files); compact: the fewest bytes, with a modelling file in the folder",
    )
    stages: list[Stage] = Field(default_factory=list)
    evaluate: Evaluation = Field(default_factory=lambda: Evaluation.model_validate({}))

    @field_validator("evaluate", mode="before")
    @classmethod
    def _names_only(cls, value: Any) -> Any:
        return {"metrics": value} if isinstance(value, list) else value

    @model_validator(mode="before")
    @classmethod
    def _demo_text(cls, raw: Any) -> Any:
        """The demo model reads its own text unless the recipe names another."""
        calibration = raw.get("calibration") or {}
        if not isinstance(calibration, Mapping):
            return raw
        calibration = dict(calibration)
        if raw.get("model", "demo") == "demo" and not calibration.get("data"):
            calibration["data"] = "demo"
        return {**raw, "calibration": calibration}

    @property
    def data(self) -> str:
        return self.calibration.data

    def dump(self) -> dict[str, Any]:
        out = self.model_dump(mode="json", exclude={"stages"})
        out["stages"] = [stage.dump() for stage in self.stages]
        return out

    def summary(self) -> str:
        """The stages in one line: ``svd ratio=0.5 → distill steps=300``."""
        return " → ".join(stage.compressor.summary() for stage in self.stages)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, width=100)


def load(
    recipe: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> dict[str, Recipe]:
    """Read a recipe file, YAML text's mapping, or a mapping; name → Recipe, one unless it compares.

    ``overrides`` maps dotted paths to values, e.g. ``{"stages.0.bits": 3, "model": "demo"}``.

    Raises:
        RecipeError: with the place of the mistake and, where there is one, the likely correction.
    """
    where, raw = _read(recipe)
    for path, value in (overrides or {}).items():
        _override(raw, path, value, where)
    variants = raw.pop("variants", None)
    if variants is None:
        return {Path(where).stem: _build(raw, where)}
    if "stages" in raw:
        raise RecipeError(f"{where}: a file has either stages or variants, not both")
    if not isinstance(variants, dict) or not variants:
        raise RecipeError(f"{where}: variants: expected a mapping from a name to a list of stages")
    built = {}
    for name, stages in variants.items():
        if not isinstance(name, str) or not name or set(name) & set("/\\:\0") or name[0] == ".":
            raise RecipeError(f"{where}: variants: '{name}' cannot be a folder name; quote numbers")
        built[name] = _build({**raw, "stages": stages or []}, where, f"variants.{name}")
    return built


def load_one(
    recipe: str | Path | Mapping[str, Any] | Recipe, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """The recipe in a file that holds just one."""
    if isinstance(recipe, Recipe):
        return recipe
    recipes = load(recipe, overrides)
    if len(recipes) > 1:
        raise RecipeError(
            f"{recipe} compares {len(recipes)} variants ({', '.join(recipes)}); use "
            "`compress run`, or keep one of them"
        )
    return next(iter(recipes.values()))


def _read(recipe: str | Path | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(recipe, Mapping):
        try:
            return "recipe", yaml.safe_load(yaml.safe_dump(dict(recipe), sort_keys=False))  # a copy
        except yaml.YAMLError as error:
            raise RecipeError(f"recipe: only plain values can stand in it ({error})") from error
    path = Path(recipe)
    if not path.is_file():
        raise RecipeError(f"{path}: no such recipe file")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML text"
        raise RecipeError(f"{path}{line}: {problem}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: expected keys such as model and stages at the top level")
    return str(path), raw


def _override(raw: dict[str, Any], path: str, value: Any, where: str) -> None:
    """Set the value at a dotted path; lists are indexed by number."""
    keys = path.split(".")
    node: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(
                    f"--set {path}: {where} has {len(node)} items at "
                    f"{'.'.join(keys[:depth])}, numbered from 0; '{key}' is not one"
                )
            if last:
                node[int(key)] = value
            node = node[int(key)]
        elif isinstance(node, dict):
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {})
        else:
            raise RecipeError(f"--set {path}: '{'.'.join(keys[:depth])}' in {where} is a value")


def _build(raw: dict[str, Any], where: str, at: str = "stages") -> Recipe:
    _known(raw, Recipe.model_fields, where, "", {"data": "calibration.data"})
    stages = raw.get("stages") or []
    if not isinstance(stages, list):
        raise RecipeError(f"{where}: {at}: expected a list of stages, each with a 'use' key")
    built = [_stage(s, where, f"{at}.{i}") for i, s in enumerate(stages)]
    try:
        return Recipe.model_validate({**raw, "stages": built})
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, '')}") from error


def _stage(raw: Any, where: str, at: str) -> Stage:
    if not isinstance(raw, dict) or "use" not in raw:
        raise RecipeError(
            f"{where}: {at}: a stage is a mapping with a 'use' key, e.g. {{use: rtn, bits: 4}}"
        )
    cls = _method(raw["use"], where, f"{at}.use")
    own = ("targets", "skip", "blocks", "overrides", "budget")
    parameters = {k: v for k, v in raw.items() if k not in (*own, "use")}
    _known(parameters, [*cls.model_fields, *own, "use"], where, at + ".")
    fields = {"targets": list(cls.default_targets)} | {k: raw[k] for k in own if k in raw}
    for key in ("targets", "skip"):
        if isinstance(fields.get(key), str):
            fields[key] = [fields[key]]
    if "blocks" in fields:
        fields["blocks"] = _range(fields["blocks"], where, at)
    if "overrides" in fields:
        fields["overrides"] = _overrides(fields["overrides"], cls, parameters, where, at)
    try:
        return Stage(compressor=cls.model_validate(parameters), **fields)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, at + '.')}") from error


def _overrides(
    raw: Any, cls: type[Compressor], common: dict[str, Any], where: str, at: str
) -> dict[str, Compressor]:
    """The compressor as each pattern of ``raw`` has it."""
    if not issubclass(cls, LayerCompressor):
        raise RecipeError(
            f"{where}: {at}.overrides: {cls.name} does not solve layer by layer, so all of its "
            "weights have the same parameters"
        )
    at += ".overrides"
    if not isinstance(raw, dict) or not all(isinstance(v, dict) for v in raw.values()):
        raise RecipeError(
            f"{where}: {at}: expected patterns with parameters, e.g. down_proj: {{bits: 5}}"
        )
    made: dict[str, Compressor] = {}
    for pattern, changes in raw.items():
        other = _method(changes["use"], where, f"{at}.{pattern}.use") if "use" in changes else cls
        kin = {_kin(cls), _kin(other)}
        if len(kin) > 1:
            raise RecipeError(
                f"{where}: {at}.{pattern}.use: {other.name} cannot stand in for {cls.name}: one "
                "looks at text, or starts from the original, and the other does not"
            )
        parameters = {k: v for k, v in changes.items() if k != "use"}
        _known(parameters, [*other.model_fields, "use"], where, f"{at}.{pattern}.")
        if other is cls:
            parameters = {**common, **parameters}
        try:
            made[str(pattern)] = other.model_validate(parameters)
        except ValidationError as error:
            raise RecipeError(f"{where}: {_explain(error, f'{at}.{pattern}.')}") from error
    return made


def _method(name: Any, where: str, at: str) -> type[Compressor]:
    """The compressor of that name."""
    try:
        return registry.get(str(name))
    except RecipeError as error:
        raise RecipeError(f"{where}: {at}: {error}") from error


def _kin(cls: type[Compressor]) -> tuple[bool, bool, bool]:
    """Methods with the same can solve the sites of one stage, in one pass."""
    return issubclass(cls, LayerCompressor), issubclass(cls, CalibratedCompressor), cls.restores


def _range(value: Any, where: str, at: str) -> list[int]:
    """``[0, 3, -1]``, ``7``, or ``"2-5"`` (both ends in)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, str):
        first, dash, last = value.partition("-")
        if dash and first.strip().isdigit() and last.strip().isdigit() and int(first) <= int(last):
            return list(range(int(first), int(last) + 1))
    if isinstance(value, list) and value and all(type(v) is int for v in value):
        return value
    raise RecipeError(
        f"{where}: {at}.blocks: expected layer numbers such as 7, [0, 1, -1] or "
        f'"2-5", not {value!r}'
    )


def _known(
    raw: dict[str, Any], known: Any, where: str, at: str, moved: Mapping[str, str] | None = None
) -> None:
    for key in raw:
        if key not in known:
            if moved and key in moved:
                hint = f"; it is called {moved[key]}"
            else:
                hint = did_you_mean(str(key), known)
            raise RecipeError(f"{where}: {at}{key}: unknown key{hint}")


def _explain(error: ValidationError, at: str) -> str:
    """The first thing wrong, with its place, what was given and what is allowed."""
    first = error.errors()[0]
    place = at + ".".join(
        str(p)
        for p in first["loc"]
        if not str(p).startswith(("function", "lit")) and p not in ("int", "float")
    )
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "extra_forbidden":
        model = Calibration if place.startswith("calibration") else Evaluation
        return f"{place}: unknown key{did_you_mean(place.split('.')[-1], model.model_fields)}"
    given = first.get("input")
    shown = "" if isinstance(given, (dict, BaseModel)) else f" (given: {given!r})"
    return f"{place.rstrip('.')}: {message}{shown}"
