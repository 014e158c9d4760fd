"""What the forkserver of interrupted_runs does once for all runs: what a run imports, much of it late, its templates, and a first
plot."""

from __future__ import annotations

import gc
from contextlib import suppress
from importlib import import_module

MODULES = (
    "workflows.run.__main__",  # first: llm-compressor otherwise logs to standard output
    "workflows.run.calibrate", "calibration.convert.pipeline", "calibration.forecast.predict", "calibration.forecast.rehearsal",
    "calibration.checkpoint._kernels",  # not there without a compiler
    "compressed_tensors.linear.compressed_linear", "llmcompressor.modeling.moe.gpt_oss", "llmcompressor.modifiers.transform",
    "llmcompressor.modifiers.utils.pytorch_helpers", "transformers.models.deepseek_v4.modeling_deepseek_v4",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3_moe.modeling_qwen3_moe", "verify.report.page",
)  # fmt: skip

gc.disable()  # nothing of what is imported is garbage
for name in MODULES:
    with suppress(ModuleNotFoundError):
        import_module(name)
from calibration.checkpoint.collector import objects_frozen  # noqa: E402
from calibration.plan.versions import versions  # noqa: E402
from verify.report.page import _environment  # noqa: E402
from verify.report.plots import expert_map  # noqa: E402

versions()
for template in _environment().list_templates():
    _environment().get_template(template)  # compiles it
expert_map({(0, 0): 1.0, (0, 1): 2.0}, "", "", "")  # finds the fonts
gc.enable()
FROZEN = objects_frozen()  # kept: a generator that is dropped comes to its end
FROZEN.__enter__()  # no run goes through these objects again
