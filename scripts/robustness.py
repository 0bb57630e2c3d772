"""Try to break the workbook, and record what held: python scripts/robustness.py all

    python scripts/robustness.py soak                 # one of the checks
    python scripts/robustness.py fuzz --examples 500  # fewer examples

Each check is merged into outputs/robustness.json as soon as it ends, with its command, what it claims and
measured, seconds, machine, torch and commit. README's table is made from that file (make readme). The streams
are on the smallest model that fills and turns the ring of the KV cache. The campaigns that are killed run
real kernels and write real files, but their notebooks hold no model.
Exit status: 0 all passed, 1 one failed, 2 wrong input.
"""

import argparse
import array
import ast
import fcntl
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
RECORD = ROOT / "outputs" / "robustness.json"
SCHEMA_VERSION = 1

# 16 x 16 pixels are one token per latent frame. The window holds a sink and two blocks.
SMALLEST = {"height": 16, "width": 16, "denoising_steps": [1000], "local_attn_size": 9, "sink_size": 3,
            "vae_chunk_latents": 3, "relative_rope": True}
PRESETS = ["baseline", "static_kv", "async_vae"]
HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</details></main><h1>gone</h1>",
    "\"><svg onload=alert(1)>", "<iframe srcdoc='<b>x</b>'>", "<!-- never closed", "&lt;b&gt; &amp;amp;",
    "| a | b |", "[link](javascript:alert(1))", "![p](https://example.invalid/x.png)", "```\nfence\n```",
    "`code` and ~~struck~~ and **bold** and _low_", "# heading", "- [x] Keep", "$$x^2$$ \\(y\\)",
    "{{ 7777*7777 }} {% for x in y %} {# c #}", "%s %d {0} ${HOME} $(id)",
    "\u202eright to left\u202c and \u200f",
    "zero\u200bwidth, \u2028 separator", "🦊 é ﷽ Ω̸",
    "a" * 5000, "'; DROP TABLE runs; --", "../../etc/passwd",
]
REFUSED = ["\x1b]0;pwned\x07", "\x1b[31mred", "\x9b31m", "a\x00b", "\ud83e", "\x7f\x08\x08", "  \n\t"]


# ---- record


def machine():
    """The facts that say where a figure comes from."""
    import torch

    from longlive_opt.measurement import environment

    commit, dirty, _ = environment.git_state(ROOT, os.environ)
    return {"machine": environment.machine("cpu")["cpu"], "torch": torch.__version__, "commit": commit,
            "dirty": dirty}


def merge(name, entry):
    """Put one check into the record, atomically; other checks stay."""
    from longlive_opt.files import atomic_path, read_json

    lock = open(str(RECORD.with_suffix(".lock")), "w")
    fcntl.flock(lock, fcntl.LOCK_EX)  # checks may run next to each other
    found = read_json(RECORD, "delete it") if RECORD.exists() else {}
    checks = dict(found.get("checks", {}), **{name: entry})
    ordered = {key: checks[key] for key in CHECKS if key in checks}
    lines = ",\n".join("%s: %s" % (json.dumps(key), json.dumps(value, ensure_ascii=False))
                       for key, value in ordered.items())
    with atomic_path(RECORD) as temporary:
        temporary.write_text('{"schema_version": %d, "checks": {\n%s\n}}\n' % (SCHEMA_VERSION, lines),
                             encoding="utf-8")
    lock.close()


def run_check(name, arguments):
    """Run one check and merge it; returns whether it passed."""
    check, claim = CHECKS[name]
    print("[%s] %s" % (name, claim), flush=True)
    started = time.perf_counter()
    where = machine()
    try:
        figure, n, problems = check(arguments)
    except Exception as error:  # a check that breaks is one that failed
        figure, n, problems = {}, 0, ["%s: %s" % (type(error).__name__, str(error)[:300])]
        logging.exception("check %s", name)
    seconds = round(time.perf_counter() - started, 1)
    command = "python scripts/robustness.py %s" % name
    if name == "fuzz" and arguments.examples != EXAMPLES:
        command += " --examples %d" % arguments.examples
    merge(name, {"claim": claim, "command": command, "n": n, "figure": figure, "seconds": seconds,
                 "passed": not problems, "problems": problems[:10],
                 "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **where})
    print("[%s] %s in %.0f s: %s" % (name, "passed" if not problems else "FAILED", seconds,
                                     json.dumps(problems[:3] or figure, ensure_ascii=False)), flush=True)
    return not problems


# ---- streams


def micro_session(**keys):
    """A session on the smallest model, in float32 on one thread."""
    from micro import micro_pipeline

    from longlive_opt.streaming.session import StreamingSession

    return StreamingSession(micro_pipeline(**dict(SMALLEST, **keys)))


def resident_mb():
    """Memory of this process, in MB, as the system counts it."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def stream(arguments):
    """One endless stream in a process of its own; prints what it saw as JSON."""
    from micro import micro_model

    blocks, warm, digests, memory = arguments.blocks, 500, [], []
    spread, level = array.array("d"), array.array("d")
    with micro_model():
        session = micro_session(use_static_kv=True)
        for chunk in session.stream("a red fox walks", blocks):
            digests.append(hashlib.sha256(chunk.frames.numpy().tobytes()).hexdigest()[:16])
            spread.append(chunk.latents.std().item())
            level.append(chunk.latents.mean().item())
            if chunk.block >= warm and chunk.block % 100 == 0:
                memory.append(round(resident_mb(), 2))
            if chunk.block % 500 == 499:
                print("  block %d, %.1f MB" % (chunk.block + 1, resident_mb()), file=sys.stderr, flush=True)
    tenth = blocks // 10
    parts = (slice(warm, warm + tenth), slice(blocks - tenth, blocks))
    print(json.dumps({"digests": digests, "memory": memory,
                      "spread": [sum(spread[part]) / tenth for part in parts],
                      "level": [sum(level[part]) / tenth for part in parts]}))


def soak(arguments):
    """Twice the same endless stream, each in its own process: memory, statistics of the latents, frames."""
    command = [sys.executable, str(Path(__file__).resolve()), "stream", "--blocks", str(arguments.blocks)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
            for _ in range(2)]
    first, second = [json.loads(process.communicate()[0]) for process in both]
    problems, memory = [], first["memory"]
    (early, late), (before, after) = first["spread"], first["level"]
    growth = max(max(one["memory"]) - one["memory"][0] for one in (first, second))
    differing = sum(one != other for one, other in zip(first["digests"], second["digests"]))
    count = len(first["digests"]) + len(second["digests"])
    if growth > 8:
        problems.append("memory grew by %.1f MB" % growth)
    if abs(late / early - 1) > 0.02 or abs(after - before) > 0.02 * early:
        problems.append("the latents drift: spread %.4f, then %.4f; mean %.4f, then %.4f" % (
            early, late, before, after))
    if differing or count != 2 * arguments.blocks:
        problems.append("%d of %d blocks differ in the second stream" % (differing, count // 2))
    return {"memory_mb_after_500_blocks": memory[0], "memory_mb_at_the_end": memory[-1],
            "memory_growth_mb": round(growth, 1), "latents_std_first_tenth": round(early, 5),
            "latents_std_last_tenth": round(late, 5), "latents_mean_shift": round(abs(after - before), 5),
            "blocks_that_differ_the_second_time": differing,
            "frames_sha256": hashlib.sha256("".join(first["digests"]).encode()).hexdigest()}, count, problems


def switches(arguments):
    """Requests from another thread at random moments; then the same video from its schedule."""
    import torch
    from micro import micro_model

    from longlive_opt.prompts import PromptSchedule

    count, rng, problems = arguments.switches, random.Random(7), []
    prompts = ["prompt %d" % (index % 11) for index in range(count)]
    asked, applied, digests, latents, pace = [], [], [], [], [0.1]
    with micro_model():
        session = micro_session(use_static_kv=True)

        def ask():
            for prompt in prompts:
                time.sleep(rng.expovariate(1 / (1.4 * pace[0])))  # some blocks have none, others several
                before = session.next_block
                session.switch_prompt(prompt)
                asked.append((before, session.next_block))

        thread = threading.Thread(target=ask)
        began = time.perf_counter()
        for chunk in session.stream("first"):
            pace[0] = 0.9 * pace[0] + 0.1 * (time.perf_counter() - began)
            began = time.perf_counter()
            digests.append(hashlib.sha256(chunk.frames.numpy().tobytes()).digest())
            if chunk.block < 300:
                latents.append(chunk.latents)
            if chunk.switched:
                applied.append((chunk.block, chunk.prompt))
            if chunk.block == 0:
                thread.start()
            if len(applied) == count:
                break
        thread.join()
        if [prompt for _, prompt in applied] != prompts:
            problems.append("prompts were lost or changed their order")
        # A boundary serves one request: the first free one at or after the block during which it was made.
        wrong, least, most = 0, -1, -1
        for (block, _), (before, after) in zip(applied, asked):
            least, most = max(before, least + 1), max(after + 1, most + 1)
            wrong += not least <= block <= most
        if wrong:
            problems.append("%d switches took over at another block than the next free one" % wrong)
        schedule = PromptSchedule(("first", *prompts), tuple(3 * block for block, _ in applied))
        session.reset()
        replayed = [hashlib.sha256(chunk.frames.numpy().tobytes()).digest()
                    for chunk in session.play(schedule, len(digests))]
        differing = sum(one != other for one, other in zip(digests, replayed))
        if differing or len(replayed) != len(digests):
            problems.append("%d blocks differ when the schedule is played again" % differing)
        early = [frame for frame in schedule.switch_frames if frame < 3 * len(latents)]
        short = PromptSchedule(schedule.prompts[:len(early) + 1], tuple(early))
        reference = micro_session()
        error = max((chunk.latents - ours).abs().max().item() / ours.abs().max().item()
                    for chunk, ours in zip(reference.play(short, len(latents)), latents))
        if error > 1e-4:
            problems.append("the ring's latents are %.1e off the rolling reference" % error)
        assert torch.is_grad_enabled()
    return {"blocks": len(digests), "applied": len(applied), "at_another_block": wrong,
            "blocks_that_differ_when_replayed": differing, "blocks_against_the_rolling_cache": len(latents),
            "largest_relative_error_of_latents": float("%.1e" % error)}, count, problems


# ---- campaigns


PARAMETERS = """campaign: str = "x"
run: int = 1
output_dir: str = "x"
name: str = "x"
seed: int = 0
device: str = "cpu"
"""
# What a run writes, through the same functions and in several pieces, without a model: a kernel starts in
# seconds, so that kills meet every phase.
CELLS = ["""import json, pathlib, time
from longlive_opt.files import atomic_path
from longlive_opt.measurement.result import write_result
folder = pathlib.Path(output_dir)
for name_of_file in ("video.mp4", "frames.png", "reference.safetensors"):
    with atomic_path(folder / name_of_file) as temporary, open(temporary, "wb") as file:
        for _ in range(20):
            file.write(bytes(100_000))
            time.sleep(0.02)""", """result = json.loads(pathlib.Path("complete.json").read_text())
result |= {"preset": name, "run": run, "parameters": {"name": name, "seed": seed}}
write_result(folder / "result.json", result)
time.sleep(0.5)"""]
SUMMARY = """import pathlib
from longlive_opt import report
campaign = report.load(pathlib.Path.cwd() / campaign_dir)
report.write_campaign_log(campaign)"""


def make_project(root):
    """A project of three presets whose notebooks take seconds."""
    import nbformat
    from example_results import example_result

    from longlive_opt.config import ExperimentConfig
    from longlive_opt.measurement import decision
    from longlive_opt.prompts import schedule_of

    v4 = nbformat.v4
    planned = decision.planned(ExperimentConfig(), schedule_of(ExperimentConfig()))
    complete = dict(example_result(steady=40, switches=4), **{
        key: planned[key] for key in ("prompt_schedule", "model", "weights", "seed")})
    (root / "complete.json").write_text(json.dumps(complete), encoding="utf-8")
    for name in ("notebooks", "params"):
        (root / name).mkdir()

    def write(name, parameters, cells):
        code = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        code += map(v4.new_code_cell, cells)
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(v4.new_notebook(cells=code, metadata={"kernelspec": kernel}),
                       str(root / "notebooks" / name))

    for number, preset in enumerate(PRESETS):
        write("%02d_%s.ipynb" % (number, preset), PARAMETERS, CELLS)
        (root / "params" / ("%s.yaml" % preset)).write_text("name: %s\nseed: 0\ndevice: cpu\n" % preset)
    write("99_summary.ipynb", 'campaign_dir: str = ""\nlog_path: str = ""', [SUMMARY])


def start_campaign(root, **pipes):
    """Start the runner on the project in `root`, in a process of its own."""
    code = "import sys, pathlib; from longlive_opt.runner import __main__ as runner; " \
           "sys.exit(runner.main(['run', '--campaign', 'c'], pathlib.Path(sys.argv[1])))"
    environment = dict(os.environ, PYTHONPATH=str(ROOT), LONGLIVE_OPT_HOME=str(root))
    return subprocess.Popen([sys.executable, "-c", code, str(root)], text=True, env=environment, **pipes)


def finished_in(folder):
    """Label -> SHA-256 of every result.json, all of which must be readable, and the labels of others."""
    from longlive_opt.errors import UserError
    from longlive_opt.measurement.result import read_result

    whole, broken = {}, []
    for path in sorted(folder.glob("*/result.json")):
        try:
            read_result(path)
            whole[path.parent.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        except UserError:
            broken.append(path.parent.name)
    return whole, broken


def leftovers(folder):
    """Files and folders that only an unfinished write or move leaves."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*")
            if re.search(r"\.tmp|\.new$|\.replaced$", path.name)]


def kill(arguments):
    """kill -9 of the runner at random moments, each time followed by the same command."""
    rng, problems, phases = random.Random(3), [], {}
    kills = campaigns = lost = changed = half = left = 0
    while kills < arguments.kills and not problems:
        with tempfile.TemporaryDirectory() as home:
            root, folder, known, status = Path(home), Path(home) / "outputs" / "c", {}, None
            make_project(root)
            while status is None:
                process = start_campaign(root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                try:
                    status = process.wait(rng.uniform(1, arguments.kill_within_s)
                                          if kills < arguments.kills else 600)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    kills += 1
                time.sleep(rng.choice((0, 0, 4)))  # most reruns start while the orphaned kernel still lives
                whole, broken = finished_in(folder)
                half += len(broken)
                lost += len(known.keys() - whole.keys())
                changed += sum(whole.get(label, sha) != sha for label, sha in known.items())
                known.update(whole)
                if status is None:
                    phase = "%d of %d finished" % (len(whole), len(PRESETS))
                    phases[phase] = phases.get(phase, 0) + 1
                    print("  kill %d: %s" % (kills, phase), flush=True)
            campaigns += 1
            if status or set(whole) != set(PRESETS):
                problems.append("the rerun ended with %s and %s finished" % (status, sorted(whole)))
            left += len(leftovers(folder))
    for count, words in ((lost, "finished results were lost"), (changed, "finished results changed"),
                         (half, "result.json were half-written"), (left, "temporary files stayed")):
        if count:
            problems.append("%d %s" % (count, words))
    return {"campaigns_completed": campaigns, "finished_results_lost": lost,
            "finished_results_changed": changed, "half_written": half, "temporary_files_left": left,
            "killed_with": phases}, kills, problems


def two(arguments):
    """Two runners on one campaign at the same moment: one runs it, the other says so."""
    problems, refused = [], 0
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as home:
            make_project(Path(home))
            both = [start_campaign(Path(home), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                    for _ in range(2)]
            ends = [(process.communicate(timeout=900)[1], process.returncode) for process in both]
            codes = sorted(code for _, code in ends)
            message = next((text for text, code in ends if code == 2), "")
            refused += "is running it" in message
            whole, broken = finished_in(Path(home) / "outputs" / "c")
            if codes != [0, 2] or "is running it" not in message or broken or set(whole) != set(PRESETS):
                problems.append("exit codes %s, finished %s, %s" % (codes, sorted(whole), message[:200]))
    return {"refused_with_one_sentence": refused}, arguments.rounds, problems


def disk(arguments):
    """ENOSPC at every write of a runner in turn, next to a finished result."""
    import contextlib
    import errno
    import io

    from example_results import example_result

    from longlive_opt import files
    from longlive_opt.measurement.result import write_result
    from longlive_opt.report import write_campaign_log
    from longlive_opt.report.campaign import load
    from longlive_opt.runner import __main__ as runner
    from longlive_opt.runner import execute

    logging.disable(logging.CRITICAL)
    problems, failed, at = [], 0, 0
    counter = {"now": 0, "fail": 0}
    fsync, write_text, mkdir = os.fsync, Path.write_text, Path.mkdir

    def counted(function):
        def call(*parts, **more):
            counter["now"] += 1
            if counter["now"] == counter["fail"]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*parts, **more)
        return call

    def pretend(root, job, folder, stderr):
        """What a notebook writes, without its kernel."""
        if not job.needs_result:
            write_campaign_log(load(root / job.parameters["campaign_dir"]))
        else:
            result = example_result(job.parameters["name"], steady=4, switches=1)
            write_result(folder / "result.json", dict(result, parameters=dict(job.parameters), **{
                key: job.known[key] for key in ("prompt_schedule", "model", "weights", "seed")}))
        (folder / "notebook.ipynb").write_text("{}")

    def export(notebook, html, **options):
        with files.atomic_path(html) as temporary:
            temporary.write_text("<main>")

    real, execute._execute, execute.export_html = (execute._execute, execute.export_html), pretend, export
    try:
        with tempfile.TemporaryDirectory() as home:
            root = Path(home)
            for name in ("notebooks", "params"):
                (root / name).symlink_to(ROOT / name)
            command = ["run", "--campaign", "c", "--presets", "baseline", "static_kv", "--set", "seed=1"]
            os.environ["COLUMNS"] = "200"
            runner.check_machine = lambda *parts: None
            runner.require_reference = lambda *parts: None

            def run(fail):
                counter.update(now=0, fail=fail)
                os.fsync, Path.write_text, Path.mkdir = map(counted, (fsync, write_text, mkdir))
                output = io.StringIO()
                try:
                    with contextlib.redirect_stderr(output):
                        return runner.main(command, root), output.getvalue()
                finally:
                    os.fsync, Path.write_text, Path.mkdir = fsync, write_text, mkdir

            assert run(0)[0] == 0
            kept = root / "outputs/c/baseline/result.json"
            digest = hashlib.sha256(kept.read_bytes()).hexdigest()
            while True:
                at += 1
                shutil.rmtree(str(root / "outputs/c/static_kv"), ignore_errors=True)
                status, errors = run(at)
                if counter["now"] < at:  # there was no such write
                    break
                failed += status != 0
                whole, broken = finished_in(root / "outputs/c")
                if broken or hashlib.sha256(kept.read_bytes()).hexdigest() != digest:
                    problems.append("write %d: damaged %s" % (at, broken or "the earlier result"))
                if status not in (0, 1, 2) or "Traceback" in errors or len(errors.splitlines()) > 1:
                    problems.append("write %d: exit %s, %s" % (at, status, errors[:200]))
                if status == 0 and set(whole) != {"baseline", "static_kv"}:
                    problems.append("write %d: exit 0 and %s" % (at, sorted(whole)))
                again, errors = run(0)
                if again or leftovers(root / "outputs/c"):
                    problems.append("write %d: the rerun ends with %s and leaves %s" % (
                        at, again, leftovers(root / "outputs/c")))
    finally:
        execute._execute, execute.export_html = real
        logging.disable(logging.NOTSET)
    return {"writes": at - 1, "runs_that_failed_in_words": failed,
            "earlier_result_damaged": 0 if not problems else None}, at - 1, problems


# ---- input


def fuzz(arguments):
    """Arbitrary and damaged input for every reader."""
    import fuzzing

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    share = -(-arguments.examples // len(fuzzing.READERS))
    found, problems = {}, []
    try:
        for reader in fuzzing.READERS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found[reader] = fuzzing.fuzz(reader, Path(folder), share)
                except Exception as error:
                    problems.append("%s: %s: %s" % (reader, type(error).__name__, str(error)[:200]))
            print("  %s: %s" % (reader, found.get(reader, "FAILED")), flush=True)
    finally:
        logging.disable(logging.NOTSET)
    total = {kind: sum(one[kind] for one in found.values()) for kind in ("read", "refused")}
    return dict(total, readers=len(fuzzing.READERS), by_reader=found), sum(total.values()), problems


def elements(page):
    """(tag, attributes) of every element that a browser makes of `page`."""
    from html.parser import HTMLParser

    found = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag, attrs):
            # Ids of cells are random.
            found.append((tag, {name: value for name, value in attrs if name != "id"}))

    finder = Finder()
    finder.feed(page)
    finder.close()
    return found


def hostile(arguments):
    """Prompts, titles and reasons that try to be HTML, Markdown, a template or a terminal's command."""
    import mistune
    import nbformat
    from example_results import example_result

    from longlive_opt import report
    from longlive_opt.config import ExperimentConfig
    from longlive_opt.errors import UserError
    from longlive_opt.measurement.result import na, write_result
    from longlive_opt.report.html_export import export_html, network_references
    from longlive_opt.runner.execute import _Lines

    problems, surfaces = [], 0
    for text in REFUSED:
        try:
            ExperimentConfig.from_mapping({"prompts": [text], "title": text})
            problems.append("accepted: %r" % text)
        except UserError:
            pass

    def harmless(page, where, text, kept):
        """`page` has the elements that the harmless text gives, and no others."""
        if elements(page) != kept:
            problems.append("%s: %r makes other elements" % (where, text[:40]))

    def pages(text, folder):
        """Every surface with `text` wherever a stranger's text can get: name -> page as HTML."""
        run = example_result("speed", 0.8, steady=4, switches=1)
        base = example_result("baseline", steady=4, switches=1)
        run.update(title=text, hypothesis=text,
                   prompt_schedule={"prompts": [text, text], "switch_frames": [9]})
        base["prompt_schedule"] = run["prompt_schedule"]
        run["quality"].update(lpips=na(text, text), flags=[text])
        run["environment"]["cpu"] = base["environment"]["cpu"] = text
        run["optimizations"] = [{"name": text, "applied": True, "report": {text: text}}]
        for result in (base, run):
            write_result(folder / "c" / result["preset"] / "result.json", result)
        (folder / "c" / "balanced").mkdir(exist_ok=True)
        (folder / "c" / "balanced" / "failed.json").write_text(json.dumps(
            {"status": "failed", "meaning": text, "parameters": {"title": text, "hypothesis": text}}))
        campaign = report.load(folder / "c")
        log = report.write_campaign_log(campaign).read_text(encoding="utf-8")
        card = report.cards(folder / "c")["speed"]
        cells = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=[
            nbformat.v4.new_output("display_data", data={"text/html": card})])])
        nbformat.write(cells, folder / "n.ipynb")
        export_html(folder / "n.ipynb", folder / "r.html", title=text, card=card)
        html = (folder / "r.html").read_text(encoding="utf-8")
        if network_references(html):
            problems.append("report: %r loads %s" % (text[:40], network_references(html)))
        return {"card": card, "report": html, "log": mistune.html(log), "table row": "".join(
            "<p n=%d>" % line.count("|") for line in log.splitlines() if line.startswith("| SS")),
            "index": report.write_index(campaign).read_text(encoding="utf-8"),
            "recommendation": str(report.recommendation(campaign))}

    with tempfile.TemporaryDirectory() as home:
        plain = {name: elements(page) for name, page in pages("a plain text", Path(home)).items()}
        for text in HOSTILE:
            ExperimentConfig.from_mapping({"prompts": [text]})
            for name, page in pages(text, Path(home)).items():
                harmless(page, name, text, plain[name])
                if "60481729" in page:
                    problems.append("%s: the template was filled" % name)
                surfaces += 1
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    log = logging.getLogger("longlive_opt.runner.execute")
    log.addHandler(handler)
    log.propagate, level = False, log.level
    log.setLevel(logging.INFO)
    for text in HOSTILE + REFUSED:
        _Lines("x").write(text)
        surfaces += 1
    log.removeHandler(handler)
    log.propagate = True
    log.setLevel(level)
    if any(re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]", line) for line in records):
        problems.append("a control character reached the terminal")
    return {"texts": len(HOSTILE) + len(REFUSED), "refused_at_the_door": len(REFUSED), "pages": surfaces
            }, surfaces, problems


class _Bomb:
    """A pickle that makes a file when it is executed."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def pickles(arguments):
    """Weights files that would run code, and every call that could run it."""
    import pickle

    import torch

    from longlive_opt.errors import UserError
    from longlive_opt.models.checkpoint import open_checkpoint

    problems, files, calls = [], 0, 0
    with tempfile.TemporaryDirectory() as home:
        mark = Path(home) / "executed"
        for wrap in (lambda bomb: bomb, lambda bomb: {"model": bomb}, lambda bomb: {"a": torch.zeros(1),
                                                                                     "b": bomb}):
            for zipped in (True, False, None):
                path = Path(home) / "w.pt"
                if zipped is None:
                    path.write_bytes(pickle.dumps(wrap(_Bomb(mark))))
                else:
                    torch.save(wrap(_Bomb(mark)), str(path), _use_new_zipfile_serialization=zipped)
                files += 1
                try:
                    open_checkpoint(path, ("model", None))
                    problems.append("a file with code was opened")
                except UserError:
                    pass
        if mark.exists():
            problems.append("code in a weights file was executed")
        path.write_bytes(pickle.dumps(_Bomb(mark)))
        pickle.loads(path.read_bytes())
        if not mark.exists():
            problems.append("the check is blind: its own pickle does nothing")
    for path in [*(ROOT / "longlive_opt").rglob("*.py"), *(ROOT / "scripts").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path == Path(__file__).resolve():
                continue
            name = ast.unparse(node.func)
            if name in ("torch.load", "load_state_dict_from_url"):
                calls += 1
                only = [word.value for word in node.keywords if word.arg == "weights_only"]
                if not only or getattr(only[0], "value", None) is not True:
                    problems.append("%s:%d: torch.load without weights_only=True" % (path.name, node.lineno))
            if name in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load",
                        "os.system", "shelve.open", "marshal.loads"):
                problems.append("%s:%d: %s" % (path.name, node.lineno, name))
    return {"files_with_code_refused": files, "calls_of_torch_load_all_weights_only": calls}, files, problems


EXAMPLES = 10000
CHECKS = {
    "soak": (soak, "10,000 blocks twice: flat memory, no drift of the latents, the same frames"),
    "switches": (switches, "1,000 prompt switches at random moments: none lost, each at the next free block, "
                           "the cache as in the reference"),
    "kill": (kill, "kill -9 at 20 random moments of a campaign: no finished result lost, changed or "
                   "half-written, and the rerun finishes"),
    "two": (two, "two runners on one campaign at once: one runs, the other is refused"),
    "disk": (disk, "disk full at every write in turn: earlier results stay, one clear error"),
    "fuzz": (fuzz, "10,000 arbitrary or damaged inputs for every reader together: only our own errors"),
    "hostile": (hostile, "hostile prompts, titles and reasons: inert in report, index, log and terminal"),
    "pickles": (pickles, "weights files with code in them: refused, and none of it runs"),
}


def main(argv=None):
    """Run checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="check", required=True, metavar="all | CHECK")
    commands.add_parser("all", help="every check, the short ones first")
    commands.add_parser("stream", help="half of the soak, which starts it")
    for name, (_, claim) in CHECKS.items():
        commands.add_parser(name, help=claim.replace("%", "%%"))
    for command in commands.choices.values():
        command.add_argument("--blocks", type=int, default=10000, help="of the soak (%(default)s)")
        command.add_argument("--switches", type=int, default=1000, help="%(default)s")
        command.add_argument("--kills", type=int, default=20, help="%(default)s")
        command.add_argument("--kill-within-s", type=float, default=45, help="of the start (%(default)s)")
        command.add_argument("--rounds", type=int, default=3, help="of two runners (%(default)s)")
        command.add_argument("--examples", type=int, default=EXAMPLES, help="of the fuzzing (%(default)s)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.check == "stream":
        stream(arguments)
        return 0
    names = list(reversed(list(CHECKS))) if arguments.check == "all" else [arguments.check]
    return 0 if all([run_check(name, arguments) for name in names]) else 1


if __name__ == "__main__":
    sys.exit(main())
