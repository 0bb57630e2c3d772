"""Run the training stages: their settings, their folders, and what each stage takes from the one before."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Sequence

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...errors import UserError
from ...files import atomic_path
from ...models.dit import CausalDiT
from ...models.specs import ModelSpec
from ...models.text import UMT5Encoder
from ...models.vae import WanVAE
from ...models.weight_files import WeightFiles
from ...models.weights import load_vae
from ...streaming.pipeline import check_device
from ...streaming.sampler import SamplingPlan
from .attribute_head import AttributeHead
from .bench import BENCH_NAME, CASES, Case, run_bench
from .checkpoints import checkpoints, load_checkpoint, pack, prefixed
from .clips import ClipMaker, Mix
from .compiling import use_compiler
from .export import export_weights, fold_statistics
from .loop import LOG_NAME, Budget, Stage, run_stage
from .student import JOBS, StudentSettings, StudentStage
from .teacher import ReadingStage, TeacherSettings, TeacherStage
from .vae_stage import VAESettings, VAEStage, statistics
from .workers import start_workers

logger = logging.getLogger(__name__)

STAGE_NAMES = ("vae", "teacher", "student")
STATISTICS_BATCHES = 32


@dataclass(frozen=True)
class Settings:
    """Settings of all stages. `minutes` and `steps` are those of vae, teacher and student. `reading_minutes`
    is for the text encoder, before the teacher. `size`: picture size in pixels, None for the model's.
    """

    vae: VAESettings = VAESettings()
    teacher: TeacherSettings = TeacherSettings()
    student: StudentSettings = StudentSettings()
    mix: Mix = Mix()
    minutes: tuple[float | None, ...] = (3.5, 13.0, 7.0)
    steps: tuple[int | None, ...] = (None, None, None)
    reading_minutes: float | None = 0.4
    reading_steps: int | None = None
    reading_batch: int = 256
    reading_prompts: int = 16384
    size: int | None = None
    far: int = 300
    log_steps: int = 50

    def adjusted(self, rate_scale: float = 1.0, refresh_every: int | None = None) -> Settings:
        """A copy with all learning rates scaled, and with one new chunk of clips per `refresh_every` steps of
        teacher and student.
        """
        if rate_scale <= 0 or (refresh_every is not None and refresh_every < 1):
            raise UserError(
                f"--rate-scale: {rate_scale} and --refresh-every: {refresh_every} must be positive."
            )
        changes = {} if refresh_every is None else {"refresh_every": refresh_every}

        def scaled(stage, **more):
            rates = {name: getattr(stage, name) * rate_scale for name in ("rate", "muon_rate")
                     if getattr(stage, name, None)}
            return replace(stage, **rates, **more)

        return replace(self, vae=scaled(self.vae), teacher=scaled(self.teacher, **changes),
                       student=scaled(self.student, **changes))

    def with_budget(self, minutes: Sequence[float] | None, steps: Sequence[int] | None) -> Settings:
        """A copy with other minutes or steps. Steps alone replace the minutes."""
        for name, values in (("minutes", minutes), ("steps", steps)):
            if values is not None and (len(values) != len(STAGE_NAMES) or min(values) <= 0):
                raise UserError(
                    f"--{name}: {list(values)} must be three positive numbers, for {STAGE_NAMES}."
                )
        if minutes is None and steps is None:
            return self
        nothing = (None,) * len(STAGE_NAMES)
        return replace(
            self, minutes=tuple(minutes) if minutes else nothing, steps=tuple(steps) if steps else nothing
        )


QUICK = Settings(
    vae=VAESettings(crop=16, crop_batch=2, crop_frames=5, whole_batch=1, whole_frames=9, horizon=8,
                    ring_videos=2, ring_chunks=4, first_chunks=1, refresh_every=2),
    teacher=TeacherSettings(opening_batch=2, opening_with_clips=1, opening_chunk=4, opening_ring_chunks=4,
                            opening_first_chunks=1, plain_batch=2, switch_batch=1, ring_chunks=4,
                            first_chunks=1, refresh_every=4),
    student=StudentSettings(
        true_batch=2,
        stream_batch=2,
        birth_batch=2,
        opening_batch=2,
        opening_prompts=32,
        streams=4,
        ode_steps=2,
        ring_chunks=4,
        first_chunks=1,
        refresh_every=4,
    ),
    mix=Mix(1, 1, 1, 1, 1),
    minutes=(None, None, None),
    steps=(6, 6, 6),
    reading_minutes=None,
    reading_steps=6,
    reading_batch=4,
    reading_prompts=32,
    size=32,
    far=30,
    log_steps=2,
)


class Training:
    """All stages in one folder. Close it, or use it in a `with`, if it has workers."""

    def __init__(self, out: Path, model: ModelSpec, device: str, seed: int, settings: Settings = Settings(),
                 compiler: str | None = None, deadline: float | None = None, workers: int = 0,
                 graphs: bool = False):
        """Args:
            compiler: backend of torch.compile for this whole process; None leaves everything eager.
            deadline: value of `time.perf_counter` at which stages stop, to be continued later.
            workers: processes that plan data ahead; with 0 this process plans when needed.
            graphs: record the steps of teacher and student as CUDA graphs (see `graphs`).
        """
        self.out, self.seed, self.settings, self.deadline = out, seed, settings, deadline
        self.model = model.with_size(settings.size, settings.size)
        if self.model.height != self.model.width:
            raise UserError(
                f"model: {model.name} makes {model.width}x{model.height} pictures, but Moving Shapes are "
                "square; choose a square model."
            )
        self.device = check_device(device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.graphs = graphs
        if graphs and self.device.type != "cuda":
            raise UserError(f"--graphs: {device} has no CUDA graphs; leave the option out.")
        self.plan = SamplingPlan()
        use_compiler(compiler)
        self.workers = start_workers(workers)
        self.folder = out / "training"
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")

    def run(self, name: str) -> bool:
        """Train a stage to its end or to the deadline. Returns whether it is complete."""
        if name == "vae" and self._vae_file.is_file():
            logger.info("vae: complete")
            return True
        if name == "teacher" and not checkpoints(self.folder, name):
            reading = Budget(self.settings.reading_steps, self.settings.reading_minutes, self.deadline)
            if not self._train(self._reading_stage, "text", reading):
                return False
        at = STAGE_NAMES.index(name)
        make = {"vae": self._vae_stage, "teacher": self._teacher_stage, "student": self._student_stage}[name]
        budget = Budget(self.settings.steps[at], self.settings.minutes[at], self.deadline)
        complete = self._train(make, name, budget)
        if name == "vae" and complete:
            self._export_vae()
        return complete

    def pack(self, to: Path) -> int:
        """Copy the log and the files that another machine needs to continue to the folder `to`. Returns their
        size in bytes.
        """
        stages = [
            stage
            for stage in (*STAGE_NAMES, "text")
            if not (
                stage == "vae"
                and self._vae_file.is_file()
                or stage == "text"
                and checkpoints(self.folder, "teacher")
            )
        ]
        copies = pack(self.folder, stages, to / self.folder.name)
        for path in (self._vae_file, self.folder / LOG_NAME, self.out / "check.json"):
            if path.is_file():
                target = to / path.relative_to(self.out)
                target.parent.mkdir(parents=True, exist_ok=True)
                copies.append(Path(shutil.copy2(path, target)))
        return sum(path.stat().st_size for path in copies)

    def _train(self, make: Callable[[], Stage], name: str, budget: Budget) -> bool:
        found = load_checkpoint(self.folder, name)
        if found and found[1]["complete"]:
            logger.info("%s: complete, %d steps", name, found[1]["step"])
            return True
        return run_stage(make(), self.folder, budget, log_steps=self.settings.log_steps)

    @property
    def _vae_file(self) -> Path:
        return self.out / self.model.checkpoint.files["vae"]

    def _vae_stage(self) -> VAEStage:
        return VAEStage(
            self.model.vae, self.model.height, self.device, self.dtype, self.seed, self.settings.vae,
            self.workers,
        )

    def _export_vae(self) -> None:
        """Write the averaged VAE with normalised latents, which the later stages and inference load."""
        vae = WanVAE(self.model.vae).to(self.device)
        vae.load_state_dict(prefixed(self._average("vae"), "vae"))
        stage = VAEStage(
            self.model.vae, self.model.height, self.device, torch.float32, self.seed, self.settings.vae
        )
        count = 2 if self.settings.size else STATISTICS_BATCHES
        videos = (stage.video(-1 - i + 2**31, 8, self.settings.vae.whole_frames, self.model.height)
                  for i in range(count))
        fold_statistics(vae, *statistics(vae, videos))
        with atomic_path(self._vae_file) as temporary:
            save_file(
                {name: t.to("cpu", torch.bfloat16).contiguous() for name, t in vae.state_dict().items()},
                temporary,
            )

    def _maker(self, stream: int, files: WeightFiles | None = None) -> ClipMaker:
        """A maker of clips. Each stage has its own random `stream`."""
        if files is None:
            if not self._vae_file.is_file():
                raise UserError(f"{self._vae_file}: does not exist; first run --stage vae to its end.")
            files = WeightFiles(self.out, vae=self._vae_file)
        vae, _ = load_vae(self.model.vae, files, self.device, self.dtype)
        if self.device.type == "cuda":
            vae.use_channels_last()
        return ClipMaker(vae, self.model.text.text_len, self.model.height, 1000 * self.seed + stream,
                         self.settings.mix, self.settings.far, workers=self.workers)

    def _reading_stage(self) -> ReadingStage:
        return ReadingStage(self.model, self.device, self.dtype, self.seed, batch=self.settings.reading_batch,
                            prompts=self.settings.reading_prompts)

    def _teacher_stage(self) -> TeacherStage:
        encoder, attributes = UMT5Encoder(self.model.text), AttributeHead(self.model.text.dim)
        if not checkpoints(self.folder, "teacher"):  # a teacher's checkpoint also holds these two
            read = self._average("text")
            encoder.load_state_dict(prefixed(read, "text"))
            attributes.load_state_dict(prefixed(read, "attributes"))
        return TeacherStage(self.model, self.plan, self._maker(1), self.device, self.dtype, self.seed,
                            self.settings.teacher, encoder, attributes, self.graphs)

    def _student_stage(self) -> StudentStage:
        average = self._average("teacher")
        teacher, encoder = CausalDiT(self.model.dit), UMT5Encoder(self.model.text)
        teacher.load_state_dict(prefixed(average, "dit"))
        encoder.load_state_dict(prefixed(average, "text"))
        networks = (module.to(self.device, self.dtype).eval() for module in (teacher, encoder))
        return StudentStage(self.model, self.plan, self._maker(2), *networks, self.device, self.dtype,
                            self.seed, self.settings.student, self.graphs)

    def export(self, source: str = "student") -> dict[str, int]:
        """Write the weights folder. The transformer is that of stage `source`."""
        text = prefixed(self._average("teacher"), "text")
        return export_weights(
            self.out, prefixed(self._average(source), "dit"), text, load_file(self._vae_file)
        )

    def _average(self, stage: str) -> dict[str, Tensor]:
        """A stage's averaged weights, rounded to bfloat16 as their users expect."""
        found = load_checkpoint(self.folder, stage)
        if found is None:
            raise UserError(f"{self.folder}: there is no checkpoint of stage {stage}; train it first.")
        return {name: tensor.float() for name, tensor in found[0]["average"].items()}

    def bench(self, names: Sequence[str] = CASES, steps: int = 6) -> dict[str, dict[str, float]]:
        """Time the cases `names` on random weights (see `bench`), and write bench.json.

        Raises:
            UserError: an unknown name.
        """
        unknown = [name for name in names if name not in CASES]
        if unknown:
            raise UserError(f"--only: {unknown} cannot be timed; choose from {', '.join(CASES)}.")
        cases = [case for case in self._bench_cases(steps) if case.name in names]
        rows = run_bench(cases, self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.folder / BENCH_NAME) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        return rows

    def _bench_cases(self, steps: int) -> list[Case]:
        """The cases to time, with both phases of the VAE and of the teacher. All cases use untrained networks
        and enough steps to meet every kind of clip.
        """
        settings = self.settings
        student = replace(settings.student, first_chunks=2, streams=settings.student.stream_batch)
        births = -(-student.streams // student.birth_batch)

        def teacher() -> TeacherStage:
            return TeacherStage(
                self.model, self.plan, self._maker(0, WeightFiles()), self.device, self.dtype, self.seed,
                replace(settings.teacher, first_chunks=2, opening_first_chunks=2), graphs=self.graphs)

        def make_student() -> StudentStage:
            torch.manual_seed(self.seed)
            dit, encoder = CausalDiT(self.model.dit), UMT5Encoder(self.model.text)
            networks = (module.to(self.device, self.dtype).eval() for module in (dit, encoder))
            return StudentStage(self.model, self.plan, self._maker(0, WeightFiles()), *networks, self.device,
                                self.dtype, self.seed, student, self.graphs)

        return [Case("vae_crop", self._vae_stage, 0.0, 3, steps),
                Case("vae_whole", self._vae_stage, 0.9, 3, steps),
                Case("text", self._reading_stage, 0.0, 3, steps),
                Case("opening", teacher, 0.0, 3, steps, "openings"),
                Case("teacher", teacher, 0.9, 6, steps),
                Case("student", make_student, 0.0, births + len(JOBS), min(steps, len(JOBS)))]

    def close(self) -> None:
        """End the worker processes."""
        if self.workers is not None:
            self.workers.shutdown(wait=False, cancel_futures=True)
            self.workers = None

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
