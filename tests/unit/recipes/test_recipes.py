"""The recipe layer: shipped recipes, tables against the installed llm-compressor, errors, overrides, round trip."""

from __future__ import annotations

import json
import re
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from recipes.errors import RecipeError
from recipes.fields import PRESET_SCHEMES
from recipes.loader import dump_recipe, load_recipe, recipe_digest
from recipes.matrix import Matrix
from recipes.modifiers import (
    OWN_ARGUMENTS,
    REFUSED,
    ConfigGroup,
    GPTQArguments,
    ModifierEntry,
    QuantizationArguments,
)
from recipes.schema import Recipe, json_schema_text
from recipes.schemes import OBSERVERS, OWN_OBSERVERS, is_observer
from recipes.smoothing import AWQArguments, SmoothQuantArguments

RECIPES = Path(__file__).parents[3] / "recipes"
SHIPPED = sorted(RECIPES.rglob("*.yaml"))
GROUPS = "modifiers.0.QuantizationModifier.config_groups"

MINIMAL = r"""
source: {checkpoint: models/source}
output: models/output
modifiers:
  - QuantizationModifier:
      config_groups:
        experts:
          targets: ['re:^layers\.\d+\.ffn\.experts\.\d+\.w[123]$']
          scheme: NVFP4
calibration: {dataset: bundled}
"""


def write(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return caught.value.problems


def with_modifiers(directory: Path, modifiers: list[Any], **sections: Any) -> Path:
    recipe = yaml.safe_load(MINIMAL) | {"modifiers": modifiers} | sections
    return write(directory, yaml.safe_dump(recipe, sort_keys=False))


def field_rows(model: type[BaseModel], prefix: str = "") -> list[str]:
    """`| key | default | meaning |` of every field of `model`, sections opened; what README.md must hold."""
    rows = []
    for name, field in model.model_fields.items():
        members = [field.annotation]
        if typing.get_origin(field.annotation) in (typing.Union, types.UnionType):
            members = list(typing.get_args(field.annotation))
        section = next((m for m in members if isinstance(m, type) and issubclass(m, BaseModel)), None)
        optional = len(members) > 1
        default = (
            "required"
            if field.is_required()
            else f"`{json.dumps(field.default, default=lambda value: value.model_dump())}`"
        )
        meaning = " ".join((field.description or "").split())
        if section is None or optional:
            rows.append(f"| `{prefix}{name}` | {default} | {meaning} |")
        if section is not None:
            rows += field_rows(section, f"{prefix}{name}.")
    return rows


# Shipped files


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.method == "plain" or recipe.quantization_modifier.config_groups
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert recipe_digest(again) == recipe_digest(recipe)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipe_names_the_schema_and_stands_in_the_catalogue(path: Path) -> None:
    first_line = path.read_text(encoding="ascii").splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first_line.startswith(prefix)
    assert (path.parent / first_line.removeprefix(prefix)).resolve() == RECIPES / "recipe.schema.json"
    row = f"| [{path.relative_to(RECIPES).with_suffix('')}]({path.relative_to(RECIPES)}) | "
    lines = [line for line in (RECIPES / "README.md").read_text(encoding="ascii").splitlines() if line.startswith(row)]
    assert len(lines) == 1
    if path.stem != "quickstart":
        assert load_recipe(path).source.checkpoint in lines[0]


def test_enough_recipes_are_shipped() -> None:
    families = {path.parent.name for path in SHIPPED}
    assert families >= {"recipes", "deepseek_v4", "qwen3_moe", "mixtral", "llama", "qwen3"}


def test_no_shipped_deepseek_target_reaches_mtp() -> None:
    for path in (path for path in SHIPPED if load_recipe(path).method != "plain"):
        for group in load_recipe(path).quantization_modifier.config_groups.values():
            patterns = [target.removeprefix("re:") for target in group.targets]
            assert not any(re.match(pattern, "mtp.0.ffn.experts.3.w1") for pattern in patterns)
            assert not any(re.match(pattern, "mtp.0.attn.wq_a") for pattern in patterns)
            if path.parent.name in ("deepseek_v4", "deepseek_v41") and "experts" in patterns[0]:
                assert re.match(patterns[0], "layers.11.ffn.experts.3.w1")


def test_json_schema_is_fresh() -> None:
    stored = (RECIPES / "recipe.schema.json").read_text(encoding="ascii")
    assert stored == json_schema_text(), "stale: run python -m recipes.schema > recipes/recipe.schema.json"


def test_every_key_of_the_json_schema_is_described() -> None:
    schema = json.loads(json_schema_text())
    models = [schema, *(model for model in schema["$defs"].values() if "properties" in model)]
    bare = [name for model in models for name, key in model["properties"].items() if not key.get("description")]
    assert len(models) > 10
    assert bare == []


@pytest.mark.parametrize(
    "model", [Recipe, QuantizationArguments, ConfigGroup, Matrix, SmoothQuantArguments, AWQArguments]
)
def test_field_reference_matches_the_schema(model: type[BaseModel]) -> None:
    readme = (RECIPES / "README.md").read_text(encoding="ascii").splitlines()
    assert [row for row in field_rows(model) if row not in readme] == []


# Tables against the installed packages


def test_modifier_names_are_those_of_the_installed_llmcompressor() -> None:
    from llmcompressor.modifiers import Modifier, ModifierFactory
    from llmcompressor.modifiers.quantization.quantization.mixin import QuantizationMixin

    ModifierFactory.refresh()
    installed = ModifierFactory._main_registry
    assert set(ModifierEntry.model_fields) | set(REFUSED) == set(installed) - {"Modifier"}
    parsed = {
        "QuantizationModifier": QuantizationArguments,
        "GPTQModifier": GPTQArguments,
    }
    for name, smoothing in (("AWQModifier", AWQArguments), ("SmoothQuantModifier", SmoothQuantArguments)):
        # Ours: ignore for both. Not taken: where stock keeps inputs, another formula, functions and steps of a training loop.
        left_out = {"offload_device", "algorithm", "num_calibration_steps", "calibration_function"}
        theirs = (
            {k for k in installed[name].model_fields if not k.endswith("_")} - set(Modifier.model_fields) - left_out
        )
        assert theirs <= set(smoothing.model_fields) <= theirs | {"ignore"}
    quantizing = {name for name, kind in installed.items() if issubclass(kind, QuantizationMixin)}
    assert set(parsed) == quantizing - set(REFUSED)
    for name, arguments in parsed.items():
        # start, end, index and the like are the training loop's, without effect in one shot.
        own = set(arguments.model_fields) & OWN_ARGUMENTS
        assert set(arguments.model_fields) - own == set(installed[name].model_fields) - set(Modifier.model_fields), name


def test_preset_schemes_are_those_of_the_installed_compressed_tensors() -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES as INSTALLED

    assert set(PRESET_SCHEMES) == set(INSTALLED) - {"UNQUANTIZED"}
    assert len(PRESET_SCHEMES) == len(set(PRESET_SCHEMES))


def test_observers_are_those_of_the_installed_llmcompressor() -> None:
    from llmcompressor.observers import Observer

    assert list(OBSERVERS) == [name for name in Observer.registered_names() if name not in OWN_OBSERVERS]
    assert Observer.get_value_from_registry("Static_MinMax") and is_observer("Static_MinMax")


# Defaults and the quantization modifier


def test_minimal_recipe_has_the_documented_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert recipe.method == "calibrate"
    assert recipe.calibration is not None
    assert (recipe.calibration.num_samples, recipe.calibration.max_seq_length, recipe.calibration.seed) == (
        256,
        2048,
        42,
    )
    assert (recipe.export.kept, recipe.export.input_global_scale) == ("native", "shared")
    assert recipe.export.max_shard_size == 5_000_000_000
    assert recipe.verify.structure and recipe.verify.fidelity and recipe.verify.serving is None


def test_quantization_modifier_separates_groups_from_other_arguments(tmp_path: Path) -> None:
    quantization = {
        "targets": "lm_head",
        "scheme": "nvfp4",
        "ignore": ["model.layers.0.mlp.up_proj"],
        "weight_observer": "memoryless_mse",
    }
    modifiers = [{"AWQModifier": None}, {"QuantizationModifier": quantization}]
    raw = yaml.safe_load(MINIMAL) | {"modifiers": modifiers}
    recipe = Recipe.model_validate(raw)
    entry = recipe.quantization_modifier
    assert (entry.name, entry.position) == ("QuantizationModifier", 1)
    assert entry.config_groups == {"group_0": ConfigGroup(targets=["lm_head"], scheme="NVFP4")}
    assert entry.ignore == ["model.layers.0.mlp.up_proj"]
    assert entry.arguments == {"weight_observer": "memoryless_mse"}
    assert (recipe.modifiers[0].name, recipe.modifiers[0].arguments) == ("AWQModifier", {})


def test_null_argument_is_told_from_one_left_out(tmp_path: Path) -> None:
    gptq = {"targets": ["lm_head"], "scheme": "NVFP4A16", "actorder": None, "dampening_frac": 0.05}
    recipe = load_recipe(with_modifiers(tmp_path, [{"GPTQModifier": gptq}]))
    assert recipe.quantization_modifier.arguments == {"actorder": None, "dampening_frac": 0.05}
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again.quantization_modifier.arguments == {"actorder": None, "dampening_frac": 0.05}


def test_plain_method_needs_neither_modifiers_nor_data(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, "source: {checkpoint: a}\noutput: b\nmethod: plain\n"))
    with pytest.raises(RecipeError, match="none names modules"):
        _ = recipe.quantization_modifier


def test_home_is_expanded_and_variables_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load_recipe(write(tmp_path, MINIMAL), ["source.checkpoint=~/model", "offload.directory=$HOME/x"])
    assert recipe.source.checkpoint == f"{tmp_path}/model"
    assert recipe.offload.directory == "$HOME/x"


@pytest.mark.parametrize("revision", ["1e3", "2024-01-01", "yes", "0x12", "null", "012", "a: b", "line\nbreak", "1_0"])
def test_round_trip_keeps_text_that_looks_like_something_else(revision: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(MINIMAL)
    raw["source"]["revision"] = revision
    recipe = Recipe.model_validate(raw)
    assert load_recipe(write(tmp_path, dump_recipe(recipe))).source.revision == revision


def test_digest_follows_the_meaning_and_not_the_spelling(tmp_path: Path) -> None:
    base = recipe_digest(load_recipe(write(tmp_path, MINIMAL)))
    assert len(base) == 64
    assert recipe_digest(load_recipe(write(tmp_path, MINIMAL + "# note\nmethod: calibrate\n"))) == base
    assert recipe_digest(load_recipe(write(tmp_path, MINIMAL), ["export.max_shard_size=5GB"])) == base
    assert recipe_digest(load_recipe(write(tmp_path, MINIMAL), ["calibration.seed=43"])) != base
    observer = "modifiers.0.QuantizationModifier.observer="
    one = load_recipe(write(tmp_path, MINIMAL), [observer + "{weights: mse, input: minmax}"])
    other = load_recipe(write(tmp_path, MINIMAL), [observer + "{input: minmax, weights: mse}"])
    assert recipe_digest(one) == recipe_digest(other) != base


# Errors


def test_three_mistakes_are_reported_together_with_line_and_key(tmp_path: Path) -> None:
    text = MINIMAL.replace("scheme: NVFP4", "scheme: NVPF4").replace(
        "{dataset: bundled}", "\n  dataset: bundled\n  num_sample: 3\n  seed: -1"
    )
    path = write(tmp_path, text)
    lines = {
        word: 1 + next(n for n, line in enumerate(text.splitlines()) if word in line)
        for word in ("NVPF4", "num_sample", "seed")
    }
    found = problems(path)
    assert len(found) == 3
    assert any(p.startswith(f"{path}:{lines['NVPF4']}: {GROUPS}.experts.scheme: ") and "'NVFP4'" in p for p in found)
    assert any(
        p.startswith(f"{path}:{lines['num_sample']}: calibration.num_sample: unknown key; did you mean 'num_samples'?")
        for p in found
    )
    assert any(p.startswith(f"{path}:{lines['seed']}: calibration.seed: must be at least 0, is -1") for p in found)


@pytest.mark.parametrize(
    ("group", "key", "rule"),
    [
        ({"targets": ["re:("], "scheme": "NVFP4"}, "targets.0", "regular expression that compiles"),
        ({"targets": ["re:"], "scheme": "NVFP4"}, "targets.0", "empty regular expression"),
        ({"targets": [r".*\.w1$"], "scheme": "NVFP4"}, "targets.0", "begin with 're:'"),
        ({"targets": [], "scheme": "NVFP4"}, "targets", "at least 1"),
        ({"scheme": "NVFP4"}, "targets", "required and missing"),
        ({"targets": ["a"]}, "weights", "has neither"),
        ({"targets": ["a"], "scheme": "NVFP4", "weights": {"num_bits": 4}}, "weights", "has both"),
        ({"targets": ["a"], "scheme": "NVFP4", "input_activations": {}}, "input_activations", "already says"),
        ({"targets": ["a"], "schema": "NVFP4", "weights": {}}, "schema", "did you mean 'scheme'?"),
        ({"targets": ["a"], "scheme": "W4A16"}, "scheme", "use one of NVFP4, NVFP4A16, FP8_BLOCK"),
    ],
)
def test_config_group_errors(group: dict[str, Any], key: str, rule: str, tmp_path: Path) -> None:
    found = problems(with_modifiers(tmp_path, [{"QuantizationModifier": {"config_groups": {"experts": group}}}]))
    assert len(found) == 1
    assert f": {GROUPS}.experts.{key}: " in found[0]
    assert rule in found[0]


GOOD = {"targets": ["a"], "scheme": "NVFP4"}


@pytest.mark.parametrize(
    ("modifiers", "key", "rule"),
    [
        ([{"QuantizationModifer": GOOD}], "modifiers.0", "did you mean 'QuantizationModifier'?"),
        (["AWQModifier", {"QuantizationModifier": GOOD}], "modifiers.0", "must be a mapping"),
        ([{"GPTQModifier": {}, "QuantizationModifier": GOOD}], "modifiers.0", "exactly one key"),
        ([{"QuantizationModifier": GOOD | {"ignor": []}}], "modifiers.0.QuantizationModifier.ignor", "'ignore'?"),
        (
            [{"QuantizationModifier": GOOD | {"weight_observer": "minmacks"}}],
            "modifiers.0.QuantizationModifier.weight_observer",
            "is no observer of llm-compressor; did you mean 'minmax'?",
        ),
        (
            [{"QuantizationModifier": GOOD | {"input_observer": "nvfp4_weighted"}}],
            "modifiers.0.QuantizationModifier.input_observer",
            "chooses group scales of weights, and those of inputs are computed during serving; remove it",
        ),
        (
            [{"QuantizationModifier": GOOD | {"observer": {"input": "NVFP4 MSE"}}}],
            "modifiers.0.QuantizationModifier.observer",
            "input: NVFP4 MSE chooses group scales of weights; name it under weights",
        ),
        (
            [{"QuantizationModifier": GOOD | {"observer": {"weight": "minmax"}}}],
            "modifiers.0.QuantizationModifier.observer.weight",
            "must be 'weights', 'input' or 'output'",
        ),
        ([{"GPTQModifier": GOOD | {"dampening": 1}}], "modifiers.0.GPTQModifier.dampening", "'dampening_frac'?"),
        (
            [{"QuantizationModifier": GOOD | {"ignore": ["re:["]}}],
            "modifiers.0.QuantizationModifier.ignore.0",
            "compiles",
        ),
        ([{"QuantizationModifier": {"scheme": "NVFP4"}}], GROUPS, "go together"),
        (
            [{"QuantizationModifier": GOOD}, {"SmoothQuantModifier": {}}],
            "modifiers",
            "SmoothQuantModifier changes weights before they are quantized; write it before QuantizationModifier",
        ),
        ([{"AWQModifier": {}}, {"SmoothQuantModifier": {}}, {"QuantizationModifier": GOOD}], "modifiers", "keep one"),
        (
            [{"SmoothQuantModifier": {"smoothing_strength": 1.5}}, {"QuantizationModifier": GOOD}],
            "modifiers.0.SmoothQuantModifier.smoothing_strength",
            "must be at most 1.0, is 1.5",
        ),
        (
            [{"AWQModifier": {"mappings": [["re:.*q_proj"]]}}, {"QuantizationModifier": GOOD}],
            "modifiers.0.AWQModifier.mappings.0",
            "must be [balance_layers, smooth_layer]",
        ),
        ([{"QuantizationModifier": GOOD | {"config_groups": {"b": GOOD}}}], GROUPS, "excludes 'targets' and 'scheme'"),
        (
            [{"QuantizationModifier": GOOD}, {"GPTQModifier": GOOD}],
            "modifiers",
            "found QuantizationModifier, GPTQModifier",
        ),
        ([{"QuantizationModifier": {}}], "modifiers", "found none"),
        (
            [{"GPTQModifier": {}}, {"QuantizationModifier": GOOD}],
            "modifiers",
            "GPTQModifier beside QuantizationModifier",
        ),
        (
            [{"QuantizationModifier": GOOD | {"kv_cache_scheme": {"num_bits": 8}}}],
            "modifiers.0.QuantizationModifier.kv_cache_scheme",
            "no place for scales of the key/value cache yet; remove it",
        ),
    ],
)
def test_modifier_errors(modifiers: list[Any], key: str, rule: str, tmp_path: Path) -> None:
    found = problems(with_modifiers(tmp_path, modifiers))
    assert len(found) == 1
    assert f": {key}: " in found[0]
    assert rule in found[0]


def test_a_wrong_method_beside_a_modifier_without_targets_is_told(tmp_path: Path) -> None:
    found = problems(with_modifiers(tmp_path, [{"QuantizationModifier": {}}], method="quantize"))
    assert len(found) == 1 and "method: must be 'calibrate', 'convert' or 'plain'" in found[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_modifier_that_no_run_can_take_is_refused_by_the_loader(name: str, tmp_path: Path) -> None:
    found = problems(with_modifiers(tmp_path, [{name: {}}, {"QuantizationModifier": GOOD}]))
    assert len(found) == 1 and f": modifiers.0: {name} {REFUSED[name]}; remove it" in found[0]


def test_the_json_schema_offers_what_can_run_and_nothing_else() -> None:
    schema = json.loads(json_schema_text())["$defs"]
    assert set(schema["ModifierEntry"]["properties"]) == {
        "QuantizationModifier", "GPTQModifier", "AWQModifier", "SmoothQuantModifier"}  # fmt: skip
    assert schema["ConfigGroup"]["properties"]["scheme"]["anyOf"][0]["enum"] == ["NVFP4", "NVFP4A16", "FP8_BLOCK"]


FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FP8 = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}


@pytest.mark.parametrize(
    ("group", "preset"),
    [
        ({"weights": FP4}, "NVFP4A16"),
        ({"weights": FP4 | {"symmetric": True, "dynamic": False, "actorder": None, "zp_dtype": None}}, "NVFP4A16"),
        ({"weights": FP4 | {"type": "FLOAT", "observer": "memoryless_mse"}, "output_activations": None}, "NVFP4A16"),
        ({"weights": FP4, "input_activations": FP4 | {"dynamic": "local", "observer": "minmax"}}, "NVFP4"),
        ({"weights": FP4 | {"scale_dtype": "torch.float8_e4m3fn"}, "format": "nvfp4-pack-quantized"}, "NVFP4A16"),
        (
            {
                "weights": FP8,
                "input_activations": {"type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
            },
            "FP8_BLOCK",
        ),
    ],
    ids=range(6),
)
def test_arguments_written_out_are_taken_where_they_are_a_presets(group: dict[str, Any], preset: str) -> None:
    assert ConfigGroup.model_validate({"targets": ["a"]} | group).preset == preset


@pytest.mark.parametrize(
    ("group", "says"),
    [
        (
            {"weights": FP4, "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}},
            "for NVFP4 input_activations.num_bits must be 4, is '8'; input_activations.strategy must be 'tensor_group', "
            "is 'token'; input_activations.group_size must be 16, is 'None'; input_activations.dynamic must be 'local', "
            "is 'True'; `scheme: NVFP4` says it all",
        ),
        ({"weights": FP4 | {"strategy": "group"}}, "weights.strategy must be 'tensor_group', is 'group'; `scheme: NVFP4A16`"),
        ({"weights": FP4 | {"group_size": 32}}, "weights.group_size must be 16, is '32'"),
        ({"weights": FP4 | {"symmetric": False}}, "weights.symmetric must be True, is 'False'"),
        ({"weights": FP4, "input_activations": FP4}, "input_activations.dynamic must be 'local', is 'False'"),
        ({"weights": FP4 | {"numbits": 4}}, "weights.numbits must be None, is '4'"),
        ({"weights": FP8}, "for FP8_BLOCK input_activations"),
        ({"weights": FP8 | {"block_structure": [64, 64]}}, "weights.block_structure must be [128, 128], is '[64, 64]'"),
        ({"weights": {}}, "for FP8_BLOCK"),
        ({"weights": FP4 | {"observer": "minmacks"}}, "weights.observer must be one of memoryless-minmax, static-minmax, "),
        (
            {"weights": FP4, "input_activations": FP4 | {"dynamic": "local", "observer": "nvfp4_mse"}},
            "input_activations.observer must not be an observer that chooses group scales of weights, is 'nvfp4_mse'",
        ),
        ({"weights": FP4 | {"observer_kwargs": 3}}, "weights.observer_kwargs must be a mapping, is '3'"),
        ({"weights": FP4 | {"actorder": "group"}}, "weights.actorder must be null, 'weight' or 'static', is 'group'"),
        ({"weights": FP4, "output_activations": FP4}, "output_activations: quantized outputs have no place"),
        ({"weights": FP4, "format": "float-quantized"}, "format: of NVFP4A16 is nvfp4-pack-quantized, not float-quantized"),
        ({"scheme": "FP8_BLOCK", "format": "nvfp4-pack-quantized"}, "format: of FP8_BLOCK is float-quantized"),
    ],
    ids=range(16),
)  # fmt: skip
def test_arguments_that_cannot_be_written_are_refused_by_the_loader(
    group: dict[str, Any], says: str, tmp_path: Path
) -> None:
    found = problems(
        with_modifiers(tmp_path, [{"QuantizationModifier": {"config_groups": {"g": {"targets": ["a"]} | group}}}])
    )
    assert len(found) == 1
    assert f": {GROUPS}.g: " in found[0] and says in found[0]


def test_an_observer_that_needs_inputs_or_a_model_is_refused_without_them(tmp_path: Path) -> None:
    for observer in ({"weight_observer": "nvfp4_weighted"}, {"observer": {"weights": "nvfp4_mse"}}):
        path = with_modifiers(tmp_path, [{"QuantizationModifier": GOOD | observer}])
        load_recipe(path)
        assert "needs method 'calibrate'; remove it" in problems(path, "method=convert")[0]


STAGE = {"targets": "Linear", "scheme": "nvfp4", "ignore": "lm_head"}


@pytest.mark.parametrize(
    "form",
    [
        {"quant_stage": {"quant_modifiers": {"QuantizationModifier": STAGE}}},
        {"default_stage": {"default_modifiers": {"QuantizationModifier": STAGE}}},
        {"modifiers": {"QuantizationModifier": STAGE}},
        {"modifiers": [{"QuantizationModifier": STAGE}]},
    ],
    ids=["stage", "default stage", "mapping", "list"],
)
def test_llm_compressors_own_forms_are_one_recipe(form: dict[str, Any], tmp_path: Path) -> None:
    rest = {"source": {"checkpoint": "a"}, "output": "b", "calibration": {"dataset": "bundled"}}
    recipe = load_recipe(write(tmp_path, yaml.safe_dump(rest | form)))
    assert recipe.quantization_modifier.config_groups == {"group_0": ConfigGroup(targets=["Linear"], scheme="NVFP4")}
    assert recipe.quantization_modifier.ignore == ["lm_head"]
    usual = {
        "modifiers": [
            {"QuantizationModifier": STAGE | {"targets": ["Linear"], "scheme": "NVFP4", "ignore": ["lm_head"]}}
        ]
    }
    assert recipe_digest(recipe) == recipe_digest(Recipe.model_validate(rest | usual))


def test_a_stage_alone_says_what_to_add_and_where_its_own_mistakes_are(tmp_path: Path) -> None:
    path = write(
        tmp_path, yaml.safe_dump({"s_stage": {"q_modifiers": {"QuantizationModifier": STAGE | {"scheme": "nv"}}}})
    )
    found = problems(path)
    stage = f"{path}:2: s_stage.q_modifiers, read as the list modifiers: "
    assert stage + "llm-compressor's part of a recipe; add source, output and calibration" in found
    assert any(p.startswith(stage + 'modifiers.0.QuantizationModifier.scheme: "nv" is no scheme') for p in found)
    assert any(
        p.startswith("--set modifiers.0.QuantizationModifier.scheme=x: ")
        for p in problems(path, "modifiers.0.QuantizationModifier.scheme=x")
    )


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("calibration.num_samples=0", "must be at least 1, is 0"),
        ("calibration.num_samples=true", "must be a whole number, is true"),
        ("calibration.num_samples='3'", "must be a whole number"),
        ("calibration.shuffle=1", "must be true or false"),
        ("calibration.chat=tempalte", "must be 'auto', 'template' or 'deepseek_v4'"),
        ("calibration=null", "is required with method 'calibrate'"),
        ("export.max_shard_size=5", "forgotten unit"),
        ("export.max_shard_size=5GB and more", "must be a number of bytes"),
        ("export.max_shard_size=5gbit", "must be a number of bytes"),
        ("offload.max_host_memory=500 GiX", "must be a number of bytes"),
        ("verify.serving.timeout=.inf", "must be a finite number"),
        ("verify.serving.timeout=0", "must be more than 0"),
        ("verify.serving.prompts=hello", "must be a list"),
        ("source.revision=2024-01-01", "must be text"),
        ("source.checkpoint=", "must be text"),
        ("output=models/../models/source", "source checkpoint's own directory"),
        ("calibration.num_sample=3", "did you mean 'num_samples'?"),
        ("calibratoin.num_samples=3", "did you mean 'calibration'?"),
        ("modifiers.1.QuantizationModifier.ignore=[]", "must be an index below 1"),
        ("modifiers.x.QuantizationModifier.ignore=[]", "'x' must be an index"),
        ("modifiers.0.QuantizationModifer.ignore=[]", "did you mean 'QuantizationModifier'?"),
        (f"{GROUPS}.expert.scheme=NVFP4", f"{GROUPS}.expert.targets: is required"),
        ("output.directory=x", "has no key 'directory'"),
        ("output", "must be key.path=value"),
        ("calibration..seed=1", "must be key.path=value"),
        ("calibration.seed=[", "the value is not YAML"),
    ],
)
def test_bad_override_is_one_problem_that_names_the_override(override: str, rule: str, tmp_path: Path) -> None:
    found = problems(write(tmp_path, MINIMAL), override)
    assert len(found) == 1
    assert found[0].startswith(f"--set {override}: ")
    assert rule in found[0]


def test_overrides_set_values_lists_and_missing_sections(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    overrides = [
        "calibration.num_samples=8",
        "calibration.num_samples=9",
        "offload.max_host_memory=500GiB",
        f"{GROUPS}.experts.targets.0=re:^x=y$",
        "modifiers.0.QuantizationModifier.ignore=[lm_head]",
        "verify.serving.require.max_perplexity=40",
    ]
    recipe = load_recipe(path, overrides, output="elsewhere")
    assert recipe.output == "elsewhere"
    assert recipe.calibration is not None and recipe.calibration.num_samples == 9
    assert recipe.offload.max_host_memory == 500 * 2**30
    assert recipe.quantization_modifier.config_groups["experts"].targets == ["re:^x=y$"]
    assert recipe.quantization_modifier.ignore == ["lm_head"]
    assert recipe.verify.serving is not None and recipe.verify.serving.require.max_perplexity == 40
    assert load_recipe(path, [*overrides, "verify.serving=null"]).verify.serving is None


def test_bad_output_argument_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--output: output: must not be empty"):
        load_recipe(write(tmp_path, MINIMAL), output="")


def test_repeated_keys_are_refused_with_both_lines(tmp_path: Path) -> None:
    text = "source: {checkpoint: a}\noutput: b\noutput: c\n" + MINIMAL.split("output: models/output\n")[1]
    path = write(tmp_path, text)
    assert problems(path) == [f"{path}:3: output: is given twice, first in line 2; remove one of the two"]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", ": is empty"),
        (b"# only a comment\n", ": is empty"),
        (b"- a\n- b\n", ":1: must be a mapping"),
        (b"just text\n", ":1: must be a mapping"),
        (b"source: {checkpoint: a\noutput: b\n", ":2: is not valid YAML"),
        (b"source:\n\tcheckpoint: a\n", ":2: has a tab"),
        (b"source: {checkpoint: a}\noutput: caf\xe9\n", ":2: must be UTF-8, byte 35 is 0xe9"),
        (b"source: !!python/object:os.system {}\n", ":1: is not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "is not valid YAML"),
        (b"source: \x00\n", "is not valid YAML"),
        (b"output: 2024-13-45\n", "is not valid YAML"),
        (b"output: " + b"[" * 5000, "is not valid YAML"),
        (b"output: &a [*a]\n", ": output: must be text"),
    ],
)
def test_broken_files(content: bytes, rule: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    found = problems(path)
    assert any(problem.startswith(str(path)) and rule in problem for problem in found)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    assert "no such recipe file" in problems(tmp_path / "absent.yaml")[0]
    assert "cannot be read" in problems(tmp_path)[0]


def test_missing_keys_are_named_at_their_parent(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL.replace("source: {checkpoint: models/source}", "source: {revision: main}"))
    assert problems(path, "source.trust_remote_code=true") == [
        f"{path}:2: source.checkpoint: is required and missing; add `checkpoint: ...`"
    ]


def test_a_choice_of_true_false_and_a_word_is_one_problem_under_its_key(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    found = problems(path, "verify.serving.compare=maybe", "rehearse.serving=3")
    assert [problem.partition(": must be ")[2] for problem in found] == [
        'true, false or \'auto\', is "maybe"; leave it out for the default "auto"',
        "true, false or 'auto', is 3; leave it out for the default \"auto\"",
    ]
    keys = [problem.partition(": must")[0].rpartition(" ")[2] for problem in found]
    assert keys == ["verify.serving.compare", "rehearse.serving"]


def test_a_rehearsal_that_says_nothing_of_the_forward_is_dumped_as_before_it_could(tmp_path: Path) -> None:
    def dumped(*overrides: str) -> Any:
        return yaml.safe_load(dump_recipe(load_recipe(write(tmp_path, MINIMAL), overrides))).get("rehearse")

    assert dumped() is None
    assert dumped("rehearse.serving=false") == {"serving": False}
    assert dumped("rehearse.forward=warn") == {"serving": "auto", "forward": "warn"}
