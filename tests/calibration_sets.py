"""Small data sets for calibration, and what `load_batches` makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from calibration.data.batches import load_batches
from recipes.schema import Calibration


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(tokenizer: Any, dataset: str, source: Path = Path("unused"), embedding: Any = None, **options: Any) -> Any:
    options = {"num_samples": 1, "max_seq_length": 128, **options}
    return load_batches(
        Calibration(dataset=dataset, **options), tokenizer, source_directory=source, embedding=embedding
    )


def token_rows(data: Any) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist()
        for batch in data.batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def decoded(tokenizer: Any, data: Any) -> list[str]:
    return [tokenizer.decode(row) for row in token_rows(data)]
