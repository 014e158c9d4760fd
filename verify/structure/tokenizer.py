"""Checks tokenizer and generation files: they must be the source's or, without a source, fit the config."""

from __future__ import annotations

import filecmp
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from calibration.checkpoint.files import is_directory, is_file, read_json_object, read_text
from calibration.checkpoint.token_ids import token_id_problems
from calibration.families.registry import language_config
from recipes.errors import SourceError
from verify.checks import Check, verdict

_FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip
#: Optional files that transformers and vLLM also read; writers copy them unchanged.
_AS_THEY_ARE = (
    "tokenizer.model", "tekken.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.json",
    "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "adapter_config.json",
    "params.json",
)  # fmt: skip
#: Fields about the writer of a file, and fields that another check compares.
_FREE = frozenset({
    "transformers_version", "_from_model_config", "name_or_path", "backend", "is_local", "local_files_only",
    "chat_template", "added_tokens_decoder", "special_tokens_map_file", "tokenizer_file", "legacy", "processor_class",
})  # fmt: skip
#: Values that equal an absent field: in tokenizer_config.json, and in generation_config.json (vLLM's defaults for
#: sampling parameters that a request does not set).
_NEUTRAL: dict[str, Any] = {
    "clean_up_tokenization_spaces": False, "split_special_tokens": False, "add_prefix_space": False, "errors": "replace",
    "add_bos_token": False, "add_eos_token": False, "padding_side": "right", "truncation_side": "right",
    "model_input_names": ["input_ids", "attention_mask"], "sp_model_kwargs": {}, "use_default_system_prompt": False,
    "special_tokens": [], "model_max_length": int(1e30), "use_fast": True,
}  # fmt: skip
_NEUTRAL_GENERATION: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "num_beams": 1, "max_length": 20,
}  # fmt: skip
#: Classes that use tokenizer.json unchanged.
_GENERIC = frozenset({"PreTrainedTokenizer", "TokenizersBackend"})
_MODEL_DEFAULTS = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
#: An embedding is padded by at most a few percent; a vocabulary much smaller than it belongs to another model.
_SMALLEST_SHARE = 0.75


def tokenizer_check(directory: Path, config: dict[str, Any], source: Path | None) -> Check:
    """The check of the tokenizer: with a source every file must be byte-equal or mean the same; without one, every
    token must have a row in the embedding."""
    id, what = "structure.tokenizer", "tokenizer, chat template and generation settings are the source's"
    own, problems, doubts = _vocabulary(directory / "tokenizer.json"), list[str](), list[str]()
    problems += [f"tokenizer.json: {p}" for p in token_id_problems(_json(directory / "tokenizer.json"))[:3]]
    rows = language_config(config).get("vocab_size")
    if own and isinstance(rows, int):
        largest = max(own.values())
        if largest >= rows:
            problems.append(f"tokenizer.json: token {largest} has no row in an embedding of vocab_size {rows}")
        elif largest + 1 < _SMALLEST_SHARE * rows and source is None:
            doubts.append(f"tokenizer.json: {largest + 1} tokens for vocab_size {rows}: another model's?")
    elif not own and (directory / "tokenizer.json").exists():
        problems.append("tokenizer.json: no vocabulary can be read from it")
    if source is None:
        if not any((directory / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
            doubts.append("no tokenizer file")
        what = "the tokenizer fits the config"
        return verdict(id, what, problems, doubts, "tokenizer.json against config.json", f"{len(own)} tokens")
    equal = 0
    templates = {f"additional_chat_templates/{path.name}" for d in (directory, source) for path in _templates(d)}
    for name in (*_FILES, *_AS_THEY_ARE, *sorted(templates)):
        ours, theirs = directory / name, source / name
        if is_file(ours) and is_file(theirs) and filecmp.cmp(ours, theirs, shallow=False):
            equal += 1
        elif theirs.exists() or ours.exists():
            different = _difference(directory, source, name)
            (problems if different else doubts).append(f"{name}: {different or 'spelled otherwise, means the same'}")
    return verdict(id, what, problems, doubts, "files compared with the source's", f"{equal} files equal")


def _difference(directory: Path, source: Path, name: str) -> str | None:
    """How a file that is not byte-equal differs in meaning; None if it does not. A missing file means the same as an
    empty one, or what the other files of that side contain."""
    ours, theirs = _json(directory / name), _json(source / name)
    if (directory / name).exists() and not ours and name.endswith(".json"):
        return "not readable"
    if name == "chat_template.jinja":
        return "another chat template" if _template(directory) != _template(source) else None
    if name == "tokenizer_config.json":
        if _template(directory) != _template(source):
            return "another chat template"
        if not ours:
            return "missing"
        return _class(ours, theirs) or _decoder(directory, ours, theirs) or _changed(
            _tokens(ours), _tokens(theirs), _NEUTRAL)  # fmt: skip
    if name == "tokenizer.json":
        if _vocabulary(directory / name) != _vocabulary(source / name):
            return "another vocabulary" if ours else "missing or not readable"
        mine, other = _canonical(directory / name), _canonical(source / name)
        changed = [key for key in sorted(mine.keys() | other.keys()) if mine.get(key) != other.get(key)]
        return f"another {changed[0]}" if changed else None
    if name == "generation_config.json":
        if not ours:
            return "missing" if theirs else None
        # transformers also writes the config's token ids there.
        ids = {key: value for key, value in _json(source / "config.json").items() if key.endswith("token_id")}
        return _changed(ours, {key: ids[key] for key in ids.keys() & ours.keys()} | theirs, _NEUTRAL_GENERATION)
    return _older(directory, source, name)


def _older(directory: Path, source: Path, name: str) -> str | None:
    """Compares a file whose content may also be in tokenizer.json or tokenizer_config.json; other files must be the
    source's."""
    ours, there, had = _json(directory / name), (directory / name).exists(), (source / name).exists()
    vocabulary = _vocabulary(directory / "tokenizer.json")
    if name in _AS_THEY_ARE or name.startswith("additional_chat_templates/"):
        if ours and ours == _json(source / name):
            return None
        return "added: the source has none" if not had else "differs" if there else "missing"
    if not there:
        return None if vocabulary else "missing"
    if name == "special_tokens_map.json":
        known = _tokens(_json(source / "tokenizer_config.json")) | _tokens(_json(source / name))
        return _changed(_tokens(ours), {key: known.get(key) for key in _tokens(ours)}, _NEUTRAL)
    model = _json(directory / "tokenizer.json").get("model")
    if name == "merges.txt":
        text = read_text(directory / name, errors="replace").splitlines()
        merges = _plain_merges(model.get("merges") if isinstance(model, dict) else None)
        same = [line for line in text if line and not line.startswith("#version")] == merges
    else:
        same = bool(ours) and all(vocabulary.get(token) == id for token, id in ours.items())
    return None if same else "is not what tokenizer.json says"


def _changed(ours: dict[str, Any], theirs: dict[str, Any], neutral: dict[str, Any]) -> str | None:
    """The first field that differs, or that only one side has, and that changes the meaning."""
    for key in sorted((ours.keys() | theirs.keys()) - _FREE):
        if key.startswith("_"):
            continue
        mine, other = (_meant(key, side.get(key), neutral) for side in (ours, theirs))
        if mine != other:
            return f"{key} is {_spelled(mine)}, the source has {_spelled(other)}"
    return None


def _spelled(value: Any) -> str:
    return "left out" if value is None else f"{value!r:.60}"


def _meant(key: str, value: Any, neutral: dict[str, Any]) -> Any:
    """A value independent of its spelling: tokens as text, one end token or a list, values that equal an absent
    field."""
    if key.endswith("token_id"):
        return sorted(set(value)) if isinstance(value, list) and all(isinstance(v, int) for v in value) else (
            None if value is None else [value])  # fmt: skip
    if key == "model_max_length" and isinstance(value, int | float) and value > 1e20:
        value = neutral.get(key)
    value = _text(value)
    return None if key in neutral and value == neutral[key] else value


def _text(value: Any) -> Any:
    """A token as text: some writers add attributes, which are also in tokenizer.json."""
    if isinstance(value, dict) and "content" in value:
        return value["content"]
    return [_text(item) for item in value] if isinstance(value, list) else value


def _tokens(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json with its additional special tokens under one name (transformers 5 renamed them)."""
    further = [t for key in ("additional_special_tokens", "extra_special_tokens")
               if isinstance(t := config.get(key), list | dict)]  # fmt: skip
    listed = sorted({str(_text(t)) for some in further for t in (some.values() if isinstance(some, dict) else some)})
    rest = {key: value for key, value in config.items()
            if key not in ("additional_special_tokens", "extra_special_tokens", "tokenizer_class")}  # fmt: skip
    return rest | {"special_tokens": listed}


def _class(ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    mine, other = (str(side.get("tokenizer_class")).removesuffix("Fast") for side in (ours, theirs))
    return None if mine == other or mine in _GENERIC else f"tokenizer_class is {mine}, the source has {other}"


def _decoder(directory: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    """How added_tokens_decoder differs from the source's and from tokenizer.json; None if it equals either or is
    absent."""
    mine = ours.get("added_tokens_decoder")
    if not mine or mine == theirs.get("added_tokens_decoder"):
        return None
    added = _json(directory / "tokenizer.json").get("added_tokens")
    known = {str(t.get("id")): {k: v for k, v in t.items() if k != "id"} for t in added or () if isinstance(t, dict)}
    same = isinstance(mine, dict) and all(known.get(id) == token for id, token in mine.items())
    return None if same else "added_tokens_decoder is not what tokenizer.json says"


def _canonical(path: Path) -> dict[str, Any]:
    """tokenizer.json as the tokenizers library writes it, so that only the meaning is compared; unchanged if the
    library cannot read it."""
    content = _json(path)
    try:
        if not token_id_problems(content):  # the library would allocate memory for the largest id
            content = json.loads(Tokenizer.from_str(json.dumps(content)).to_str())
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException:  # the library panics on some files, and its panics are not Exceptions
        content = dict(content)
    model, post = content.get("model"), content.get("post_processor")
    if isinstance(model, dict):
        content["model"] = {key: value for key, value in model.items() if value not in (None, _MODEL_DEFAULTS.get(key))}
        content["model"]["merges"] = _plain_merges(model.get("merges"))
    if isinstance(post, dict) and post.get("single") == [{"Sequence": {"id": "A", "type_id": 0}}]:
        content["post_processor"] = None  # a template of only the text adds nothing, like no template
    return {key: value for key, value in content.items() if value is not None}


def _plain_merges(merges: Any) -> Any:
    """Merges as joined text, in either spelling."""
    return [" ".join(map(str, m)) if isinstance(m, list) else m for m in merges] if isinstance(merges, list) else merges


def _templates(directory: Path) -> list[Path]:
    folder = directory / "additional_chat_templates"
    return sorted(folder.glob("*.jinja")) if is_directory(folder) else []


def _template(directory: Path) -> Any:
    path = directory / "chat_template.jinja"
    with suppress(SourceError):
        return read_text(path, errors="replace").strip()
    template = _json(directory / "tokenizer_config.json").get("chat_template")
    return template.strip() if isinstance(template, str) else template


def _vocabulary(path: Path) -> dict[str, int]:
    """Token -> id, including added tokens; empty if the file has no readable vocabulary."""
    content = _json(path)
    model, found = content.get("model"), dict[str, int]()
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        found |= {str(token): id for token, id in vocabulary.items() if isinstance(id, int)}
    elif isinstance(vocabulary, list):
        found |= {str(entry[0]): id for id, entry in enumerate(vocabulary) if isinstance(entry, list) and entry}
    added = content.get("added_tokens")
    for entry in added if isinstance(added, list) else []:
        if isinstance(entry, dict) and isinstance(entry.get("id"), int):
            found[str(entry.get("content"))] = entry["id"]
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_json_object(path, constants=True)
    except SourceError:
        return {}
