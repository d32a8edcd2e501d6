"""The measured process: takes one request, imports the tool, measures the call, prints the answer.

Tools are imported by name when they are asked for, so that a peer's interpreter needs nothing but that peer.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.floor import read_and_write
from benchmarks.measure import measure, touch_free_memory

if TYPE_CHECKING:
    from collections.abc import Callable

    Request = dict[str, Any]
    Call = Callable[[], object]

GEMM = 4096
_PARTS = {
    "bake": ("sdmerge.lora.bake", "sdformats.adapters.layouts"),
    "convert": ("sdmerge.conversion",),
    "extract": ("sdmerge.lora.extract",),
}
"""What a call would import when it is first made."""


def prepare_floor(request: Request) -> Call:
    """See `floor.read_and_write`."""
    inputs = [Path(path) for path in request["inputs"]]
    output, threads, overlap = Path(request["output"]), request["threads"], request["overlap"]
    return lambda: read_and_write(inputs, output, threads=threads, overlap=overlap)


def prepare_sdmerge(request: Request) -> Call:
    """Prepare the call that a user of the python API makes. Idle means: everything is imported."""
    sdmerge = import_module("sdmerge")
    # the calls below import these when first needed
    for name in ("torch", "sdformats.layouts", "sdmerge.methods", "sdmerge.run", "sdmerge.api"):
        import_module(name)
    job, inputs = request["job"], request["inputs"]
    common = {"output": request["output"], "threads": request["threads"], "overwrite": True}
    for part in _PARTS.get(job["operation"], ()):
        import_module(part)
    calls: dict[str, Call] = {
        "add-diff": lambda: sdmerge.add_difference(*inputs, alpha=job["alpha"], **common),
        "bake": lambda: sdmerge.bake(inputs[0], inputs[1:], **common),
        "convert": lambda: sdmerge.convert(*inputs, to=job["layout"], **common),
        "extract": lambda: sdmerge.extract_lora(*inputs, rank=job["rank"], **common),
        "ties": lambda: sdmerge.merge("ties", inputs[1:], {"density": 0.2}, base=inputs[0], **common),
        "weighted": lambda: sdmerge.weighted_sum(inputs, **weights, **common),
    }
    weights = {"alpha": job["alpha"]} if job["alpha"] is not None else {"weights": list(job["coefficients"])}
    return calls[job["operation"]]


def prepare_mecha(request: Request) -> Call:
    """Prepare a recipe as the documentation of sd-mecha builds it.

    Its defaults: float32 arithmetic, float16 out, as many threads as it likes.
    """
    mecha = import_module("sd_mecha")
    job, output = request["job"], request["output"]
    models = [mecha.model(path) for path in request["inputs"]]
    if job["operation"] == "add-diff":
        recipe = mecha.add_difference(*models, alpha=job["alpha"])
        return lambda: mecha.merge(recipe, output=output)
    if job["operation"] == "ties":
        base, *others = models
        change = mecha.ties_sum(*(mecha.subtract(model, base) for model in others), k=0.2)
        add = import_module("sd_mecha.extensions.builtin.merge_methods.linear").add_difference
        trimmed = add(base, change, alpha=1.0)  # its own add_difference_ties fails in 1.1.8
        return lambda: mecha.merge(trimmed, output=output)
    recipe, total = models[0], job["coefficients"][0]
    for model, weight in zip(models[1:], job["coefficients"][1:], strict=True):
        total += weight
        recipe = mecha.weighted_sum(recipe, model, alpha=weight / total)
    return lambda: mecha.merge(recipe, output=output)


def prepare_gemm(request: Request) -> Call:
    """Prepare a large product in float32, whose rate the arithmetic of a bake is measured against."""
    torch = import_module("torch")
    torch.set_num_threads(request["threads"])
    a, b = (torch.randn(GEMM, GEMM) for _ in range(2))
    out = torch.mm(a, b)
    return lambda: torch.mm(a, b, out=out)


def prepare_usual(request: Request) -> Call:
    """Prepare the usual pattern on the same tensors, as LyCORIS's and PEFT's merging do it, in memory.

    Load the model and the adapters; for each adapter and each layer form up times down in float32 and add it to the
    weight in its own type.
    """
    safetensors, torch = import_module("safetensors.torch"), import_module("torch")
    places = import_module("benchmarks.adapter_files").places

    def call() -> None:
        model = safetensors.load_file(request["inputs"][0])
        for path in request["inputs"][1:]:
            adapter = safetensors.load_file(path)
            for module, name in places(adapter, model).items():
                up, down = (adapter[f"{module}.lora_{end}.weight"].float().flatten(1) for end in ("up", "down"))
                scale = adapter[f"{module}.alpha"].item() / down.shape[0]
                weight = model[name]
                model[name] = (weight.float() + scale * (up @ down).reshape(weight.shape)).to(weight.dtype)
        safetensors.save_file(model, request["output"])

    torch.set_num_threads(request["threads"])
    return call


def prepare_mergekit(request: Request) -> Call:
    """Prepare ``mergekit-pytorch``, its command for raw checkpoints, with its method ``linear``.

    It accumulates in float32 and rounds once. Its defaults otherwise.
    """
    yaml, script = import_module("yaml"), import_module("mergekit.scripts.merge_raw_pytorch")
    job, output = request["job"], Path(request["output"])
    models = [
        {"model": path, "parameters": {"weight": weight}}
        for path, weight in zip(request["inputs"], job["coefficients"], strict=True)
    ]
    config = output.with_suffix(".yaml")
    settings = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    arguments = [str(config), str(output.with_suffix(""))]
    return lambda: script.main(arguments, standalone_mode=False)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())


TOOLS: dict[str, tuple[str, Callable[[Request], Call]]] = {
    "floor": ("", prepare_floor),
    "gemm": ("", prepare_gemm),
    "sdmerge": ("sdmerge", prepare_sdmerge),
    "usual": ("", prepare_usual),
    "peft": ("peft", lambda request: import_module("benchmarks.bake_peers").prepare("peft", request)),
    "lycoris": ("lycoris-lora", lambda request: import_module("benchmarks.bake_peers").prepare("lycoris", request)),
    "sd-mecha": ("sd-mecha", prepare_mecha),
    "mergekit": ("mergekit", prepare_mergekit),
}


def main() -> None:
    """Measure the request on standard input."""
    request = json.load(sys.stdin)
    package, prepare = TOOLS[request["tool"]]
    call = prepare(request)
    touch_free_memory(Path(request["output"]).parent, size_of(Path(request["inputs"][0])))
    measurement = measure(call)
    version = importlib.metadata.version(package) if package else ""
    print(json.dumps({"measurement": asdict(measurement), "version": version}), flush=True)


if __name__ == "__main__":
    main()
