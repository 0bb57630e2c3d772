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

Outside of a preset's own notebook, `Experiment.preset("balanced", profile="laptop")` is the first line, and
`run.measure_baseline()` the second where the campaign has no baseline yet.
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
    BASELINE,
    KEYS,
    RUN_KEYS,
    ExperimentConfig,
    check_baseline,
    check_folder_name,
    keys_of,
    notebook_parameters,
    preset_files,
    unknown_key,
    unknown_preset,
)
from .errors import UserError, short
from .files import atomic_path, check_texts, load_yaml, project_path, whole_text
from .measurement import decision, environment, fidelity, quality
from .measurement.block_trace import TRACE_FILE
from .measurement.catalogue import shown_for
from .measurement.fidelity import FidelitySchedule, Truth, ablation_fidelity
from .measurement.protocol import Measurement
from .measurement.result import (
    MEASURED_FILE,
    REFERENCE_FILE,
    SCHEMA_VERSION,
    is_na,
    lookup,
    na,
    plain_json,
    read_campaign,
    read_result,
    run_label,
    write_result,
)
from .models.specs import VAE_TEMPORAL_STRIDE
from .models.weight_files import check_weights
from .optimizations import build_pipeline
from .optimizations.base import Stats
from .prompts import schedule_of
from .report import charts, video
from .report.conclusion import NOISE_BY_DESIGN, conclusion_html, definitions_html
from .report.tables import (
    ablation_summary,
    ablations_table,
    fidelity_table,
    headline_table,
    optimizations_table,
    parameters_table,
    plain,
)
from .streaming.pipeline import check_device
from .streaming.preview import facts_html
from .streaming.session import whole_blocks
from .tiny.shapes import adherence

# torchmetrics imports a progress bar that warns without ipywidgets. The notebooks show no progress bar.
warnings.filterwarnings("ignore", message="IProgress not found")
# torch.compile logs this on a machine with the CUDA toolkit but without a GPU.
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda it: "No CUDA runtime" not in it.getMessage())

RESULT_FILE = "result.json"
# What a step after `measure` needs. Tried first: without it, that step would lose the measurement.
NEEDED = {"av": "av", "torchmetrics.functional.image": "torchmetrics"}
# Attribute -> the method that sets it. Reading it too early raises an error that names the missing step.
NOT_YET = {"build": "nothing was built yet", "measure": "nothing was measured yet",
           "generate_video": "there is no video yet", "compare": "nothing was compared yet"}
MADE_BY = {"pipeline": "build", "measurement": "build", "session": "build", "measured": "measure",
           "company": "measure", "clocks": "measure", "chunks": "generate_video",
           "frames": "generate_video", "quality": "compare"}


def _require_import(module: str, package: str) -> None:
    try:
        importlib.import_module(module)
    except Exception as error:
        raise UserError(f"{package}: this package cannot be imported ({error}), and a run needs it after its "
                        f"measurement; run 'make install', or 'pip install {package}'.") from error


class Experiment:
    """One run of one preset. It prints its progress into the notebook."""

    def __init__(self, config: ExperimentConfig, campaign: str, run: int, folder: Path,
                 compared_with: Path | None = None):
        """Args: compared_with: the campaign's folder whose baseline this run is compared with, by default its
        own.
        """
        self.config = config
        self.campaign = campaign
        self.number = run
        self.folder = folder
        self.compared_with = compared_with or folder.parent
        self.schedule = schedule_of(config)
        self.adherence: dict[str, Any] | None = None
        self.trace: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if (verb := MADE_BY.get(name)) is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        raise UserError(f"{self.config.name}: {NOT_YET[verb]}; call {verb}() first.")

    def __repr__(self) -> str:
        done = [verb for verb in dict.fromkeys(MADE_BY.values())
                if all(name in self.__dict__ for name, maker in MADE_BY.items() if maker == verb)]
        return (f"Experiment({self.config.name}, run {self.number} of campaign {self.campaign}, "
                f"{self.config.model} on {self.config.device}; done: {', '.join(done) or 'nothing yet'})")

    def _repr_html_(self) -> str:
        """What the experiment is, what was done, and the main metrics once they are measured."""
        done = repr(self).rpartition("done: ")[2].removesuffix(")")
        rows = [("model", f"{self.config.model} on {self.config.device}, {self.config.model_dtype}"),
                ("results", f"{self.campaign}, run {self.number}: folder {self.folder.name}"),
                ("compared with", f"the baseline of {self.compared_with.name}"), ("done", done)]
        if "measured" in self.__dict__:
            rows += [(metric.label, metric.with_unit(self.measured))
                     for metric in shown_for("card", self.measured)
                     if metric.value(self.measured) is not None]
        return facts_html(f"{self.config.title} (preset {self.config.name})", rows)

    @classmethod
    def preset(cls, name: str, *, profile: str | None = None, campaign: str = "manual",
               compare_with: str = "", **keys: Any) -> Experiment:
        """An experiment of `params/<name>.yaml`, for a notebook of one's own.

        Args:
            profile: a name in `params/profiles`, or the path of such a file; None: the one that fits this
                machine.
            campaign: results go to outputs/<campaign>/<name> and are compared with its baseline.
            compare_with: see `from_notebook`.
            keys: over the preset and the profile.

        Raises:
            UserError: the preset or the profile is unknown, or as `from_notebook` does.
        """
        if profile is None:
            profile, words = environment.fitting_profile()
            print(words)
        path = profile if profile.endswith(".yaml") else f"params/profiles/{profile}.yaml"
        known = preset_files()
        if name not in known:
            raise unknown_preset(name, known)
        given = load_yaml(known[name]) | load_yaml(project_path(path)) | keys
        return cls.from_notebook(given | {"campaign": campaign}, compare_with=compare_with)

    @classmethod
    def from_notebook(cls, namespace: Mapping[str, Any], *, compare_with: str = "") -> Experiment:
        """Check the notebook's parameters (`globals()` after its first cells) before building anything. Only
        the parameters cell counts (`notebook_parameters`).

        Args:
            compare_with: another campaign, by its name or its folder, whose finished baseline this run is
                compared with.

        Raises:
            UserError: an unknown parameter, a wrong type or value, a baseline with optimizations, settings
                that are not comparable with the campaign's baseline, a baseline whose files are damaged, a
                package that is missing, or a folder that cannot be written.
        """
        given = notebook_parameters(namespace)
        if outside := [key for key in KEYS if key in namespace and key not in given]:
            print(f"not read, since it is no plain value of the parameters cell: {', '.join(outside)}")
        campaign, run, output_dir = (given.pop(key, default) for key, (default, _) in RUN_KEYS.items())
        if own := [name for name in given if name not in KEYS]:
            raise UserError(f"{unknown_key(own[0], [*KEYS, *RUN_KEYS])}: it is no parameter; begin the name "
                            "of a variable of your own with _, or assign it in a cell without parameters.")
        config = ExperimentConfig.from_mapping(given)
        check_baseline(config)
        config.check_places()
        check_folder_name("campaign", campaign)
        if not isinstance(output_dir, str):
            raise UserError(f"output_dir: {short(output_dir)} is not a text; name a folder, or leave it "
                            "empty.")
        whole_text(output_dir, "output_dir")
        if type(run) is not int or run < 1:
            raise UserError(f"run: {run!r} is not a run number; write 1, or 2 for a repetition.")
        folder = project_path(output_dir or f"outputs/{campaign}/{run_label(config.name, run)}")
        experiment = cls(config, campaign, run, folder, _campaign_folder(compare_with, config.name))
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
        if (folder / RESULT_FILE).is_file():
            place = f"{folder.parent.name}/{folder.name}"
            print(f"{place} holds a result; save() replaces it (another campaign keeps it)")
        print(f"{config.title}: preset {config.name}, {config.model}, {config.device}, {config.model_dtype}")
        return experiment

    def require_comparable(self) -> None:
        """Refuse settings that are not comparable with the campaign's finished baseline. Another campaign's
        baseline, which was asked for, must also be of this machine and this torch.

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
        known = decision.planned(self.config, self.schedule, digests)
        if self.compared_with != self.folder.parent:
            known["environment"] = environment.machine(check_device(self.config.device))
            if reason := decision.fidelity_reason(known, baseline):
                raise UserError(f"compare_with: this run could not be compared with the baseline of "
                                f"{self.compared_with.name}, since {reason}; name a campaign of equal "
                                "conditions, or leave compare_with out and call measure_baseline().")
        if reason := decision.fidelity_reason(known, baseline):
            raise UserError(f"campaign: this run could not be compared with the baseline of {self.campaign}, "
                            f"since {reason}; run the baseline with the same settings, or choose another "
                            "campaign (papermill: -p campaign mine).")

    def parameters(self) -> pd.DataFrame:
        """A table of the parameters that differ from the baseline's on the laptop."""
        return parameters_table(self.config)

    def measure_baseline(self) -> pd.DataFrame:
        """Measure the baseline under the conditions of this run and save it into the campaign, unless it is
        there. Returns its main metrics. Call it before `build`, since both models may not fit into memory.

        Raises:
            UserError: this run is the baseline, is already built, or is compared with another campaign.
        """
        if self.config.name == BASELINE:
            raise UserError("measure_baseline: this run is the baseline; go on with build().")
        if "pipeline" in self.__dict__:
            raise UserError("measure_baseline: the pipeline is already built; call it before build(), on a "
                            "new Experiment.")
        if self.compared_with != self.folder.parent:
            raise UserError(f"measure_baseline: this run is compared with the baseline of "
                            f"{self.compared_with.name}; leave compare_with out.")
        if (found := self.baseline()) is None:
            with ThreadPoolExecutor(max_workers=1, thread_name_prefix="baseline") as thread:
                # In a thread of its own, because cuDNN remembers its choice of kernels per thread.
                thread.submit(contextvars.copy_context().run, self._run_baseline).result()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            found = self.baseline()
        else:
            print(f"the baseline of {self.campaign} is there, of {found['created_utc']}")
        return headline_table(found)

    def _run_baseline(self) -> None:
        own, defaults = self.config.to_dict(), ExperimentConfig().to_dict()
        plain_keys = {key: defaults[key]
                      for key in ("objective", "max_error_ratio", *keys_of("optimizations"))}
        identity = {key: value for key, value in load_yaml(project_path(f"params/{BASELINE}.yaml")).items()
                    if key in keys_of("identity")}
        config = ExperimentConfig.from_mapping(own | plain_keys | identity)
        run = Experiment(config, self.campaign, 1, self.folder.parent / BASELINE)
        for verb in (run.build, run.measure, run.generate_video, run.compare, run.save):
            verb()

    def build(self) -> pd.DataFrame:
        """Load the model and apply the optimizations. Returns a table of what each one did."""
        self._forget_result()
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
        self._forget_result()
        self.measurement.rehearse()
        self.measured, self.company, self.clocks = self.measurement.run()
        self._optimization_reports()  # read the counters in the caches before the next reset
        with atomic_path(self.folder / MEASURED_FILE) as temporary:
            temporary.write_text(json.dumps(plain_json(self.measured)), encoding="utf-8")
        if self.config.trace:
            self.trace = self._traced()
        print(self.measured["sizes"]["note"])
        print(self.measured["latency"]["clock_disagreement"]["sentence"])
        if self.company["co_scheduled"]:
            cause = ("another process holds the GPU" if self.pipeline.device.type == "cuda" else
                     f"other processes kept {self.company['other_cpu_cores']:.1f} CPU cores busy")
            print(f"Warning: {cause}; these latencies are not fit for comparison.")
        return headline_table(self.measured)

    def _traced(self) -> dict[str, Any]:
        """Write the trace; return the section `trace` of the result."""
        try:
            return self.measurement.trace(self.folder / TRACE_FILE)
        except Exception as error:  # the latencies are valid without it
            why = (str(error).splitlines() or [""])[0]
            print(f"Warning: the trace failed, {type(error).__name__}: {why}")
            return na(f"the trace failed, {type(error).__name__}: {why}", "run again, or leave trace out")

    def generate_video(self) -> HTML:
        """Generate the video of the prompt schedule and return a player. Not measured."""
        self._forget_result()
        self.session.reset()
        self.adherence = None  # belongs to the previous video
        self.chunks = [dataclasses.replace(chunk, frames=chunk.frames.cpu(), latents=chunk.latents.cpu())
                       for chunk in whole_blocks(self.session.play(self.schedule, self.config.video_blocks))]
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
        fps, times = self.pipeline.model.fps, [0, *self.schedule.switch_frames]
        spoken = [f"{VAE_TEMPORAL_STRIDE * frame / fps:.1f} s: {prompt}"
                  for frame, prompt in zip(times, self.schedule.prompts)]
        return HTML(video.video_html(self.folder / "video.mp4", self._captioned("; ".join(spoken)),
                                     sheet=self.folder / "frames.png"))

    def _captioned(self, words: str) -> str:
        """The caption of a video, which says first that random weights show noise."""
        return f"{NOISE_BY_DESIGN} {words}" if self.pipeline.weights["kind"] == "random" else words

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
        self._forget_result()
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
        return self.config.name == BASELINE and self.number == 1

    @functools.cached_property
    def reference(self) -> Truth | None:
        """The truth that the campaign's baseline stored for other runs, None if there is none."""
        path = self.compared_with / BASELINE / REFERENCE_FILE
        return Truth.load(path) if path.is_file() else None

    def definitions(self) -> HTML:
        """The definition of every metric."""
        return HTML(definitions_html())

    def difference(self) -> HTML:
        """Show a frame of this video and of the baseline's, and a heat map of their mean absolute difference.
        Returns a player of both videos and their amplified difference, or a sentence if the campaign has no
        baseline video or `difference_video` is off.
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
        if not self.config.difference_video:
            return HTML("<p>No video of the difference: difference_video is off.</p>")
        path = self.folder / "side_by_side.mp4"
        third = video.side_by_side_mp4(path, reference.video, self.frames, self.pipeline.model.fps)
        caption = f"left: baseline, middle: {self.config.title}, right: {third}"
        return HTML(video.video_html(path, self._captioned(caption), min_width=512))

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
        """The hypothesis and the measurements against the baseline, and a link to the trace, if any. The
        campaign's summary decides.
        """
        return HTML(conclusion_html(self.result, self.baseline()) + trace_link(self.result))

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
            config = ExperimentConfig.from_mapping(self.config.to_dict() | {"trace": False} | dict(changed))
            variant = Experiment(config, self.campaign, self.number, self.folder, self.compared_with)
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
                **({} if self.trace is None else {"trace": self.trace}),
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
        """The finished baseline of the campaign that this run is compared with, None if there is none."""
        path = self.compared_with / BASELINE / RESULT_FILE
        return read_result(path) if path.is_file() else None

    @functools.cached_property
    def _noise(self) -> dict[str, dict[str, Any]]:
        """The noise by preset, from repetitions in the compared campaign that were saved before this run."""
        campaign, _ = read_campaign(self.compared_with)
        return decision.campaign_noise(campaign)

    def _forget_result(self) -> None:
        """Drop the result that an earlier `charts` or `save` put together, since a part of it changes."""
        self.__dict__.pop("result", None)

    def _optimization_reports(self) -> list[dict[str, Any]]:
        return [optimization | {"report": {key: value.summary() if isinstance(value, Stats) else value
                                   for key, value in optimization["report"].items()}}
                for optimization in self.pipeline.optimizations]


def _campaign_folder(asked: str, preset: str) -> Path | None:
    """The folder of the campaign `asked`, a name in outputs/ or a path; None for an empty one.

    Raises:
        UserError: it has no finished baseline, or the run is the baseline itself.
    """
    if not asked:
        return None
    check_texts(asked, "compare_with")
    if preset == BASELINE:
        raise UserError("compare_with: this run is the baseline, which is compared with nothing; leave it "
                        "out.")
    places = [project_path(asked)] if "/" in asked or asked in (".", "..") else [
        project_path(f"outputs/{asked}"), project_path(asked)]
    for place in places:
        if (place / BASELINE / RESULT_FILE).is_file():
            return place.resolve()
    raise UserError(f"compare_with: {asked} has no finished baseline ({BASELINE}/{RESULT_FILE}); name a "
                    "campaign in outputs/, or a folder, that has one.")


def trace_link(result: Mapping[str, Any]) -> str:
    """HTML: a relative link to the run's trace. Empty if the run has none."""
    trace = result.get("trace")
    if trace is None:
        return ""
    if is_na(trace):
        return f"<p><b>Trace:</b> n/a: {html.escape(trace['reason'])}.</p>"
    file, blocks = html.escape(trace["file"]), trace["blocks"]
    return (f'<p><b>Trace:</b> <a href="{file}">{file}</a>, blocks {blocks[0]} to {blocks[-1]} in the steady '
            f"state and a prompt switch in block {trace['switch_block']}. Open the file in ui.perfetto.dev. "
            "The profiler was on, so times are longer than those of the report.</p>")
