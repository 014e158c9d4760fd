"""Compares the output's config.json, as a serving engine reads it, with the source's config and the plan."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from calibration.checkpoint.dialect import is_nvidia
from calibration.checkpoint.index import Checkpoint
from calibration.families.family import Family
from calibration.plan.plan import Plan
from calibration.plan.quantization_config import output_config
from verify.checks import Check, verdict

_KEY = "quantization_config"
#: Fields about the writer of the file or a training loop: no serving engine's output depends on them.
_FREE = frozenset({"transformers_version", "_name_or_path", "use_cache"})
#: The fields of compressed-tensors' quantization_config (0.19). The first ones may describe the same modules in other
#: words: structure.targets judges which modules they match.
_RESPELLED = frozenset({"config_groups", "format", "ignore", "version", "global_compression_ratio"})
_FIELDS = _RESPELLED | {
    "kv_cache_scheme", "quant_method", "quantization_status", "sparsity_config", "transform_config",
}  # fmt: skip
#: The fields of NVIDIA's dialect (Model-Optimizer 0.47; those of FP8 are the source's own).
_NVIDIA_FIELDS = frozenset({
    "activation_scheme", "config_groups", "expert_dtype", "fmt", "group_size", "ignore", "ignored_layers",
    "kv_cache_quant_algo", "kv_cache_scheme", "moe_quant_algo", "modules_to_not_convert", "producer", "quant_algo",
    "quant_method", "quantized_layers", "scale_fmt", "weight_block_size",
})  # fmt: skip
#: Two names of one field.
_TWINS = (("dtype", "torch_dtype"), ("num_experts", "num_local_experts"))
_MISSING = object()


class _Meaning:
    """A config.json as transformers' config class reads it, with every default filled in and one name for every
    spelling of a field. A model type without a class is read literally. Nothing of the checkpoint is executed."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        from transformers.configuration_utils import PreTrainedConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        self._class: object = None
        self.values: dict[str, Any] = {}
        #: Defaults of every config class, which transformers does not write to the file.
        self.usual: dict[str, Any] = PreTrainedConfig().to_dict()

        # The class modifies the mappings that it receives.
        given = deepcopy(
            {key: value for key, value in config.items() if key not in (_KEY, "model_type", "torch_dtype")}
        )
        if "dtype" not in given and "torch_dtype" in config:
            given["dtype"] = config["torch_dtype"]
        try:
            self._class = CONFIG_MAPPING[config["model_type"]](**given)
            self.values = json.loads(json.dumps(self._class.to_dict(), default=str))  # type: ignore[attr-defined]
        except Exception:  # a library's checks of a stranger's fields can raise anything; the meaning is then unknown
            self._class = None
        for key in _FREE:
            self.values.pop(key, None)

    def of(self, key: str) -> Any:
        """The value of a field under any of its spellings; `_MISSING` if the class does not have it."""
        key = "dtype" if key == "torch_dtype" else key
        if key in self.values or self._class is None:
            return self.values.get(key, _MISSING)
        value = getattr(self._class, key, _MISSING)
        return value if value is _MISSING else json.loads(json.dumps(value, default=str))


def config_check(
    output: Checkpoint, family: Family, plan: Plan | None, source: Checkpoint | None, lacking: list[str]
) -> Check:
    """The check of config.json. `lacking` are fields that its family needs and the config lacks. With a `source`, every
    field must be the source's (with a `plan`, the planned one) or mean the same to transformers' config class; other
    and added fields FAIL. Without a source, additions to the quantization that no tensor confirms FAIL, others WARN."""
    id, config = "structure.config", output.config
    problems, doubts = [*lacking, *_contradictions(config)], list[str]()
    found, unknown = config.get(_KEY), list[str]()
    if isinstance(found, dict):
        more, doubts, unknown = _additions(found, output.tensors)
        problems += more
    nvidia = is_nvidia(found)
    whose = "NVIDIA's dialect" if nvidia else "compressed-tensors"
    strange = [f"{_KEY}.{key}: {whose} has no such field" for key in unknown]
    if source is None:
        what = "config.json says what serving needs, and nothing that the tensors do not bear out"
        return verdict(id, what, problems, doubts + strange, "config.json", "every field of use is there")
    wanted = output_config(plan, source.config) if plan is not None else dict(source.config)
    different, respelled = _differences(config, wanted)
    doubts += [f"{key}: {_short(config.get(key))}, the source's in other words" for key in respelled]
    for key in different:
        text = f"{key}: {_short(config.get(key))}, planned {_short(wanted.get(key))}"
        served = dict(family.serving_config)
        if nvidia:
            served = dict(family.fp8_dialect.config) if family.fp8_dialect is not None else {}
        if key == _KEY and (_KEY in wanted if plan is not None else found is None or isinstance(found, dict)):
            # structure.targets judges which modules it matches; other writers spell it differently.
            doubts.append(text)
        elif plan is None and key in served and config.get(key) == served[key]:
            doubts.append(text)
        else:
            problems.append(text)
    if plan is None:
        problems += strange
    elif _KEY in wanted:
        problems += _against_plan(found if isinstance(found, dict) else {}, wanted[_KEY])
    return verdict(id, "config.json is the source's but for what serving needs", problems, doubts,
                   "config.json against the source's", f"{len(wanted)} fields equal")  # fmt: skip


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Fields that differ in meaning, and fields that differ only in spelling."""
    keys = [key for key in sorted(wanted.keys() | found.keys()) if found.get(key) != wanted.get(key)
            or (key in found) != (key in wanted)]  # fmt: skip
    keys = [key for key in keys if key in found or wanted[key] is not None]
    respelled = [key for key in keys if key in _FREE]
    keys = [key for key in keys if key not in _FREE]
    if not set(keys) - {_KEY}:
        return keys, respelled
    mine, theirs = _Meaning(found), _Meaning(wanted)
    same = bool(mine.values) and mine.values == theirs.values

    def spelled_otherwise(key: str) -> bool:
        if key in found:
            meant = theirs.of(key)
            return bool(meant == found[key]) or (found[key] is None and meant is _MISSING)
        if key in theirs.values:
            # Libraries may have different defaults: vLLM has classes of its own.
            return bool(theirs.usual.get(key, _MISSING) == wanted[key])
        # The field was merged into another one: rope_theta into rope_parameters, torch_dtype into dtype.
        return same

    respelled += [key for key in keys if key != _KEY and spelled_otherwise(key)]
    return [key for key in keys if key not in respelled], respelled


def _against_plan(found: dict[str, Any], planned: dict[str, Any]) -> list[str]:
    """How a quantization_config differs from the plan: in fields other than `_RESPELLED`, and in the arguments of each
    planned config group."""
    problems = [
        f"{_KEY}.{key}: {_short(found.get(key))}, planned {_short(planned.get(key))}"
        for key in sorted((found.keys() | planned.keys()) - _RESPELLED)
        if (found.get(key) or None) != (planned.get(key) or None)
    ]
    groups = found.get("config_groups")
    for name, group in planned["config_groups"].items():
        mine = groups.get(name) if isinstance(groups, dict) else None
        if not isinstance(mine, dict):
            continue
        for key in sorted((mine.keys() | group.keys()) - {"targets"}):
            if mine.get(key) != group.get(key):
                problems.append(
                    f"config_groups.{name}.{key}: {_short(mine.get(key))}, planned {_short(group.get(key))}"
                )
    return problems


def _contradictions(config: Mapping[str, Any]) -> list[str]:
    """Fields that occur twice with different values: which one is served depends on the reader."""
    problems = [
        f"{one} is {_short(config[one])} and {other} {_short(config[other])}"
        for one, other in _TWINS
        if one in config and other in config and config[one] != config[other]
    ]
    rope, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    older = {**(scaling if isinstance(scaling, dict) else {}), **config}
    for key, value in rope.items() if isinstance(rope, dict) else ():
        if key in older and older[key] != value:
            problems.append(f"rope_parameters.{key} is {_short(value)}, beside it stands {_short(older[key])}")
    return problems


def _additions(
    quantization: Mapping[str, Any], tensors: Mapping[str, object]
) -> tuple[list[str], list[str], list[str]]:
    """Problems, doubts and unknown fields of a quantization_config outside its config groups. Because of these fields
    vLLM (0.32, compressed_tensors.py) serves the KV cache in FP8, rotates activations or refuses sparse weights."""
    problems, doubts = list[str](), list[str]()
    scheme, sparsity = quantization.get("kv_cache_scheme"), quantization.get("sparsity_config")
    if scheme:
        owners = [{n.rpartition(".")[0] for n in tensors if n.endswith(leaf)} for leaf in (".k_scale", ".v_scale")]
        if owners[0] and owners[0] == owners[1]:
            doubts.append(f"kv_cache_scheme: the KV cache of {len(owners[0])} modules is served in {_short(scheme)}")
        else:
            problems.append(
                "kv_cache_scheme: the KV cache is quantized, and no k_scale and v_scale are stored: vLLM takes 1"
            )
    for name, transforms in _transforms(quantization.get("transform_config")):
        online = {place for place in transforms if not place.startswith("weight_")}
        alone = {place for place in online & {"input", "output"} if f"weight_{place}" not in transforms}
        if alone:
            problems.append(
                f"transform_config.{name}: rotates the {' and '.join(sorted(alone))} alone, no weight undoes it"
            )
        else:
            doubts.append(f"transform_config.{name}: weights and activations are rotated")
    if isinstance(sparsity, dict) and (sparsity.get("targets") or sparsity.get("format") not in (None, "dense")):
        problems.append(f"sparsity_config: {_short(sparsity)}: no weight here is sparse, and vLLM refuses it")
    if quantization.get("quantization_status") not in (None, "compressed"):
        problems.append(f"quantization_status is {quantization['quantization_status']!r}, the weights are compressed")
    return problems, doubts, sorted(quantization.keys() - (_NVIDIA_FIELDS if is_nvidia(quantization) else _FIELDS))


def _transforms(config: Any) -> Iterator[tuple[str, set[str]]]:
    """Name and places of every transform of a transform_config."""
    groups = config.get("config_groups") if isinstance(config, dict) else config
    if not groups:
        return
    for name, group in groups.items() if isinstance(groups, dict) else [("?", groups)]:
        applied = group.get("apply") if isinstance(group, dict) else None
        places = (
            [entry.get("location") for entry in applied if isinstance(entry, dict)] if isinstance(applied, list) else []
        )
        yield str(name), {str(place) for place in places} or {"input"}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
