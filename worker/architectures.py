"""Networks by name: what a library's own registry lists, built with JSON arguments, never with weights of its own."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import monai.networks.nets
import timm
import torch
import torchvision.models
from torch.overrides import TorchFunctionMode

from shared.errors import StageFailed
from shared.recipe import Architecture

CONSTRUCTION_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NotImplementedError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def new_module(architecture: Architecture) -> torch.nn.Module:
    """The named network with random weights, fp32, on the CPU. Raises StageFailed as `constructor` does."""
    return construct(constructor(architecture), architecture, None).float()


def parameters_of(architecture: Architecture) -> Mapping[str, inspect.Parameter]:
    """The arguments of the network's constructor by name."""
    return inspect.signature(registry(architecture.library)[architecture.name]).parameters


def constructor(architecture: Architecture) -> Callable[[], torch.nn.Module]:
    """What builds the named network: the library's own callable, bound to the recipe's arguments.

    Raises StageFailed: unknown_architecture, invalid_arguments.
    """
    known = registry(architecture.library)
    if architecture.name not in known:
        close = difflib.get_close_matches(architecture.name, known, n=3, cutoff=0.5)
        some = ", ".join(close or sorted(known)[:5])
        raise StageFailed(
            f"{architecture.library} has no network named {architecture.name!r}.",
            hint=f"Close names: {some}." if close else f"It has {len(known)}, among them {some}.",
            code="unknown_architecture",
        )
    build = known[architecture.name]
    fixed = _without_downloads(build, architecture)
    return lambda: build(**{**architecture.arguments, **fixed})


def registry(library: str) -> Mapping[str, Callable[..., torch.nn.Module]]:
    """Every network of a library by the name that a recipe may give it."""
    if library == "torchvision":
        modules = (torchvision.models, torchvision.models.segmentation)
        names = [name for module in modules for name in torchvision.models.list_models(module=module)]
        return {name: torchvision.models.get_model_builder(name) for name in names}
    if library == "timm":
        return {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
    return {
        name: found
        for name, found in vars(monai.networks.nets).items()
        if isinstance(found, type) and issubclass(found, torch.nn.Module) and not name.startswith("_")
    }


def _without_downloads(build: Callable[..., Any], architecture: Architecture) -> dict[str, Any]:
    """Values for the arguments that would fetch or read weights, so that none does."""
    parameters = inspect.signature(build).parameters
    fetching = [name for name in parameters if "pretrain" in name or name.startswith("weights")]
    for name, value in architecture.arguments.items():
        reads = "pretrain" in name or name.startswith("weights") or ("path" in name and isinstance(value, str))
        if reads and value not in (None, False):
            raise StageFailed(
                f"The argument {name!r} of {architecture.name} would load weights by itself.",
                hint="Leave it out: the weights come from the upload.",
                code="invalid_arguments",
            )
    return {name: False if isinstance(parameters[name].default, bool) else None for name in fetching}


class LargeTensorsOnMeta(TorchFunctionMode):
    """Within it, a tensor of more than 65,536 elements has a shape but no memory.

    Not all go to torch's meta device, because constructors compute on small ones (a schedule of drop rates).
    """

    FACTORIES = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FACTORIES:
            sizes = kwargs.get("size", args[0] if args and isinstance(args[0], tuple | list) else args)
            if math.prod(int(size) for size in sizes if isinstance(size, int)) > 2**16:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def construct(
    build: Callable[[], torch.nn.Module], architecture: Architecture, mode: TorchFunctionMode | None
) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision|timm")
            warnings.filterwarnings("ignore", category=FutureWarning, module="monai|torchvision|timm")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="monai|torchvision|timm")
            warnings.filterwarnings("ignore", message="The default weight initialization of")
            if mode is None:
                return build()
            with mode:
                return build()
    except MemoryError:
        raise
    except CONSTRUCTION_ERRORS as error:
        raise StageFailed(
            f"{architecture.name} cannot be built with these arguments: {error or type(error).__name__}",
            hint=f"It takes {_signature(architecture)}.",
            code="invalid_arguments",
        ) from error


def _signature(architecture: Architecture) -> str:
    parameters = inspect.signature(registry(architecture.library)[architecture.name]).parameters
    return ", ".join(name for name in parameters if name not in ("self", "args", "kwargs"))
