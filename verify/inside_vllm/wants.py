"""Build vLLM's model class without memory, load tensors that have no data into it, and write where each of them went:
`PYTHON wants.py REQUEST RESULT`.

Everything is on torch's meta device: shapes and dtypes without data. vLLM's own loading says which parameter takes a
tensor, and vLLM's own layers say how they will run and under which name they looked up their quantization.

Runs inside vLLM's own interpreter as a script, as `worker` does; `verify.serving.wants` starts it.

REQUEST.json
    checkpoint          directory with config.json as it is to be served, and the side files; no shards
    tensors             {name: [dtype as safetensors spells it, shape]}
    trust_remote_code   bool
    processor, dtype, moe_input_scales   as in worker

RESULT.json (keys always there)
    format 1; ok: no exception. stage: import | build | load | done; error: null | {type, message, traceback}
    version             vLLM's, or null
    architecture        the class of the model
    packed              names of layers that the class says are several of the hub's: a target names those, not the layer
    layers              {name in vLLM's tree: {looked_up: the name under which it looked up its quantization,
                        scheme: class of its scheme or method, format: nvfp4 | fp8 | "", kind: linear | experts |
                        embedding | attention | "", rows: those of each part that its matrix is made of}} of every
                        layer that a tensor of the request was written to
    written             {tensor: [parameter, ...]}; a tensor that no parameter took is not there
    refused             [{tensor, message}]: vLLM raised; tensors after the last of MOST_REFUSED were not tried
    unwritten           parameters that no tensor wrote, or not whole
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_REFUSED = 100
"""Tensors that may be refused before the rest is not tried."""


def main(request_path: str, result_path: str) -> int:
    """Run the stages and write RESULT; 0 if all ran, 1 if one raised."""
    result: dict[str, Any] = {
        "format": 1, "ok": False, "stage": "import", "error": None, "version": None, "architecture": "", "packed": [],
        "layers": {}, "written": {}, "refused": [], "unwritten": [],
    }  # fmt: skip
    try:
        run(json.loads(Path(request_path).read_text()), result)
        result["ok"] = True
    except BaseException as error:  # the result must be written in any case, even for SystemExit
        lines = traceback.format_exc().splitlines()[-40:]
        result["error"] = {"type": type(error).__name__, "message": str(error), "traceback": lines}
    WORKER.write_json(Path(result_path), result)
    return 0 if result["ok"] else 1


def run(request: dict[str, Any], result: dict[str, Any]) -> None:
    """Fills `result` stage by stage."""
    WORKER.sibling("processor").set_features(request["processor"], request["dtype"])
    _, vllm = WORKER.import_engine(request)
    from vllm.platforms import current_platform

    result["version"] = vllm.__version__
    result["stage"] = "build"
    config = json.loads((Path(request["checkpoint"]) / "config.json").read_text())
    if why := WORKER.no_variant(config, current_platform):
        raise WORKER.NoVariant(f"vLLM {vllm.__version__} {why}")
    model, looked_up = build(request)
    result["architecture"] = type(model).__name__
    result["packed"] = sorted(getattr(model, "packed_modules_mapping", None) or {})
    result["stage"] = "load"
    describe(model, looked_up, load(model, request["tensors"], result), result)
    result["stage"] = "done"


def build(request: dict[str, Any]) -> tuple[Any, dict[int, str]]:
    """vLLM's model on meta, and the name under which each layer looked up its quantization, by the layer's id."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    if current_platform.is_cpu():  # DeepSeek-V4 makes events, which only streams would use
        torch.cuda.Event = type("Event", (), {})
    config = EngineArgs(
        model=request["checkpoint"], skip_tokenizer_init=True, dtype=request["dtype"], enforce_eager=True,
        trust_remote_code=request["trust_remote_code"], enable_prefix_caching=False, max_model_len=512,
    ).create_engine_config()  # fmt: skip
    looked_up: dict[int, str] = {}
    if config.quant_config is not None:
        kind = type(config.quant_config)
        original = kind.get_quant_method

        def recorded(self: Any, layer: Any, prefix: str) -> Any:
            looked_up[id(layer)] = prefix
            return original(self, layer, prefix)

        kind.get_quant_method = recorded
    with set_current_vllm_config(config), tempfile.NamedTemporaryFile(prefix="meeting-") as meeting:
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
            return initialize_model(config), looked_up


def load(model: Any, tensors: dict[str, Any], result: dict[str, Any]) -> dict[str, int]:
    """Has vLLM's own loading take the tensors, and records the parameters that each wrote to. Returns the number of
    elements that were written of every parameter."""
    import torch
    from safetensors.torch import _TYPES
    from torch.utils._python_dispatch import TorchDispatchMode

    dtypes = {"F8_E8M0": torch.float8_e8m0fnu} | _TYPES
    owners = {p.untyped_storage()._cdata: name for name, p in [*model.named_parameters(), *model.named_buffers()]}
    elements: dict[str, int] = {}
    written: dict[str, list[str]] = {}
    offered: list[tuple[str, torch.Tensor]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
                return 1  # vLLM compares scales of one layer: all are alike here
            if func._schema.is_mutable and isinstance(args[0], torch.Tensor):
                values = [a for a in args[1:] if isinstance(a, torch.Tensor)]
                self.note(args[0], values)
                if not args[0].is_meta and any(value.is_meta for value in values):
                    return args[0]  # a parameter that its class makes on the CPU whatever the device
            return func(*args, **(kwargs or {}))

        @staticmethod
        def note(target: Any, values: list[Any]) -> None:
            parameter = owners.get(target.untyped_storage()._cdata)
            if parameter is None or not offered:
                return
            elements[parameter] = elements.get(parameter, 0) + target.numel()
            known = [sources[c] for v in values if (c := v.untyped_storage()._cdata) in sources]
            for tensor in known or [offered[-1][0]]:
                if parameter not in (at := written.setdefault(tensor, [])):
                    at.append(parameter)

    def offer() -> Iterator[tuple[str, torch.Tensor]]:
        for found in waiting:
            offered.append(found)
            yield found

    # Before they are recorded, which takes 12 us each. All are kept: a storage that is freed gives its address to another one.
    made = [(name, torch.empty(shape, dtype=dtypes[dtype], device="meta")) for name, (dtype, shape) in tensors.items()]
    sources = {tensor.untyped_storage()._cdata: name for name, tensor in made}
    waiting = iter(made)
    with torch.no_grad(), Record():
        while len(result["refused"]) < MOST_REFUSED:
            try:
                model.load_weights(offer())
                break
            except Exception as error:
                message = f"{type(error).__name__}: {error}"[:500]
                result["refused"].append({"tensor": offered[-1][0] if offered else "", "message": message})
    result["written"] = written
    return elements


def describe(model: Any, looked_up: dict[int, str], elements: dict[str, int], result: dict[str, Any]) -> None:
    """The layers that were written to, and the parameters that were not."""
    sentinel, watch = WORKER.sibling("sentinel"), WORKER.sibling("watch")
    for name in sorted({name.rpartition(".")[0] for names in result["written"].values() for name in names}):
        layer = model.get_submodule(name)
        kinds = watch.describe_layer(layer) or {"method": "", "scheme": "", "format": "", "kind": ""}
        result["layers"][name] = {
            "looked_up": looked_up.get(id(layer), ""), "scheme": kinds["scheme"] or kinds["method"],
            "format": kinds["format"], "kind": kinds["kind"],
            "rows": [int(rows) for rows in getattr(layer, "output_partition_sizes", None) or ()],
        }  # fmt: skip
    result["unwritten"] = [
        name
        for name, parameter in model.named_parameters()
        if elements.get(name, 0) < parameter.numel()
        and name.rpartition(".")[2] not in sentinel.NOT_LOADED
        and not sentinel.unused_input_scale(model, name)
    ]


def _worker() -> Any:
    spec = importlib.util.spec_from_file_location("inside_vllm.worker", Path(__file__).with_name("worker.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WORKER = _worker()

if __name__ == "__main__":
    WORKER.end(main(sys.argv[1], sys.argv[2]))
