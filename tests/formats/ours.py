"""Our dictionaries with weights that hide nothing: scales that are not 1, free decoder norms, biases and thresholds.

Shape letters: B = rows, D = input width, E = output width, F = latents.
"""

import torch

from rarefy.catalogue import entry
from rarefy.formats import LAYOUTS

D, E, F, K = 6, 4, 12, 3
METHODS = {
    "latents/relu": {}, "latents/p_annealed": {}, "latents/gated": {}, "latents/gated_p_annealed": {}, "latents/gradient_topk": {"k": K},
    "latents/jumprelu": {}, "latents/topk": {"k": K}, "latents/abs_topk": {"k": K},
    "latents/annealed_topk": {"k": K}, "latents/nested_topk": {"k": K}, "latents/mutual_feature": {"k": K}, "latents/archetypal": {"k": K},
    "latents/group_max": {"k": 4}, "latents/batch_topk": {"k": K}, "latents/matryoshka": {"k": K, "prefixes": "4"},
}
FORMS: dict[str, dict] = {"autoencoder": {}, "transcoder": {"d_out": D}, "narrowing": {"d_out": E}, "skipping": {"d_out": D, "skip": True}}
"""Form -> arguments."""
_ALL = set(METHODS)
_RELU_TOPK = {f"latents/{name}" for name in ("topk", "annealed_topk", "nested_topk", "mutual_feature", "archetypal", "gradient_topk")}
_JUMPS = {"latents/relu", "latents/p_annealed", "latents/jumprelu", "latents/batch_topk", "latents/matryoshka"}
_SKIPS = {"latents/relu", "latents/gated", "latents/jumprelu", "latents/topk", "latents/batch_topk"}
SERVED = {
    ("saelens", "autoencoder"): _ALL - {"latents/group_max"},
    ("saelens", "transcoder"): _JUMPS, ("saelens", "narrowing"): _JUMPS, ("saelens", "skipping"): _JUMPS & _SKIPS,
    ("saelens-v5", "autoencoder"): _ALL - {"latents/group_max", "latents/abs_topk"},
    ("sparsify", "skipping"): _RELU_TOPK & _SKIPS, ("circuit-tracer", "skipping"): _JUMPS & _SKIPS,
    ("sparsify", "autoencoder"): _RELU_TOPK | {"latents/group_max"}, ("sparsify", "transcoder"): _RELU_TOPK | {"latents/group_max"},
    ("dictionary_learning", "autoencoder"): _ALL - {"latents/group_max", "latents/abs_topk"},
    ("gemma_scope", "autoencoder"): _JUMPS, ("gemma_scope", "transcoder"): _JUMPS, ("gemma_scope", "narrowing"): _JUMPS,
    ("circuit-tracer", "transcoder"): _JUMPS,
}
"""(layout, form) -> methods that it can hold; every other combination must be refused."""
_FORMS_OF = {"latents/gradient_topk": {"autoencoder"}}
PAIRS = [
    (layout, form, name) for layout in LAYOUTS for form in FORMS for name in METHODS
    if (form != "skipping" or name in _SKIPS) and form in _FORMS_OF.get(name, FORMS)
]
CAN = [(layout, form, name) for layout, form, name in PAIRS if name in SERVED.get((layout, form), ())]
MADE = {"model": "builtin", "site": "layers.3.mlp.in", "target": "layers.3.mlp.out"}


@torch.no_grad()
def ours(name, form="autoencoder", scale=1.7, scale_out=None):
    """A stirred method in eval mode."""
    method = entry(name).load()(d_in=D, width=F, **FORMS[form], **METHODS[name])
    generator = torch.Generator().manual_seed(sum(map(ord, name + form)))
    for key, value in [*method.named_parameters(), *method.named_buffers()]:
        if value.is_floating_point() and key not in ("weight", "weight_L"):
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
    method.scale.fill_(scale)
    method.scale_out.fill_((scale if form == "autoencoder" else 0.6) if scale_out is None else scale_out)
    if hasattr(method, "tau"):
        method.tau.fill_(0.3)
        method.seen.fill_(5)
    method.after_step(0)                                        # unit rows where the method keeps them, mixtures of points where it makes them
    return method.eval()


def rows(seed=1):
    """[16, D] rows."""
    return torch.randn(16, D, generator=torch.Generator().manual_seed(seed)) + 0.3


