"""`longlive show PRESET`: what a preset switches on, what that needs, and what it ran at."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..config import KEYS, ExperimentConfig
from ..errors import UserError
from ..files import load_yaml, project_root
from ..measurement.catalogue import metric_of
from ..measurement.result import read_campaign
from .plan import Layout, choose_presets, parse_settings

SHOWN = ("ss_mean", "ss_max", "fps", "ps_mean", "peak_allocated", "error_ratio")


def describe(layout: Layout, preset: str, profile: Path | None = None, settings: Sequence[str] = (),
             every_key: bool = False) -> list[str]:
    """The lines of the page.

    Raises:
        UserError: the preset or the profile is unknown, or a key is refused.
    """
    choose_presets(layout, [preset])
    asked = load_yaml(layout.params / f"{preset}.yaml")
    asked |= (load_yaml(profile) if profile else {}) | parse_settings(settings)
    config = ExperimentConfig.from_mapping(asked)
    values, defaults = config.to_dict(), ExperimentConfig().to_dict()
    lines = [f"{preset}: {config.title}", "", f"Expected: {config.hypothesis or 'nothing stated'}", "",
             "Keys:"]
    lines += [f"  {key:22} {str(values[key])[:60]:24} {KEYS[key].doc}" for key in KEYS
              if every_key or values[key] != defaults[key] and key not in ("hypothesis", "title", "name")]
    from ..optimizations import optimizations_of  # imports torch

    lines += ["", "Optimizations, in the order in which they are applied:"]
    lines += [f"  {one.name:22} {one.exactness}" for one in optimizations_of(config)] or ["  none"]
    return [*lines, "", "Measured:", *(_measured(layout, preset) or ["  nothing yet"])]


def _measured(layout: Layout, preset: str) -> list[str]:
    """A line per first run of the preset in the campaigns of outputs/."""
    lines = []
    campaigns = [path for path in sorted((layout.root / "outputs").glob("*")) if (path / preset).is_dir()]
    for campaign in campaigns:
        results, _ = read_campaign(campaign)
        for run in results:
            if run["preset"] == preset and run["run"] == 1:
                machine = run["environment"]["gpu"] or run["environment"].get("cpu") or "unknown machine"
                text = ", ".join(f"{metric.label} {metric.with_unit(run)}" for metric in map(metric_of, SHOWN)
                                 if metric.value(run) is not None)
                lines.append(f"  outputs/{campaign.name}, {run['model']['name']} on {machine}: {text}")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 for wrong input."""
    parser = argparse.ArgumentParser(prog="longlive show", description=__doc__)
    parser.add_argument("preset", metavar="PRESET")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="goes over the preset's values")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="over both")
    parser.add_argument("--all", action="store_true", help="show the keys that have their defaults, too")
    arguments = parser.parse_args(argv)
    layout = Layout(project_root())
    try:
        print("\n".join(describe(layout, arguments.preset, arguments.profile, arguments.set, arguments.all)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
