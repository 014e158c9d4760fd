"""`python -m workflows.inspect_checkpoint PATH [--recipe R]`: shows what a checkpoint contains, and the plan that a
recipe makes of it.

Reads headers only: seconds, even for a terabyte.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from calibration.checkpoint.collector import collector_paused
from calibration.checkpoint.formats import Formats
from calibration.checkpoint.index import CONFIG_NAME, Checkpoint
from calibration.families.family import ROUTED, SHARED
from calibration.families.registry import family_of, open_source
from calibration.plan.budget import BudgetTask
from calibration.plan.plan import Plan
from calibration.plan.planner import make_plan
from calibration.plan.source_check import contradictions
from recipes.errors import SourceError, WorkflowError, printable, without_numbers
from recipes.loader import load_recipe
from recipes.streams import exit_with, parse_arguments, print_result, printed
from recipes.units import size
from verify.report.tables import OutputConsole
from workflows.source import resolve_source


@collector_paused()
def describe_checkpoint(checkpoint: Checkpoint, formats: Formats) -> dict[str, Any]:
    """A checkpoint's headers summarized as JSON: `patterns` (name pattern, count, dtype, stored format, shapes, bytes),
    `parts` (bytes), `problems` (how the tensors differ from what config.json promises), `blocks`, experts per block,
    routers, norms, MTP blocks, total bytes and parameters."""
    family = family_of(checkpoint.config, str(checkpoint.directory / CONFIG_NAME), checkpoint.tensors)
    places = {name: family.place(name) for name in checkpoint.tensors}
    rows: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, header in checkpoint.tensors.items():
        scale = name in formats.companions
        rows[(without_numbers(name), header.dtype, "scale" if scale else formats.of(name).label)].append(name)
    part_bytes: Counter[str] = Counter()
    for name, header in checkpoint.tensors.items():
        part_bytes["MTP" if places[name].mtp else places[name].part] += header.nbytes
    blocks = sorted({place.block for place in places.values() if place.block is not None})
    experts: dict[int, set[int]] = {block: set() for block in blocks}
    for place in places.values():
        if place.part == ROUTED and place.block is not None and place.expert is not None:
            experts[place.block].add(place.expert)
    misnamed, differing = contradictions(formats, family)
    parts = Counter((places[n].part, places[n].mtp) for n in checkpoint.tensors if n.endswith(".weight"))
    return {
        "checkpoint": str(checkpoint.directory),
        "family": family.described,
        "model_type": checkpoint.config.get("model_type"),
        "shards": len(checkpoint.shards),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.total_bytes,
        "parameters": formats.parameters,
        "blocks": len(blocks),
        "routed_experts_per_block": sorted({len(found) for found in experts.values()}),
        "blocks_with_shared_experts": len(
            {p.block for p in places.values() if p.part == SHARED and p.block is not None}
        ),
        "routers": parts[("router", False)],
        "norms": parts[("norm", False)],
        "mtp_blocks": len(family.mtp_blocks(checkpoint.tensors)),
        "stored_formats": dict(Counter(formats.of(n).label for n in checkpoint.tensors if n not in formats.companions)),
        "parts": dict(part_bytes.most_common()),
        "problems": [*misnamed, *differing],
        "patterns": [
            {
                "pattern": pattern,
                "count": len(names),
                "dtype": dtype,
                "stored": stored,
                "shapes": sorted({tuple(checkpoint.tensors[name].shape) for name in names}),
                "bytes": sum(checkpoint.tensors[name].nbytes for name in names),
            }
            for (pattern, dtype, stored), names in rows.items()
        ],
    }


@collector_paused()
def describe_plan(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """A plan as JSON: counts of actions, the action and its reason per name pattern, the predicted output."""
    rows: Counter[tuple[str, str, str]] = Counter()
    for step in plan.steps.values():
        if step.action != "consume":
            rows[(without_numbers(step.source), step.action, without_numbers(step.reason))] += 1
    return {
        "digest": plan.digest,
        "groups": {
            name: {"scheme": scheme.name, "modules": len(plan.modules(name))} for name, scheme in plan.groups.items()
        },
        "input_headroom": plan.input_headroom,
        "actions": dict(Counter(step.action for step in plan.steps.values())),
        "steps": [
            {"pattern": pattern, "action": action, "count": count, "reason": reason}
            for (pattern, action, reason), count in rows.items()
        ],
        "output_tensors": len(plan.outputs),
        "output_shards": len(plan.shards),
        "output_bytes": plan.output_bytes,
        "source_bytes": checkpoint.total_bytes,
        "bits_per_parameter": round(plan.bits_per_parameter, 3),
        "warnings": list(plan.warnings),
    }


def headroom(factor: float) -> str:
    """The text for `calibration.input_headroom` in tables."""
    times = "" if factor == 1 else f"{factor:g} times "
    return f"calibrated, each admits {times}the largest calibrated input"


def print_checkpoint(facts: dict[str, Any], console: Console) -> None:
    """Prints the result of `describe_checkpoint` as tables."""
    experts = ", ".join(map(str, facts["routed_experts_per_block"])) or "0"
    console.print(
        f"{facts['checkpoint']}: {facts['model_type']} (family {facts['family']}), "
        f"{facts['parameters']:,} parameters, {size(facts['bytes'])} in {facts['shards']} shards, "
        f"{facts['tensors']:,} tensors"
    )
    console.print(
        f"{facts['blocks']} blocks; routed experts per block: {experts}; blocks with shared experts: "
        f"{facts['blocks_with_shared_experts']}; routers: {facts['routers']}; norms: {facts['norms']}; "
        f"MTP blocks: {facts['mtp_blocks']}"
    )
    table = Table("name pattern", "count", "dtype", "stored", "shape", "bytes", title="Tensors")
    for row in facts["patterns"]:
        shapes = ", ".join(str(list(shape)) for shape in row["shapes"][:2]) + (" ..." if len(row["shapes"]) > 2 else "")
        table.add_row(row["pattern"], f"{row['count']:,}", row["dtype"], row["stored"], shapes, size(row["bytes"]))
    console.print(table)
    table = Table("part", "bytes", "share", title="Parts")
    for part, nbytes in facts["parts"].items():
        table.add_row(part, size(nbytes), f"{nbytes / max(facts['bytes'], 1):.1%}")
    console.print(table)


def print_plan(facts: dict[str, Any], console: Console) -> None:
    """Prints the result of `describe_plan` as a table, with the prediction and the warnings."""
    table = Table("name pattern", "count", "action", "why", title=f"Plan {facts['digest'][:12]}")
    for row in facts["steps"]:
        table.add_row(row["pattern"], f"{row['count']:,}", row["action"], row["reason"])
    console.print(table)
    groups = ", ".join(f"{name}: {g['scheme']} x {g['modules']:,}" for name, g in facts["groups"].items())
    console.print(f"config groups: {groups}")
    if facts.get("input_headroom"):
        console.print(f"input scales: {headroom(facts['input_headroom'])}")
    console.print(
        f"output: {size(facts['output_bytes'])} in {facts['output_shards']} shards "
        f"(source {size(facts['source_bytes'])}), {facts['bits_per_parameter']} bits per parameter"
    )
    for warning in facts["warnings"]:
        console.print(f"warning: {warning}", style="yellow")


def describe_budget(budget: BudgetTask) -> dict[str, Any]:
    """What is known before anything is measured, as JSON: sizes in bytes and bits per parameter, units and their candidates."""
    least, most = budget.nbytes(budget.smallest), budget.nbytes(budget.largest)
    return {
        "bits_per_parameter": budget.budget.bits_per_parameter,
        "bytes": budget.limit,
        "least": {"bytes": least, "bits_per_parameter": round(budget.bits(least), 3)},
        "most": {"bytes": most, "bits_per_parameter": round(budget.bits(most), 3)},
        "fixed_bytes": budget.fixed_bytes,
        "candidates": budget.budget.candidates,
        "tokens": budget.budget.tokens,
        "units": len(budget.units),
        "modules": sum(len(unit.modules) for unit in budget.units),
        "units_by_candidate": dict(Counter(name for unit in budget.units for name in unit.sizes)),
    }


def print_budget(facts: dict[str, Any], console: Console) -> None:
    """Prints the result of `describe_budget`."""
    options = ", ".join(f"{name} in {count}" for name, count in facts["units_by_candidate"].items())
    console.print(
        f"budget: {facts['bits_per_parameter']:g} bits per parameter are {facts['bytes']:,} bytes; the candidates give "
        f"{facts['least']['bits_per_parameter']:.3f} to {facts['most']['bits_per_parameter']:.3f} "
        f"({facts['fixed_bytes']:,} bytes are no choice)\n"
        f"budget: the run measures {facts['units']:,} units ({facts['modules']:,} modules) on {facts['tokens']:,} tokens and "
        f"then chooses; possible are {options}; the plan shown is the smallest",
        soft_wrap=True,
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns an exit code of `workflows.run`."""
    parser = argparse.ArgumentParser(prog="python -m workflows.inspect_checkpoint", description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="checkpoint directory (default: the recipe's source)")
    parser.add_argument("--recipe", type=Path, help="show the plan of this recipe for the checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of --recipe")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parse_arguments(parser, arguments)
    if options.checkpoint is None and options.recipe is None:
        parser.error("name a checkpoint directory, or a recipe with --recipe")
    try:
        recipe = load_recipe(options.recipe, options.set) if options.recipe else None
        if options.checkpoint is None and recipe is not None:
            options.checkpoint = resolve_source(recipe.source)
        checkpoint = open_source(options.checkpoint)
        formats = Formats(checkpoint)
        facts = describe_checkpoint(checkpoint, formats)
        budget = BudgetTask.of(recipe, formats) if recipe is not None and recipe.budget is not None else None
        if budget is not None:
            recipe = budget.recipe_of(budget.smallest)
        choices = None if budget is None else describe_budget(budget)
        plan = describe_plan(make_plan(checkpoint, formats, recipe), checkpoint) if recipe else None
    except WorkflowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    code = SourceError.exit_code if facts["problems"] else 0
    if options.json:
        print_result(
            json.dumps({"checkpoint": facts, "plan": plan} | ({"budget": choices} if choices else {}), indent=2)
        )
        return printed() or code
    console = OutputConsole()
    print_checkpoint(facts, console)
    if plan is not None:
        print_plan(plan, console)
    if choices is not None:
        print_budget(choices, console)
    for problem in facts["problems"]:
        print(f"error: {printable(problem)}", file=sys.stderr)
    return printed() or code


if __name__ == "__main__":
    exit_with(main)
