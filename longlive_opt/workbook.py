"""The class behind the notebooks: one experiment, from its parameters to its result.json.

    run = Experiment.from_notebook(globals())  # check the parameters
    run.build()                                # load the model, apply the optimizations
    run.measure()                              # rehearse, then measure the streams
    run.generate_video()                       # generate a short video
    run.check_adherence()                      # evaluate its prompts (Moving Shapes only; optional)
    run.compare()                              # fidelity: errors against the baseline in float32
    run.save()                                 # write result.json, the only sign of success
    run.ablate({"local_attn_size": [9]})       # measure again with one key changed; added to result.json
    run.conclusion()                           # expectation, measurement and rule
"""

from __future__ import annotations

import contextvars
import dataclasses
import functools
import gc
import html
import importlib
import json
import logging
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Mapping, Sequence

import pandas as pd
import torch
from IPython.display import HTML, display

from .config import (
    KEYS,
    RUN_KEYS,
    ExperimentConfig,
    check_baseline,
    check_folder_name,
    notebook_parameters,
    unknown_key,
)
from .errors import UserError, short
from .files import atomic_path, project_path, whole_text
from .measurement import decision, environment, fidelity, quality
from .measurement.fidelity import FidelitySchedule, Truth, ablation_fidelity
from .measurement.protocol import Measurement
from .measurement.result import (
    MEASURED_FILE,
    REFERENCE_FILE,
    SCHEMA_VERSION,
    lookup,
    na,
    plain_json,
    read_campaign,
    read_result,
    run_label,
    write_result,
)
from .models.weight_files import check_weights
from .optimizations import build_pipeline
from .optimizations.base import Stats
from .prompts import schedule_of
from .report import charts, video
from .report.conclusion import conclusion_html, definitions_html
from .report.tables import (
    ablation_summary,
    ablations_table,
    fidelity_table,
    headline_table,
    optimizations_table,
    parameters_table,
    plain,
)
from .tiny.shapes import adherence

# torchmetrics imports a progress bar that warns without ipywidgets. The notebooks show no progress bar.
warnings.filterwarnings("ignore", message="IProgress not found")
# torch.compile logs this on a machine with the CUDA toolkit but without a GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda it: "No CUDA runtime" not in it.getMessage())

RESULT_FILE = "result.json"
# What a step after `measure` needs. Tried first: without it, that step would lose the measurement.
NEEDED = {"av": "av", "torchmetrics.functional.image": "torchmetrics"}
# Attribute -> the method that sets it. Reading it too early raises an error that names the missing step.
MADE_BY = {"pipeline": "build", "measurement": "build", "session": "build", "measured": "measure",
           "company": "measure", "clocks": "measure", "chunks": "generate_video",
           "frames": "generate_video", "quality": "compare"}


def _require_import(module: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{package}: this package cannot be imported ({error}), and a run needs it after its "
                        f"measurement; run 'make install', or 'pip install {package}'.") from error


class Experiment:
    """One run of one preset. It prints its progress into the notebook."""

    def __init__(self, config: ExperimentConfig, campaign: str, run: int, folder: Path):
        self.config = config
        self.campaign = campaign
        self.number = run
        self.folder = folder
        self.schedule = schedule_of(config)
        self.adherence: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if (verb := MADE_BY.get(name)) is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise UserError(f"{name}: there is none yet; call {verb}() first.")

    def __repr__(self) -> str:
        done = [verb for verb in dict.fromkeys(MADE_BY.values())
                if all(name in self.__dict__ for name, maker in MADE_BY.items() if maker == verb)]
        return (f"Experiment({self.config.name}, run {self.number} of campaign {self.campaign}, "
                f"{self.config.model} on {self.config.device}; done: {', '.join(done) or 'nothing yet'})")

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any]) -> Experiment:
        """Check the notebook's parameters (`globals()` after its first cells) before building anything.

        Raises:
            UserError: an unknown parameter, a wrong type or value, a baseline with optimizations, settings
                that are not comparable with the campaign's baseline, a baseline whose files are damaged, a
                package that is missing, or a folder that cannot be written.
        """
        given = notebook_parameters(namespace)
        campaign, run, output_dir = (given.pop(key, default) for key, (default, _) in RUN_KEYS.items())
        if own := [name for name in given if name not in KEYS]:
            raise UserError(f"{unknown_key(own[0], [*KEYS, *RUN_KEYS])}: it is no parameter; begin the name "
                            "of a variable of your own with _, or assign it in a cell without parameters.")
        config = ExperimentConfig.from_mapping(given)
        check_baseline(config)
        check_folder_name("campaign", campaign)
        if not isinstance(output_dir, str):
            raise UserError(f"output_dir: {short(output_dir)} is not a text; name a folder, or leave it "
                            "empty.")
        whole_text(output_dir, "output_dir")
        if type(run) is not int or run < 1:
            raise UserError(f"run: {run!r} is not a run number; write 1, or 2 for a repetition.")
        folder = project_path(output_dir or f"outputs/{campaign}/{run_label(config.name, run)}")
        experiment = cls(config, campaign, run, folder)
        experiment.require_comparable()
        for module, package in NEEDED.items():
            _require_import(module, package)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output_dir: cannot make {output_dir}: {error.strerror}; choose another folder."
            ) from error
        pd.set_option("display.max_colwidth", None)
        print(f"{config.title}: preset {config.name}, {config.model}, {config.device}, {config.model_dtype}")
        return experiment

    def require_comparable(self) -> None:
        """Refuse settings that are not comparable with the campaign's finished baseline.

        Raises:
            UserError: naming the first difference.
        """
        if self.is_reference or (baseline := self.baseline()) is None:
            return
        path = self.folder.parent / "baseline" / REFERENCE_FILE
        if path.is_file():
            Truth.load(path)  # raises if it is damaged, and is not kept: it is large
        digests = None
        if lookup(baseline, "weights.sha256"):
            digests = check_weights(self.config.weights, self.config.model_config()).sha256()
        if reason := decision.fidelity_reason(decision.planned(self.config, self.schedule, digests),
                                              baseline):
            raise UserError(f"campaign: this run could not be compared with the baseline of {self.campaign}, "
                            f"since {reason}; run the baseline with the same settings, or choose another "
                            "campaign (papermill: -p campaign mine).")

    def parameters(self) -> pd.DataFrame:
        """A table of the parameters that differ from the baseline's on the laptop."""
        return parameters_table(self.config)

    def build(self) -> pd.DataFrame:
        """Load the model and apply the optimizations. Returns a table of what each one did."""
        self.pipeline = build_pipeline(self.config)
        self.measurement = Measurement(self.pipeline, self.schedule)
        self.session = self.measurement.session
        print(f"ready after {self.pipeline.setup_s['load']:.1f} s: {self.pipeline.model.name}, weights: "
              f"{self.pipeline.weights['kind']}, attention: {self.pipeline.attention_backend}")
        if reason := self.fidelity_reason():
            print(f"Warning: no comparison with the baseline, {reason}")
        return optimizations_table(self.pipeline.optimizations)

    def measure(self) -> pd.DataFrame:
        """Measure one stream without and one with prompt switches (see `measurement.protocol`). Returns the
        main metrics. A rehearsal first keeps compilation and graph capture out of the latencies.
        """
        self.measurement.rehearse()
        self.measured, self.company, self.clocks = self.measurement.run()
        self._optimization_reports()  # read the counters in the caches before the next reset
        with atomic_path(self.folder / MEASURED_FILE) as temporary:
            temporary.write_text(json.dumps(plain_json(self.measured)), encoding="utf-8")
        print(self.measured["sizes"]["note"])
        print(self.measured["latency"]["clock_disagreement"]["sentence"])
        if self.company["co_scheduled"]:
            cause = ("another process holds the GPU" if self.pipeline.device.type == "cuda" else
                     f"other processes kept {self.company['other_cpu_cores']:.1f} CPU cores busy")
            print(f"Warning: {cause}; these latencies are not fit for comparison.")
        return headline_table(self.measured)

    def generate_video(self) -> HTML:
        """Generate the video of the prompt schedule and return a player. Not measured."""
        self.session.reset()
        self.adherence = None  # belongs to the previous video
        self.chunks = [dataclasses.replace(chunk, frames=chunk.frames.cpu(), latents=chunk.latents.cpu())
                       for chunk in self.session.play(self.schedule, self.config.video_blocks)]
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
        return HTML(video.video_html(self.folder / "video.mp4", caption=" -> ".join(self.schedule.prompts)))

    def check_adherence(self) -> pd.DataFrame:
        """Whether the video of `generate_video` shows its prompts, one row per prompt. n/a for prompts that
        are not of Moving Shapes. Call it before `charts` and `save`, or the result does not contain it.

        Raises:
            UserError: the result already exists.
        """
        if "result" in self.__dict__:
            raise UserError("check_adherence: the result already exists; call it before charts() and save().")
        prompts = [chunk.prompt for chunk in self.chunks for _ in range(chunk.frames.shape[1])]
        self.adherence = adherence.evaluate(self.frames, prompts, weights_kind=self.pipeline.weights["kind"])
        return adherence.table(self.adherence, prompts).map(plain)

    def compare(self) -> pd.DataFrame:
        """Fidelity: errors against the baseline in float32 with the same noise and prompts (`fidelity`),
        free-running and teacher-forced, compared with the baseline's own errors and the null rows.

        The campaign's first baseline makes the truth and the null rows. Without a comparable truth, fidelity
        is n/a with the reason.
        """
        schedule, kind = FidelitySchedule.of(self.config, self.schedule), self.pipeline.weights["kind"]
        if self.is_reference:
            truth, self.quality = fidelity.establish(self.pipeline, schedule, self.frames)
            truth.save(self.folder / REFERENCE_FILE)
            self.__dict__["reference"] = truth
        elif (truth := self.reference) is None:
            self.quality = quality.not_compared("the campaign has no truth: no run of its baseline kept one",
                                                "run the baseline first", kind)
        elif reason := self.fidelity_reason():
            self.quality = quality.not_compared(
                f"not comparable with the baseline, {reason}", "run both with the same settings", kind
            )
        else:
            try:
                self.quality = fidelity.measure(self.pipeline, self.session, schedule, truth)
            except Exception as error:  # the latencies are valid without the comparison
                why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                why = (why.splitlines() or [""])[0]
                print(f"Warning: the comparison failed, {why}")
                self.quality = quality.not_compared(
                    f"the comparison failed: {why}", "look at the notebook that was executed", kind
                )
        return fidelity_table(self.quality, truth.facts if truth else None)

    def fidelity_reason(self) -> str:
        """Why the frames must not be compared with the campaign's baseline. Empty if they may, or if there is
        no baseline. Call `build` first.
        """
        if self.is_reference or (baseline := self.baseline()) is None:
            return ""
        known = decision.planned(self.config, self.schedule)
        known |= {"weights": self.pipeline.weights, "environment": environment.machine(self.pipeline.device)}
        return decision.fidelity_reason(known, baseline)

    @property
    def is_reference(self) -> bool:
        """Whether the campaign's other runs are compared with this run."""
        return self.config.name == "baseline" and self.number == 1

    @functools.cached_property
    def reference(self) -> Truth | None:
        """The truth that the campaign's baseline stored for other runs, None if there is none."""
        path = self.folder.parent / "baseline" / REFERENCE_FILE
        return Truth.load(path) if path.is_file() else None

    def definitions(self) -> HTML:
        """The definition of every metric."""
        return HTML(definitions_html())

    def difference(self) -> HTML:
        """Show a frame of this video and of the baseline's, and a heat map of their mean absolute difference.
        Returns a player of both videos, or a sentence if the campaign has no baseline video.
        """
        reference = self.reference
        if reference is None:
            return HTML(f"<p>n/a: the campaign {html.escape(self.campaign)} has no baseline video to compare "
                        "with; run the baseline first.</p>")
        if reason := self.fidelity_reason():
            return HTML(f"<p>n/a: not comparable with the baseline, {html.escape(reason)}.</p>")
        if reference.video.shape != self.frames.shape:
            return HTML("<p>n/a: the baseline's video has another length or size; run both with the same."
                        "</p>")
        display(video.difference_chart(reference.video, self.frames))
        # Together 1.5 times as wide as the video alone, which keeps reports small.
        width = self.config.video_width and self.config.video_width * 3 // 4
        path = self.folder / "side_by_side.mp4"
        video.write_mp4(path, video.side_by_side(video.shrink(reference.video, width),
                                                 video.shrink(self.frames, width)),
                        self.pipeline.model.fps, crf=self.config.video_crf)
        caption = f"left: baseline, right: {self.config.title}"
        return HTML(video.video_html(path, caption, min_width=512))

    def charts(self) -> None:
        """Show every chart of this run, compared with the campaign's baseline if there is one."""
        for chart in charts.run_figures(self.result, self.baseline()).values():
            display(chart)

    def save(self) -> None:
        """Write result.json atomically, as the last step."""
        write_result(self.folder / RESULT_FILE, self.result)
        (self.folder / MEASURED_FILE).unlink(missing_ok=True)
        print(f"{RESULT_FILE} is written")

    def conclusion(self) -> HTML:
        """The hypothesis and the measurements against the baseline. The campaign's summary decides."""
        return HTML(conclusion_html(self.result, self.baseline()))

    def ablate(self, changes: Mapping[str, Sequence[Any]],
             together: Sequence[Mapping[str, Any]] = ()) -> pd.DataFrame:
        """Measure the preset again with one key changed at a time, and add the metrics to result.json.

        Only `conclusion` may follow, because this call releases the pipeline. An ablation that cannot run is
        n/a with the reason. Each ablation runs in its own thread, because cuDNN remembers its choice of
        kernels per thread.

        Args:
            changes: the values to try instead of the preset's, by key.
            together: changes of several keys at once, measured after the single ones.
        """
        rows = self.result["ablations"] = []
        del self.pipeline, self.session, self.measurement
        for changed in (*({key: value} for key, values in changes.items() for value in values), *together):
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print("ablation", ", ".join(f"{key}: {value}" for key, value in changed.items()), flush=True)
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ablation") as thread:
                # Settings of torch's compiler belong to a context, and a new thread starts with an empty one.
                context = contextvars.copy_context()
                measured = thread.submit(context.run, self._ablation, changed).result()
            rows.append(plain_json({"changed": dict(changed)} | measured))
            write_result(self.folder / RESULT_FILE, self.result)
        return ablations_table(self.result).map(plain)

    def _ablation(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        try:
            config = ExperimentConfig.from_mapping(self.config.to_dict() | dict(changed))
            variant = Experiment(config, self.campaign, self.number, self.folder)
            variant.build()
            variant.measure()
            schedule = FidelitySchedule.of(config, variant.schedule)
            exactness = ablation_fidelity(variant.pipeline, variant.session, schedule, variant.reference)
            return ablation_summary(variant.measured, exactness, variant.pipeline.setup_s)
        except (UserError, torch.OutOfMemoryError) as error:
            return {"failure": na(str(error).splitlines()[0], "see the message")}

    @functools.cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json. All earlier steps must have run."""
        config, pipeline = self.config, self.pipeline
        machine = environment.environment(pipeline.device, attention_backend=pipeline.attention_backend,
                                             company=self.company)
        result = plain_json(
            {
                "schema_version": SCHEMA_VERSION,
                "status": "ok",
                "campaign": self.campaign,
                "preset": config.name,
                "run": self.number,
                "title": config.title,
                "hypothesis": config.hypothesis,
                "parameters": config.to_dict(),
                "prompt_schedule": self.schedule.to_dict(),
                "environment": machine | self.clocks,
                "model": {
                    "name": pipeline.model.name,
                    "parameters": pipeline.weights["dit"]["parameters"],
                    "sizes": pipeline.model.sizes(),
                },
                "weights": pipeline.weights,
                "tokenizer": pipeline.weights["tokenizer"]["tokenizer"],
                "seed": config.seed,
                **self.measured,
                "setup_s": pipeline.setup_s,
                "quality": self.quality,
                **({} if self.adherence is None else {"adherence": self.adherence}),
                "optimizations": self._optimization_reports(),
                "created_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }
        )
        gate = decision.gate_of(config, result["optimizations"])
        # The result keeps the gate, so that the campaign's summary can decide again once every run is there.
        noise = decision.noise_of_preset(config.name, self._noise)
        decided = decision.decide(result, self.baseline(), noise, gate)
        result["decision"] = decided | {"gate": gate, "provisional": True}
        return result

    def baseline(self) -> dict[str, Any] | None:
        """The finished baseline of this campaign, None if there is none."""
        path = self.folder.parent / "baseline" / RESULT_FILE
        return read_result(path) if path.is_file() else None

    @functools.cached_property
    def _noise(self) -> dict[str, dict[str, Any]]:
        """The noise by preset, from repetitions in this campaign that were saved before this run."""
        campaign, _ = read_campaign(self.folder.parent)
        return decision.campaign_noise(campaign)

    def _optimization_reports(self) -> list[dict[str, Any]]:
        return [optimization | {"report": {key: value.summary() if isinstance(value, Stats) else value
                                   for key, value in optimization["report"].items()}}
                for optimization in self.pipeline.optimizations]
