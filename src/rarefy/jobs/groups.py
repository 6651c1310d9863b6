"""`rarefy groups`: which layers are alike enough to share one dictionary."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..builtin.corpus import Text
from ..errors import BadInput
from ..latents.groups import LINKAGES, angular_distances, layer_groups
from ..places import sites
from .flows import names_in
from .models import check_context, cut_text, opened, read_documents
from .screen import Screen


@dataclass
class GroupsResult:
    """Groups of neighbouring sites, and the distances they come from."""

    sites: list[str]
    groups: list[list[str]]
    distance: list[list[float]]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema": 1, "sites": self.sites, "groups": self.groups, "distance": self.distance}

    def show(self, out: Path) -> None:
        """Print each group as --site takes it, with the greatest angle within."""
        screen, at = Screen(), {name: i for i, name in enumerate(self.sites)}
        for group in self.groups:
            widest = max(self.distance[at[a]][at[b]] for a in group for b in group)
            join = " --join mix" if len(group) > 1 else ""
            screen.say(f"--site {','.join(group)}{join}   greatest mean angle within: {widest * 180:.1f} degrees")


def groups(
    model: str, site: str, count: int, *, linkage: str, data: str, context: int, tokens: int, screen: Screen,
) -> GroupsResult:
    """Do it: distances on the text that a run of `rarefy fit` with the same data would be fitted on."""
    check_context(context, tokens=tokens)
    if linkage not in LINKAGES:
        raise BadInput(f"--linkage {linkage!r} must be one of {', '.join(LINKAGES)}")
    docs = read_documents(data, screen)
    found = opened(model, screen)
    names = list(dict.fromkeys(name for part in names_in(site) for name, s in sites(found.model, part).items() if s.kind == "stream"))
    if not names:
        raise BadInput(f"--site {site} names no stream site, whose rows have angles; give such as 'layers.*.resid_post'")
    if not 1 <= count <= len(names):
        raise BadInput(f"--groups {count} must be in 1..{len(names)}, the sites named")
    text: Text = cut_text(docs, found, screen, context=context, fit_tokens=tokens, judge_tokens=1)
    with screen.stage(f"angles between {len(names)} sites"):
        distance_LL = angular_distances(found.model, names, (batch.input_ids for batch in text.fit))
    return GroupsResult(names, [[names[i] for i in group] for group in layer_groups(distance_LL, count, linkage)], distance_LL.tolist())
