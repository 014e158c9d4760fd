"""What a batch reports to: a command of the user, and an MLflow file store."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from recipes.errors import EnvironmentProblem, RecipeError

_HOOK_SECONDS = 60
_METRICS = ("size", "bits_per_parameter", "seconds", "peak_memory", "perplexity", "kl")


class Hooks:
    """Calls `--notify CMD` and writes to `--mlflow DIR`. A failure of either is reported, as `say(text, level)`, and never ends
    a batch."""

    def __init__(self, batch: Path, notify: str | None, mlflow: Path | None, say: Callable[[str, str], None]) -> None:
        """Raises RecipeError for a command that cannot be split, EnvironmentProblem if mlflow is not installed."""
        self.batch, self.say, self.given, self.store = batch, say, notify, mlflow
        try:
            self.command = shlex.split(notify) if notify else []
        except ValueError as error:
            raise RecipeError(f"--notify {notify}: {error}; it is split as a shell would, without a shell") from None
        if mlflow is not None:
            _import_mlflow()

    def require_command(self) -> None:
        """Raises RecipeError if this machine has no program of the command's name: it would be missed at the first failure."""
        if self.command and shutil.which(self.command[0]) is None:
            raise RecipeError(
                f"--notify {self.given}: {self.command[0]} is no program here; name one, or leave --notify out"
            )

    def notify(self, event: str, run: str = "", reason: str = "") -> None:
        """Runs the command with BATCH_EVENT (`failure` or `end`), BATCH_SUMMARY (path of summary.json), BATCH_RUN and
        BATCH_REASON in its environment."""
        if not self.command:
            return
        facts = {
            "BATCH_EVENT": event,
            "BATCH_SUMMARY": str((self.batch / "summary.json").absolute()),
            "BATCH_RUN": run,
            "BATCH_REASON": reason,
        }
        try:
            done = subprocess.run(
                self.command, env=os.environ | facts, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, timeout=_HOOK_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            self.say(f"--notify: {error}", "warning")
            return
        if done.returncode != 0:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or [""])[-1]
            self.say(f"--notify: {self.command[0]} ended with {done.returncode}: {last}", "warning")

    def track(self, found: Mapping[str, Any]) -> None:
        """Writes one MLflow run per run of the summary `found`: parameters, known metrics, and its state as a tag."""
        if self.store is None:
            return
        # MLflow 3.17 asks for a database; its file store is the one that needs only mlflow-skinny.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        mlflow = _import_mlflow()
        try:
            mlflow.set_tracking_uri(self.store.absolute().as_uri())
            mlflow.set_experiment(Path(found["batch"]).name)
            for row in found["runs"]:
                with mlflow.start_run(run_name=row["name"]):
                    mlflow.log_params({key: row[key] for key in ("output", "source_size", "parameters")})
                    mlflow.log_metrics({key: row[key] for key in _METRICS if row[key] is not None})
                    mlflow.set_tags({key: row[key] or "" for key in ("state", "verdict", "reason")})
        except Exception as error:  # no failure of a tracker, of whatever kind, may end a night's batch
            self.say(f"--mlflow {self.store}: {type(error).__name__}: {error}", "warning")


def _import_mlflow() -> Any:
    try:
        import mlflow
    except ImportError:
        raise EnvironmentProblem(
            "--mlflow: mlflow is not installed here; pip install 'nvfp4-workflows[tracking]', or leave --mlflow out"
        ) from None
    return mlflow
