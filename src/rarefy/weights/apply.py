"""Writing pruned weights back into a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import BadInput, Unsupported
from ..site import sites
from .linear import MaskedLinear


def apply(model: nn.Module, plan: Mapping[str, MaskedLinear]) -> nn.Module:
    """Write each method's pruned weight into its site's own module; nothing is written if any site cannot take it.

    Raises:
        BadInput: an empty plan, a method of another shape or not fitted, or one layer named twice.
        Unsupported: a site that is no linear layer, not a weights method, or a weight that other modules share, such as
            an output layer tied to the embedding: pruning it would change them too.
    """
    if not plan:
        raise BadInput("the plan is empty; name at least one layer to prune")
    owners: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(path)
    targets, taken = [], {}
    for name, method in plan.items():
        site = sites(model, name)[name]
        if site.kind != "linear" or not isinstance(method, MaskedLinear):
            raise Unsupported(f"{name}: {type(method).__name__} cannot be written into a {site.kind} site")
        module = model.get_submodule(site.module_path)
        weight = module.weight
        assert isinstance(weight, Tensor)                      # a linear site's module
        shared = owners.get(id(weight), [])
        if len(shared) > 1:
            raise Unsupported(f"{name}: its weight is shared by {', '.join(shared)}; leave {name} out")
        if site.module_path in taken:
            raise BadInput(f"{name} and {taken[site.module_path]} are the same layer; name it once")
        taken[site.module_path] = name
        method.ready()
        shape = weight.shape if isinstance(module, nn.Linear) else weight.T.shape
        if shape != method.weight_OI.shape:
            raise BadInput(f"{name}: fitted to {list(method.weight_OI.shape)}, but the layer is {list(shape)}")
        targets.append((method, module))
    for method, module in targets:
        method.bake(module)
    return model
