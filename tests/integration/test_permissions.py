"""Code that a checkpoint brings does not run inside the real vLLM, whatever the checkpoint's own recipe says."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.checks import Serving
from tests.exported import export, recipe
from tests.faults.editing import json_file
from tests.models import standard
from verify.__main__ import main

EVIL = """open({path!r}, "w").write("ran")
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("flags", [[], pytest.param(["--trust-remote-code"], marks=pytest.mark.slow)])
def test_a_tokenizer_of_a_stranger_runs_on_the_flag_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source, output, ran = Path(standard.write(tmp_path / "source", "llama")), tmp_path / "output", tmp_path / "ran"
    export(source, output, recipe(source, output, [r"re:.*_proj$"]))
    own = (output / "recipe.yaml").read_text().replace("trust_remote_code: false", "trust_remote_code: true")
    assert "trust_remote_code: true" in own
    (output / "recipe.yaml").write_text(own)
    (output / "evil.py").write_text(EVIL.format(path=str(ran)))
    code = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    json_file("tokenizer_config.json", lambda settings: settings.update(code))(output)
    main([str(output), *flags, "--logs", str(tmp_path / "logs"), "--python", Serving().python])
    assert "[vllm_worker] load" in (tmp_path / "logs" / "serving.log").read_text()
    assert ran.exists() is bool(flags)
