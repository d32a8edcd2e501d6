"""Baking as PEFT and LyCORIS do it: the same tensors as modules of torch, merged by their code, between loading and saving."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from benchmarks.adapter_files import places

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    Merge = Callable[[dict[str, nn.Module], list[dict[str, Tensor]]], None]


def prepare(tool: str, request: dict[str, Any]) -> Callable[[], None]:
    """Import what the tool needs and return the call: load the model and the adapters, merge, save."""
    safetensors, torch = import_module("safetensors.torch"), import_module("torch")
    library, merge = _TOOLS[tool]
    import_module(library)

    def call() -> None:
        model = safetensors.load_file(request["inputs"][0])
        adapters = [safetensors.load_file(path) for path in request["inputs"][1:]]
        names = places(adapters[0], model)
        modules = {module: _module(model[name]) for module, name in names.items()}
        merge(modules, adapters)
        for module, name in names.items():
            model[name] = modules[module].weight.data
        safetensors.save_file(model, request["output"])

    torch.set_num_threads(request["threads"])
    return call


def _module(weight: Tensor) -> nn.Module:
    """Return a layer without a bias that has this weight."""
    torch = import_module("torch")
    with torch.device("meta"):
        rows, columns, *kernel = weight.shape
        made = (
            torch.nn.Conv2d(columns, rows, kernel, bias=False) if kernel else torch.nn.Linear(columns, rows, bias=False)
        )
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    return made  # type: ignore[no-any-return]


def merge_with_peft(modules: dict[str, nn.Module], adapters: list[dict[str, Tensor]]) -> None:
    """Inject every adapter, load its factors, merge all of them; the layers' weights change in place."""
    peft, torch = import_module("peft"), import_module("torch")
    whole = torch.nn.ModuleDict(modules)
    for number, adapter in enumerate(adapters):
        first = next(iter(modules))
        config = peft.LoraConfig(
            r=adapter[f"{first}.lora_down.weight"].shape[0],
            lora_alpha=adapter[f"{first}.alpha"].item(),
            target_modules=list(modules),
            init_lora_weights=False,
        )
        peft.inject_adapter_in_model(config, whole, str(number), low_cpu_mem_usage=True)
        for name in modules:
            for factors, end in ((whole[name].lora_A, "down"), (whole[name].lora_B, "up")):
                stored = adapter[f"{name}.lora_{end}.weight"]
                factors[str(number)].weight = torch.nn.Parameter(stored, requires_grad=False)
    for name in modules:
        whole[name].merge(adapter_names=[str(number) for number in range(len(adapters))])


def merge_with_lycoris(modules: dict[str, nn.Module], adapters: list[dict[str, Tensor]]) -> None:
    """Make LyCORIS' module of every layer and adapter, and merge it into the layer."""
    locon = import_module("lycoris.modules.locon").LoConModule
    for adapter in adapters:
        for name, module in modules.items():
            up, down, alpha = (adapter[f"{name}.{end}"] for end in ("lora_up.weight", "lora_down.weight", "alpha"))
            locon.make_module_from_state_dict(name, module, up, down, None, alpha, None).merge_to(1.0)


_TOOLS: dict[str, tuple[str, Merge]] = {
    "peft": ("peft", merge_with_peft),
    "lycoris": ("lycoris.modules.locon", merge_with_lycoris),
}
