"""Places of a model in the words of other libraries.

Theirs need no translation when they are read: `rarefy.sites` understands TransformerLens hook names and raw module paths.
"""

from __future__ import annotations

import re

_LENS = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "resid_post": "hook_resid_post", "attn.q": "attn.hook_q", "attn.k": "attn.hook_k",
    "attn.v": "attn.hook_v", "attn.z": "attn.hook_z", "attn.out": "hook_attn_out", "mlp.out": "hook_mlp_out", "mlp.hidden": "mlp.hook_post",
    "mlp.in": "ln2.hook_normalized",
}
_TRACER = {"mlp.in": "mlp.hook_in", "mlp.out": "mlp.hook_out"}
_SITE = re.compile(r"layers\.(\d+)\.(.+)")


def layer_of(site: str | None) -> int | None:
    """Number of the layer that a site's name holds, in whosever words; None where there is none."""
    found = re.search(r"(?:layers?|blocks|h)[._](\d{1,5})(?!\d)", site or "")
    return int(found[1]) if found else None


def lens_name(site: str | None) -> str | None:
    """TransformerLens' name of a site; names that it has no word for are given as they are."""
    match = _SITE.fullmatch(site or "")
    return f"blocks.{match[1]}.{_LENS[match[2]]}" if match and match[2] in _LENS else site


def tracer_hook(site: str | None) -> str | None:
    """circuit-tracer's name of a site, which leaves the layer out."""
    match = _SITE.fullmatch(site or "")
    return None if match is None else _TRACER.get(match[2], _LENS.get(match[2], match[2]))


def from_tracer(hook: str, layer: int) -> str:
    """The reverse of `tracer_hook`; a hook without a word here is given in TransformerLens' form."""
    words = {theirs: ours for table in (_LENS, _TRACER) for ours, theirs in table.items()}
    return f"layers.{layer}.{words[hook]}" if hook in words else f"blocks.{layer}.{hook}"
