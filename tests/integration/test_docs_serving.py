"""The commands of docs/serving.md in the argument parser of the vLLM that is installed."""

import json
import re
import shlex
import subprocess
from pathlib import Path

from calibration.families.serving import SERVING, serve_arguments
from tests.reference.engine import FORKED_PYTHON
from verify.serving.engine import WORKER, environment

ROOT = Path(__file__).parents[2]
PARSE = """
import json, runpy, sys
runpy.run_path(sys.argv[2])["declare"]()
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.reasoning import ReasoningParserManager
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser
for words in json.loads(sys.argv[1]):
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    validate_parsed_serve_args(options)
    assert not options.reasoning_parser or options.reasoning_parser in ReasoningParserManager.list_registered()
    assert not options.tool_call_parser or options.tool_call_parser in ToolParserManager.list_registered()
"""


def test_vllm_takes_every_serve_command_that_the_documents_name() -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"vllm serve (.*)", text)]
    assert len(commands) >= 2
    # The cards' commands, of every type of model that has a line in calibration.families.serving.
    for model in [*SERVING, "llama"]:
        config = {"model_type": model, "num_attention_heads": 64, "max_position_embeddings": 131_072}
        commands.append(["OWNER/NAME", *serve_arguments(config, 10**11, chats=True, experts=True)])
    assert len(commands) >= 12
    done = subprocess.run(
        [FORKED_PYTHON, "-c", PARSE, json.dumps(commands), str(WORKER.with_name("torchvision_operators.py"))],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
