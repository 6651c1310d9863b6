"""Writing pruned weights back into a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import BadInput, Unsupported
from ..site import sites
from .linear import MaskedLinear


def apply(model: nn.Module, plan: Mapping[str, MaskedLinear]) -> nn.Module:
    """Write each method's pruned weight into its site's own module; nothing is written if any site cannot take it.

    Raises:
        BadInput: a method of another shape. Unsupported: a site that is no linear layer, or not a weights method.
    """
    targets = []
    for name, method in plan.items():
        site = sites(model, name)[name]
        if site.kind != "linear" or not isinstance(method, MaskedLinear):
            raise Unsupported(f"{name}: {type(method).__name__} cannot be written into a {site.kind} site")
        module = model.get_submodule(site.module_path)
        method.ready()
        shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
        if shape != method.weight_OI.shape:
            raise BadInput(f"{name}: fitted to {list(method.weight_OI.shape)}, but the layer is {list(shape)}")
        targets.append((method, module))
    for method, module in targets:
        method.bake(module)
    return model
