"""The shard writer: byte for byte safetensors' own file, whatever the order in which tensors are made."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from calibration.checkpoint.header import OutputTensor
from calibration.checkpoint.index import TORCH
from calibration.checkpoint.writer import DTYPE_ORDER, write_shard
from recipes.errors import WorkflowError

OTHERS = {"BOOL": torch.bool, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32, "I32": torch.int32,
          "U64": torch.uint64, "I64": torch.int64}  # fmt: skip


def tensors() -> dict[str, tuple[OutputTensor, torch.Tensor]]:
    made = {}
    for number, dtype in enumerate(sorted(DTYPE_ORDER)):
        for name, shape in ((f"z{number}", (3, number + 1)), (f"a.\u00e9{number}", ()), (f"m{number}", (0, 4))):
            value = torch.arange(max(1, torch.Size(shape).numel())).to((TORCH | OTHERS)[dtype])
            value = value[: torch.Size(shape).numel()].reshape(shape)
            made[name] = (OutputTensor(name, dtype, shape), value)
    return made


def test_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    made = tensors()
    save_file({name: value for name, (_, value) in made.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    digest = write_shard(
        tmp_path / "ours", [o for o, _ in made.values()], ((n, v) for n, (_, v) in sorted(made.items(), reverse=True))
    )
    theirs = (tmp_path / "theirs").read_bytes()
    assert (tmp_path / "ours").read_bytes() == theirs
    assert digest == hashlib.sha256(theirs).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_an_empty_shard(tmp_path: Path) -> None:
    save_file({}, tmp_path / "theirs", metadata={"format": "pt"})
    write_shard(tmp_path / "ours", [], [])
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(2, 3), r"w: made torch.float32 \[2, 3\], the plan says BF16 \[2, 3\]"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), r"w: made torch.bfloat16 \[3, 2\], the plan says"),
        (None, "w: was not made"),
    ],
)
def test_what_the_plan_does_not_say_is_refused(tmp_path: Path, made: torch.Tensor | None, message: str) -> None:
    pairs = [] if made is None else [("w", made)]
    with pytest.raises(WorkflowError, match=message):
        write_shard(tmp_path / "shard", [OutputTensor("w", "BF16", (2, 3))], pairs)
    assert not list(tmp_path.iterdir())
