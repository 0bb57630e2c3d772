"""`longlive export CAMPAIGN`: a campaign's results for other tools, as a CSV file or as runs of MLflow.

Each result becomes one run of the MLflow experiment that has the campaign's name. Parameters are the preset's
keys as used, metrics those of the catalogue, tags say where the run comes from, and artifacts are its files.
A result that is there already is left alone. mlflow is imported only here: pip install
'longlive_opt[mlflow]'.
"""

from __future__ import annotations

import argparse
import calendar
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..measurement.catalogue import METRICS
from ..measurement.result import lookup, run_label
from .campaign import Campaign, Result, load, verdict_of
from .campaign_diff import campaign_folder, name_unusable
from .tables import to_csv

ARTIFACTS = ("report.html", "result.json", "notebook.ipynb", "video.mp4", "frames.png")
PROVENANCE = {"gpu": "environment.gpu", "cpu": "environment.cpu", "driver": "environment.driver",
              "torch": "environment.torch", "cuda": "environment.cuda", "triton": "environment.triton",
              "python": "environment.python", "git_dirty": "environment.git_dirty",
              "attention_backend": "environment.attention_backend", "weights": "weights.kind",
              "model": "model.name", "preset": "preset", "title": "title", "campaign": "campaign"}
"""Tag -> its place in result.json."""
IDENTITY = "longlive_opt.result"
"""Tag that says which result a run of MLflow is: its label and when it was made."""
LONGEST = 500
"""Characters of a parameter or a tag; the oldest servers take no more."""


def parameters_of(result: Result) -> dict[str, str]:
    """The resolved keys of the run as text, lists and null as JSON."""
    texts = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
             for key, value in result["parameters"].items()}
    return {key: text[:LONGEST] for key, text in texts.items() if text}


def metrics_of(result: Result) -> dict[str, float]:
    """The catalogue's metrics by key; what is n/a is left out."""
    found = {metric.key: metric.value(result) for metric in METRICS}
    return {key: value for key, value in found.items() if value is not None}


def tags_of(result: Result) -> dict[str, str]:
    """Machine, versions, commit, weights and verdict of a run."""
    values = {name: lookup(result, path) for name, path in PROVENANCE.items()}
    tags = {name: str(value)[:LONGEST] for name, value in values.items() if value is not None}
    tags |= {"run": str(result["run"]), "verdict": verdict_of(result), "created_utc": result["created_utc"],
             IDENTITY: f"{run_label(result['preset'], result['run'])} {result['created_utc']}"}
    if commit := lookup(result, "environment.git_commit"):
        tags["mlflow.source.git.commit"] = str(commit)
    if result["hypothesis"]:
        tags["mlflow.note.content"] = f"Expected: {result['hypothesis']}"
    return tags


def to_mlflow(campaign: Campaign, uri: str) -> tuple[int, int]:
    """Write every result that the experiment does not have. Returns (written, already there).

    Raises:
        UserError: mlflow is not installed, or the store refuses.
    """
    try:
        import mlflow
    except ImportError as error:
        raise UserError("--mlflow: the package mlflow is not installed; pip install 'longlive_opt[mlflow]', "
                        "or mlflow-skinny alone.") from error
    if "://" not in uri:  # MLflow 3 wants this consent to files; who names a folder has given it
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    try:
        return _write(mlflow.MlflowClient(tracking_uri=uri), campaign)
    except (mlflow.exceptions.MlflowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--mlflow: {uri} refused ({reason}); name a folder, a database such as "
                        "sqlite:///mlflow.db, or a server that runs.") from error


def _write(client: Any, campaign: Campaign) -> tuple[int, int]:
    experiment = client.get_experiment_by_name(campaign.folder.name)
    place = experiment.experiment_id if experiment else client.create_experiment(campaign.folder.name)
    there, written = {run.data.tags.get(IDENTITY) for run in _runs(client, place)}, 0
    for result in campaign.results:
        tags = tags_of(result)
        if tags[IDENTITY] in there:
            continue
        label = run_label(result["preset"], result["run"])
        ended = _milliseconds(result["created_utc"])
        run = client.create_run(place, start_time=ended, tags=tags, run_name=label).info.run_id
        try:
            for name, value in parameters_of(result).items():
                client.log_param(run, name, value)
            for name, value in metrics_of(result).items():
                client.log_metric(run, name, value, timestamp=ended)
            for path in (campaign.folder / label / name for name in ARTIFACTS):
                if path.is_file():
                    client.log_artifact(run, str(path))
        except BaseException:
            client.delete_run(run)  # half a run would count as one that is there
            raise
        client.set_terminated(run, "FINISHED", end_time=ended)
        written += 1
    return written, len(campaign.results) - written


def _runs(client: Any, experiment: str) -> Iterator[Any]:
    token = None
    while True:
        page = client.search_runs([experiment], page_token=token)
        yield from page
        if not (token := getattr(page, "token", None)):
            return


def _milliseconds(created_utc: str) -> int:
    """Of "2026-01-31T12:00:00Z" since 1970; now for a time that was written in another way."""
    try:
        return 1000 * calendar.timegm(time.strptime(created_utc, "%Y-%m-%dT%H:%M:%SZ"))
    except ValueError:
        return int(1000 * time.time())


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, 1 where a result was left out because it cannot be used, or 2 for wrong input.
    """
    parser = argparse.ArgumentParser(prog="longlive export", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", metavar="CAMPAIGN", help="a name in outputs/, or a folder")
    parser.add_argument("--mlflow", metavar="URI", help="a folder, a database (sqlite:///mlflow.db) or a "
                        "server (http://localhost:5000)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="one row per run: metrics, verdict, machine")
    arguments = parser.parse_args(argv)
    try:
        if not arguments.mlflow and not arguments.csv:
            raise UserError("export: nothing to write; give --mlflow URI, --csv FILE, or both.")
        campaign = load(campaign_folder(arguments.campaign))
        name_unusable(campaign)
        if not campaign.results:
            raise UserError(f"{campaign.folder.name}: it has no finished run; measure presets first.")
        if arguments.csv:
            print(to_csv(campaign.results, arguments.csv))
        if arguments.mlflow:
            written, there = to_mlflow(campaign, arguments.mlflow)
            print(f"{arguments.mlflow}: {written} runs written to the experiment {campaign.folder.name}, "
                  f"{there} already there")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if campaign.problems else 0
