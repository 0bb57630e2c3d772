"""What the notebooks call: one experiment from its parameters to its result.json, a few verbs in order.

    run = Experiment.open(globals())   # check the parameters
    run.build()                        # load the model, apply the optimizations
    run.measure()                      # rehearse, then measure the stream
    run.film()                         # a short video
    run.judge()                        # does it show its prompts? (of the small world; may be left out)
    run.compare()                      # quality against the campaign's baseline
    run.save()                         # result.json, the only sign of success
    run.vary({"local_attn_size": [9]}) # the same again with one key changed, added to result.json
    run.reading()                      # what was expected, what was measured, what follows
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import html
import logging
import time
import warnings
from pathlib import Path
from typing import Any, Mapping, Sequence

import pandas as pd
import torch
from IPython.display import HTML, display

from . import decision, figures, judgement, metrics, provenance, quality, results, video
from .config import RUN_KEYS, ExperimentConfig, check_baseline
from .errors import UserError
from .fidelity import Reference, compare_blocks, difference_chart
from .inputs import project_path, script_of
from .measurement import Measurement
from .optimizations import build_pipeline
from .reading import reading_html
from .results import REFERENCE_FILE
from .variations import variations_table

# torchmetrics loads a progress bar that misses ipywidgets; nothing here shows one.
warnings.filterwarnings("ignore", message="IProgress not found")
# The function that this warning recommends instead is as private as the one that is called.
warnings.filterwarnings("ignore", message="torch.cuda._set_allocator_settings is deprecated")
# torch.compile on a machine with the CUDA toolkit but without a GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda it: "No CUDA runtime" not in it.getMessage())

RESULT_FILE = "result.json"


class Experiment:
    """One run of one preset. Shows what it does by `print`, since a notebook is its terminal."""

    def __init__(self, config: ExperimentConfig, campaign: str, run: int, folder: Path):
        self.config = config
        self.campaign = campaign
        self.number = run
        self.folder = folder
        self.script = script_of(config)
        self.world: dict[str, Any] | None = None

    @classmethod
    def open(cls, namespace: Mapping[str, Any]) -> Experiment:
        """Check the notebook's parameters, `globals()` of its first cells, before anything is built.

        Raises:
            UserError: an unknown parameter, a wrong type or value, a baseline with optimizations, or a folder
                that cannot be written.
        """
        given = notebook_parameters(namespace)
        campaign, run, output_dir = (given.pop(key, default) for key, default in
                                     zip(RUN_KEYS, ("manual", 1, "")))
        config = ExperimentConfig.from_mapping(given)
        check_baseline(config)
        if type(run) is not int or run < 1:
            raise UserError(f"run: {run!r} is no run number; write 1, or 2 for a repetition.")
        folder = project_path(output_dir or f"outputs/{campaign}/{config.name}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir: cannot make {output_dir}: {error.strerror}; choose another folder."
            ) from error
        pd.set_option("display.max_colwidth", None)
        print(f"{config.title}: preset {config.name}, {config.model}, {config.device}, {config.model_dtype}")
        return cls(config, campaign, run, folder)

    def parameters(self) -> pd.DataFrame:
        """The parameters that are not the baseline's on the laptop, as a table."""
        default, own = ExperimentConfig().to_dict(), self.config.to_dict()
        rows = {key: {"value": own[key], "default": default[key]} for key in own if own[key] != default[key]}
        return pd.DataFrame.from_dict(rows, orient="index", columns=["value", "default"])

    def build(self) -> pd.DataFrame:
        """Load the model and apply the optimizations; returns what each did."""
        self.pipeline = build_pipeline(self.config)
        self.measurement = Measurement(self.pipeline, self.script)
        self.session = self.measurement.session
        print(f"ready after {self.pipeline.setup_s['load']:.1f} s: {self.pipeline.model.name}, weights: "
              f"{self.pipeline.weights['kind']}, attention: {self.pipeline.attention_backend}")
        return pd.DataFrame(
            [
                {"optimization": room["name"], "level": room["level"], "what it did": room["report"]["done"]}
                for room in self.pipeline.rooms
            ],
            columns=["optimization", "level", "what it did"],
        )

    def measure(self) -> pd.DataFrame:
        """Rehearse, so that compilation and capture stay out of every latency, then measure a stream without
        and one with prompt switches (see `measurement`); returns the headline figures.
        """
        self.measurement.rehearse()
        self.measured, self.company, self.clocks = self.measurement.run()
        return self._headline()

    def film(self) -> HTML:
        """Generate the script's video with its prompt switches; returns a player. Not measured."""
        self.session.reset()
        self.world = None  # of the video before
        self.chunks = [dataclasses.replace(chunk, frames=chunk.frames.cpu(), latents=chunk.latents.cpu())
                       for chunk in self.session.play(self.script, self.config.video_blocks)]
        self.frames = torch.cat([chunk.frames[0] for chunk in self.chunks])
        shown = video.shrink(self.frames, self.config.video_width)
        video.write_mp4(self.folder / "video.mp4", shown, self.pipeline.model.fps, crf=self.config.video_crf)
        labels = [
            f"block {chunk.block}" + (": new prompt" if chunk.switched else "") for chunk in self.chunks
        ]
        video.contact_sheet(
            self.folder / "frames.png",
            torch.stack([chunk.frames[0, -1] for chunk in self.chunks]),
            labels=labels,
            max_width=2 * (self.config.video_width or 800),
        )
        if self.is_reference:
            Reference.of(self.chunks).save(self.folder / REFERENCE_FILE)
        return HTML(video.video_html(self.folder / "video.mp4", caption=" -> ".join(self.script.prompts)))

    def judge(self) -> pd.DataFrame:
        """Whether the video of `film` shows its prompts, one row for each; n/a where they are none of the
        small world. Call it before `charts` and `save`, or the result is without it.

        Raises:
            UserError: the result was put together already.
        """
        if "result" in self.__dict__:
            raise UserError("judge: the result was put together already; call judge() before charts() and "
                            "save().")
        prompts = [chunk.prompt for chunk in self.chunks for _ in range(chunk.frames.shape[1])]
        self.world = judgement.judge(self.frames, prompts, weights_kind=self.pipeline.weights["kind"])
        return judgement.table(self.world, prompts).map(plain)

    def compare(self) -> pd.DataFrame:
        """Quality against the baseline of the same campaign, by two protocols; the headline is the one-block
        protocol.

        one block: every block is generated from the baseline's own past, so that differences cannot add up.
        free-running: the video of `film` against the baseline's video, where differences do add up.
        """
        kind = self.pipeline.weights["kind"]
        if self.is_reference:
            self.quality = quality.not_compared(
                "this is the reference itself", "look at the other presets", kind
            )
        elif (reference := self.reference) is None:
            self.quality = quality.not_compared(
                "the campaign has no baseline video", "run the baseline first", kind
            )
        else:
            self.quality = compare_blocks(self.pipeline, self.session, self.script, reference, kind)
            device = self.pipeline.device
            self.quality["free_running"] = quality.compare(
                reference.frames.to(device),
                self.frames.to(device),
                weights_kind=kind,
                prompts=reference.frame_prompts(self.script.prompts),
            )
        rows = {"one block": quality.log_numbers(self.quality)}
        if "free_running" in self.quality:
            rows["free-running"] = quality.log_numbers(self.quality["free_running"])
        return pd.DataFrame(
            {name: {key: plain(value) for key, value in row.items()} for name, row in rows.items()}
        ).T

    @property
    def is_reference(self) -> bool:
        """Whether this is the run that the campaign's other runs are compared with."""
        return self.config.name == "baseline" and self.number == 1

    @functools.cached_property
    def reference(self) -> Reference | None:
        """The video of the campaign's baseline, None if there is none."""
        path = self.folder.parent / "baseline" / REFERENCE_FILE
        return Reference.load(path) if path.is_file() else None

    def definitions(self) -> HTML:
        """What every figure means."""
        rows = "".join(f"<dt><b>{html.escape(name)}</b></dt><dd>{html.escape(text)}</dd>"
                       for name, text in metrics.DEFINITIONS.items())
        return HTML(f"<details><summary>What the figures mean</summary><dl>{rows}</dl></details>")

    def difference(self) -> HTML:
        """Show the heat map of the mean absolute difference between this video and the baseline's, beside a
        frame of each; returns a player of the two videos, or a sentence where the campaign has no baseline
        video.
        """
        reference = self.reference
        if reference is None:
            return HTML(f"<p>n/a: the campaign {html.escape(self.campaign)} has no baseline video to compare "
                        "with; run the baseline first.</p>")
        display(difference_chart(reference.frames, self.frames))
        # Together 1.5 times as wide as the video alone: reports stay small.
        width = self.config.video_width and self.config.video_width * 3 // 4
        path = self.folder / "side_by_side.mp4"
        video.write_mp4(path, quality.side_by_side(video.shrink(reference.frames, width),
                                                   video.shrink(self.frames, width)),
                        self.pipeline.model.fps, crf=self.config.video_crf)
        caption = f"left: baseline, right: {self.config.title}"
        return HTML(video.video_html(path, caption, min_width=512))

    def charts(self) -> None:
        """Show every figure of this run, beside the campaign's baseline where there is one."""
        for chart in figures.run_figures(self.result, self.baseline()).values():
            display(chart)

    def save(self) -> None:
        """Write result.json, last of all and atomically."""
        results.write_result(self.folder / RESULT_FILE, self.result)
        print(f"{RESULT_FILE} is written")

    def reading(self) -> HTML:
        """The hypothesis, what was measured beside the baseline, and the decision as it stands."""
        return HTML(reading_html(self.result, self.baseline()))

    def vary(self, changes: Mapping[str, Sequence[Any]]) -> pd.DataFrame:
        """Measure the preset again with one key changed at a time, and add the figures to result.json; only
        `reading` may follow, since it lets go of the pipeline. A variation that cannot run is n/a and says
        why.

        Args:
            changes: the values to try instead of the preset's, by key.
        """
        rows = self.result["variations"] = []
        del self.pipeline, self.session, self.measurement
        for key, value in ((key, value) for key, values in changes.items() for value in values):
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(f"variation {key}: {value}", flush=True)
            rows.append(plain_json({"changed": {key: value}} | self._variation(key, value)))
            results.write_result(self.folder / RESULT_FILE, self.result)
        return variations_table(self.result).map(plain)

    def _variation(self, key: str, value: Any) -> dict[str, Any]:
        try:
            config = ExperimentConfig.from_mapping(self.config.to_dict() | {key: value})
            variant = Experiment(config, self.campaign, self.number, self.folder)
            variant.build()
            variant.measure()
            return variant.summary()
        except (UserError, torch.OutOfMemoryError) as error:
            return {"failure": results.na(str(error).splitlines()[0], "see the message")}

    def summary(self) -> dict[str, Any]:
        """The measured figures without events and single samples, and fidelity by the one-block protocol."""
        baseline = self.baseline()
        if self.reference is None or baseline is None:
            fidelity = {"psnr_db": results.na("the campaign has no baseline video", "run the baseline first")}
        elif len(self.config.denoising_steps) != len(baseline["parameters"]["denoising_steps"]):
            fidelity = {"psnr_db": results.na("another number of denoising steps draws other noise",
                                              "look at the videos")}
        else:
            fidelity = compare_blocks(self.pipeline, self.session, self.script, self.reference,
                                      self.pipeline.weights["kind"], ("psnr_db",))
        latency = self.measured["latency"]
        return {"latency": {key: latency[key] for key in ("ss_ms_per_frame", "ps_ms", "stages_ms")},
                "fps": self.measured["fps"], "memory_gb": self.measured["memory_gb"],
                "sizes": self.measured["sizes"], "quality": fidelity, "setup_s": self.pipeline.setup_s}

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """What `save` writes; everything before must have been called."""
        config, pipeline = self.config, self.pipeline
        environment = provenance.environment(pipeline.device, attention_backend=pipeline.attention_backend,
                                             company=self.company)
        result = plain_json(
            {
                "schema_version": results.SCHEMA_VERSION,
                "status": "ok",
                "campaign": self.campaign,
                "preset": config.name,
                "run": self.number,
                "title": config.title,
                "hypothesis": config.hypothesis,
                "parameters": config.to_dict(),
                "environment": environment | self.clocks,
                "model": {
                    "name": pipeline.model.name,
                    "parameters": pipeline.weights["dit"]["parameters"],
                    "sizes": dataclasses.asdict(pipeline.model),
                },
                "weights": pipeline.weights,
                "tokenizer": pipeline.weights["tokenizer"]["tokenizer"],
                "seed": config.seed,
                **self.measured,
                "setup_s": pipeline.setup_s,
                "quality": self.quality,
                **({} if self.world is None else {"world": self.world}),
                "rooms": self._room_reports(),
                "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
        gate = gate_of(config, result["rooms"])
        # The gate stays with the result: once the noise is known, the report decides again.
        result["decision"] = decision.decide(result, self.baseline(), self._noise, gate) | {"gate": gate}
        return result

    def baseline(self) -> dict[str, Any] | None:
        """The finished baseline of this campaign, None if there is none."""
        path = self.folder.parent / "baseline" / RESULT_FILE
        return results.read_result(path) if path.is_file() else None

    @functools.cached_property
    def _noise(self) -> dict[str, Any] | None:
        """What a repetition in this campaign said of the noise, before this run was saved; None also where
        it ran on another machine.
        """
        campaign, _ = results.read_campaign(self.folder.parent)
        with contextlib.suppress(UserError):
            return decision.campaign_noise(campaign)
        return None

    def _room_reports(self) -> list[dict[str, Any]]:
        return [
            room | {"report": {key: value.summary() if key == "stats" else value
                               for key, value in room["report"].items()}}
            for room in self.pipeline.rooms
        ]

    def _headline(self) -> pd.DataFrame:
        latency, memory = self.measured["latency"], self.measured["memory_gb"]
        steady, switch = latency["ss_ms_per_frame"], latency["ps_ms"]
        rows = {f"SS {key}, ms per frame": steady[key] for key in ("mean", "p50", "p95", "p99", "max")}
        over = latency["ss_over_target"]
        rows[f"SS blocks over {over['target_ms']:g} ms per frame, %"] = 100 * over["share"]
        rows |= {f"PS {key}, ms": switch[key] for key in ("mean", "max")}
        rows |= {"first frame, ms": latency["first_frame_ms"], "FPS": self.measured["fps"],
                 "peak memory, GB": memory["peak_allocated"], "KV cache, GB": memory["kv_cache"]}
        print(self.measured["sizes"]["note"])
        print(latency["clock_disagreement"]["sentence"])
        if self.company["co_scheduled"]:
            beside = ("another process holds the GPU" if self.pipeline.device.type == "cuda" else
                      f"other processes kept {self.company['other_cpu_cores']:.1f} CPU cores busy")
            print(f"Warning: {beside}; these latencies are not fit for comparison.")
        return pd.DataFrame({"value": {name: plain(value) for name, value in rows.items()}})


def notebook_parameters(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters among a notebook's globals: every public name with a plain value.

    papermill injects unknown names with no more than a warning; here they reach the config, which refuses
    them.
    """
    shell = {"In", "Out"}
    return {name: value for name, value in namespace.items() if not name.startswith("_") and name not in shell
            and (value is None or isinstance(value, (bool, int, float, str, list, tuple, dict)))}


def gate_of(config: ExperimentConfig, rooms: list[dict[str, Any]]) -> dict[str, Any]:
    """The quality gate of `decision.decide`: bit-identical frames if every optimization is exact, else the
    preset's limits.
    """
    limits = {"min_psnr_db": config.min_psnr_db, "min_ssim": config.min_ssim, "max_lpips": config.max_lpips}
    limits = {key: value for key, value in limits.items() if value is not None}
    if all(room["level"] == "exact" for room in rooms):
        return {"level": "exact", "objective": config.objective}
    return {"level": "lossy", "objective": config.objective, **(limits or {"min_psnr_db": 45.0})}


def plain(value: Any) -> Any:
    """A figure for a table: rounded, or 'n/a: reason'."""
    if results.is_na(value):
        return f"n/a: {value['reason']}"
    return round(value, 3) if isinstance(value, float) else value


def plain_json(value: Any) -> Any:
    """`value` with tuples as lists, so that it equals what is read back."""
    if isinstance(value, Mapping):
        return {key: plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    return value
