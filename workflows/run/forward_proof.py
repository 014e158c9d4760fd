"""Compares vLLM's forward with transformers' on the miniature of a source, before a long run: what is calibrated is the model
that transformers computes, what is served is the one that vLLM computes, and where they differ both may work without a word.

Both read one plain BF16 copy of the miniature. On a CPU they compute in float32, where equal models agree to 1e-11; on an
accelerator vLLM computes in BF16, and what that alone costs the model is measured beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.families.registry import open_source
from calibration.plan.task import Task
from recipes.checks import Serving
from recipes.errors import Interrupted, WorkflowError
from verify.checks import Check, unchecked
from verify.serving.agreement import ID, WHAT, engine_logits, judge_forward
from verify.serving.engine import failure, platform_refusal
from verify.serving.serving import Experiment, Extras, verify_serving
from workflows.run.plain_copy import remove_plain_copy, write_plain_copy

if TYPE_CHECKING:
    import torch

#: vLLM's log, request and result of the source, in the run directory.
LOGS = "logs/rehearsal-source"
#: Bytes of a parameter in float32, in which a CPU computes, and in BF16.
_FLOAT32, _BF16 = 4, 2
_ONLY_BF16 = "requires BF16"
"""What vLLM 0.32 says of a part of a model that has no float32 on a CPU (ops/cpu/gdn_attention.py)."""


def needs(small: Task, on_device: bool) -> dict[str, int]:
    """Bytes of disk, and of memory in vLLM besides its own, that `compare_forwards` takes."""
    parameters = small.formats.parameters
    return {"disk": _BF16 * parameters, "memory": (_BF16 if on_device else _FLOAT32) * parameters}


def compare_forwards(small: Task, rows: list[list[int]], options: Serving, place: Path, logs: Path) -> Check:
    """The check of both forwards on the token ids `rows` of the source of `small`. `place` takes the plain copy for the time
    being. UNCHECKED with the reason if one of the two cannot run it. Raises Interrupted only."""
    copy = place / "plain"
    try:
        found = write_plain_copy(small, copy)
        if found.directory is None:
            return unchecked(ID, WHAT, found.why)
        return _compare(copy, rows, options, logs, small.recipe.source.trust_remote_code)
    except Interrupted:
        raise
    except WorkflowError as error:
        return unchecked(ID, WHAT, error.problems[0])
    finally:
        remove_plain_copy(copy)


def _compare(copy: Path, rows: list[list[int]], options: Serving, logs: Path, trust_remote_code: bool) -> Check:
    import torch

    from calibration.model.own_logits import own_logits

    captured, on_device = copy.parent / "logits", torch.accelerator.is_available()
    prompts = [{"kind": f"row {number}", "token_ids": row} for number, row in enumerate(rows)]
    for dtype in (torch.bfloat16,) if on_device else (torch.float32, torch.bfloat16):
        shutil.rmtree(captured, ignore_errors=True)
        result = verify_serving(
            copy,
            options.model_copy(update={"dtype": str(dtype).removeprefix("torch."), "max_tokens": 1, "text": None}),
            logs,
            extras=Extras(trust_remote_code=trust_remote_code),
            experiment=Experiment(prompts, captured),
        )[1]
        if _ONLY_BF16 not in str(result.get("error")):
            break
    if (why := platform_refusal(result) or failure(result)) is not None:
        return unchecked(ID, WHAT, f"vLLM did not run the source: {why.splitlines()[0]}; its log is in {logs}")
    ids, engine = engine_logits(captured)
    if not ids:
        return unchecked(ID, WHAT, "no token of the calibration text fits verify.serving.max_model_len")
    source = open_source(copy)

    def own(wanted: torch.dtype) -> list[torch.Tensor]:
        return own_logits(source, ids, copy.parent, wanted, trust_remote_code)

    how = (
        f"{len(ids)} rows of the calibration text; vLLM in {str(dtype).removeprefix('torch.')}, transformers in float32"
    )
    try:
        return judge_forward(own(torch.float32), engine, None if dtype == torch.float32 else own(dtype), how)
    except WorkflowError:
        raise
    except Exception as error:  # transformers' classes raise what they like, and torch if memory runs out
        lines = str(error).strip().splitlines() or [""]
        return unchecked(ID, WHAT, f"transformers did not run the source: {type(error).__name__}: {lines[0]}")


def rows_of(batches: Iterable[dict[str, Any]]) -> list[list[int]]:
    """The token ids of every sample."""
    return [row.tolist() for batch in batches for row in batch["input_ids"]]
