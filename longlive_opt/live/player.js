// The player in the browser: frames come as JPEGs in binary messages and are drawn on a canvas in their order.

const SEEN_EVERY = 8; // frames between two receipts; without them the kernel pauses the stream
const IDLE = new Set(["ready", "stopped", "ended", "failed"]);

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function number(value, digits, unit) {
  return value === null || value === undefined ? "n/a" : `${value.toFixed(digits)} ${unit}`;
}

function render({ model, el }) {
  const send = (kind, more = {}) => model.send({ kind, ...more });
  const button = (name, label) => make("button", { type: "button", class: `ll-${name}` }, label);
  const root = make("div", { class: "ll-player" });
  const preset = make("select", { "aria-label": "preset", class: "ll-preset" });
  const modelName = make("select", { "aria-label": "model", class: "ll-model" });
  const canvas = make("canvas", { class: "ll-screen", width: 16, height: 9, role: "img", "aria-label": "video" });
  const prompt = make("input", { type: "text", class: "ll-prompt", "aria-label": "prompt" });
  const ask = button("ask", "Play");
  const play = button("play", "Play"), pause = button("pause", "Pause");
  const stop = button("stop", "Stop"), reset = button("reset", "Reset");
  const save = button("save", "Save");
  const seed = make("input", { type: "number", min: 0, step: 1, class: "ll-seed", "aria-label": "seed" });
  const fps = make("select", { class: "ll-fps", "aria-label": "frames per second" });
  for (const [value, label] of [["", "stream's pace"], ...[4, 8, 12, 16, 24, 25, 30].map((n) => [n, `${n} FPS`])])
    fps.append(make("option", { value }, label));
  const state = make("span", { class: "ll-state", role: "status" });
  const notice = make("div", { class: "ll-notice", role: "alert" });
  const requests = make("div", { class: "ll-requests", "aria-live": "polite" });
  const timeline = make("canvas", { class: "ll-timeline", role: "img", "aria-label": "the last blocks" });
  const about = make("div", { class: "ll-about" });
  const gauges = {};
  const gaugeRow = make("div", { class: "ll-gauges" });
  for (const [key, label, title] of [
    ["speed", "ms per frame", "of the last block, decoding included"],
    ["pace", "pace", "frames per second that are shown"],
    ["ps", "PS", "prompt switch latency: from the request to the first frame that shows it"],
    ["memory", "memory", "the GPU's, or this process's on a CPU"],
    ["buffer", "buffer", "frames that wait to be shown"],
    ["frames", "frames", "shown so far"],
  ]) {
    gauges[key] = make("b", {}, "n/a");
    gaugeRow.append(make("span", { title, class: `ll-gauge ll-gauge-${key}` }, gauges[key], make("i", {}, label)));
  }
  const field = (label, control) => make("label", {}, label, control);
  root.append(
    make("div", { class: "ll-row" }, field("preset", preset), field("model", modelName), state),
    make("div", { class: "ll-stage" }, canvas),
    timeline,
    make("div", { class: "ll-row" }, prompt, ask),
    make("div", { class: "ll-row" }, play, pause, stop, reset, field("seed", seed), fps, save),
    gaugeRow, notice, requests, about,
  );
  el.append(root);

  let drawing = Promise.resolve();
  let shown = null; // the last frame that was drawn, without its picture
  let token = 0;
  const askedHere = new Map(); // token or request -> when it was asked for in this browser, ms
  const seenHere = new Map(); // request -> ms from the key to the pixels, in this browser's own clock
  let alive = true;

  function draw(bitmap, frame) {
    if (canvas.width !== bitmap.width || canvas.height !== bitmap.height) {
      canvas.width = bitmap.width;
      canvas.height = bitmap.height;
      canvas.classList.toggle("ll-small", bitmap.width < 320);
    }
    canvas.getContext("2d").drawImage(bitmap, 0, 0);
    bitmap.close();
    shown = frame;
    canvas.dataset.frame = frame.number;
    if (frame.first_of !== null && askedHere.has(frame.first_of)) {
      seenHere.set(frame.first_of, performance.now() - askedHere.get(frame.first_of));
      askedHere.delete(frame.first_of);
      drawRequests();
    }
    if (frame.number % SEEN_EVERY === 0) send("seen", { frame: frame.number });
    drawTimeline();
  }

  function onMessage(content, buffers) {
    if (content.kind === "frame") {
      const decoded = createImageBitmap(new Blob([buffers[0]], { type: "image/jpeg" }));
      drawing = drawing
        .then(() => decoded)
        .then((bitmap) => alive && draw(bitmap, content))
        .catch((error) => { notice.textContent = `A picture could not be drawn: ${error}`; });
    } else if (content.kind === "asked") {
      askedHere.set(content.number, askedHere.get(content.token));
      askedHere.delete(content.token);
    } else if (content.kind === "clear") {
      drawing = drawing.then(() => {
        shown = null;
        seenHere.clear();
        delete canvas.dataset.frame;
        canvas.getContext("2d").clearRect(0, 0, canvas.width, canvas.height);
        drawTimeline();
      });
    }
  }

  function drawRequests() {
    const status = model.get("status");
    requests.replaceChildren(...(status.requests || []).slice(-4).map((request) => {
      const here = seenHere.get(request.number);
      const more = here === undefined ? "" : ` (${here.toFixed(0)} ms in this browser)`;
      return make("div", {}, make("q", {}, request.prompt), `: ${request.sentence}${more}`);
    }));
  }

  // One bar per block, as high as it took to make; what was shown is solid, and the line is where playing is.
  function drawTimeline() {
    const status = model.get("status"), blocks = status.blocks || [];
    const width = timeline.clientWidth || 400, height = 44, ratio = window.devicePixelRatio || 1;
    timeline.width = width * ratio;
    timeline.height = height * ratio;
    const pen = timeline.getContext("2d");
    pen.scale(ratio, ratio);
    const style = getComputedStyle(root);
    const ink = style.color, accent = style.getPropertyValue("--ll-accent"), bar = style.getPropertyValue("--ll-bar");
    if (!blocks.length) return;
    const step = width / 32, first = Math.max(0, blocks[blocks.length - 1].block - 30);
    const most = Math.max(...blocks.map((block) => block.ms / block.frames));
    pen.font = "10px sans-serif";
    for (const block of blocks) {
      const x = (block.block - first) * step;
      if (x < 0) continue;
      const tall = Math.max(2, (height - 14) * (block.ms / block.frames / most));
      pen.globalAlpha = shown && block.block <= shown.block ? 1 : 0.4;
      pen.fillStyle = block.switched ? accent : bar;
      pen.fillRect(x + 1, height - tall, step - 2, tall);
      if (block.switched || block.block % 10 === 0) {
        pen.globalAlpha = 1;
        pen.fillStyle = ink;
        pen.fillText(block.block, x + 1, 10);
      }
    }
    if (shown) {
      const x = (shown.block - first + (shown.index + 1) / shown.count) * step;
      pen.globalAlpha = 1;
      pen.fillStyle = ink;
      pen.fillRect(x - 1, 12, 2, height - 12);
    }
  }

  function onStatus() {
    const status = model.get("status");
    const now = status.state || "empty", idle = IDLE.has(now), playing = now === "playing" || now === "paused";
    root.dataset.state = now;
    state.textContent = status.message ? `${now}: ${status.message}` : now;
    notice.textContent = status.notice || "";
    ask.textContent = playing ? "New prompt" : "Play";
    ask.disabled = !(idle || playing);
    play.disabled = !(idle || now === "paused");
    pause.disabled = now !== "playing";
    stop.disabled = !(playing || now === "warming up");
    save.disabled = !status.frames;
    preset.disabled = modelName.disabled = now === "loading" || now === "closed" || preset.options.length < 2
      && modelName.options.length < 2;
    gauges.speed.textContent = number(status.ms_per_frame, 1, "ms");
    gauges.pace.textContent = number(status.pace_fps, 1, "FPS");
    gauges.ps.textContent = number(status.ps_ms, 0, "ms");
    gauges.memory.textContent = number(status.memory_gb, 2, "GB");
    gauges.buffer.textContent = number(status.buffer_frames, 0, "frames");
    gauges.frames.textContent = status.frames ?? 0;
    if (document.activeElement !== seed && status.seed !== null && status.seed !== undefined) seed.value = status.seed;
    if (document.activeElement !== fps) fps.value = status.fps ?? "";
    about.textContent = status.about || "";
    drawRequests();
    drawTimeline();
  }

  function onChoices() {
    const choices = model.get("choices");
    for (const [select, names, chosen] of [[preset, choices.presets, choices.preset],
                                           [modelName, choices.models, choices.model]]) {
      select.replaceChildren(...(names || []).map((name) => make("option", { value: name }, name)));
      select.value = chosen;
    }
    if (!prompt.value) prompt.value = choices.prompt || "";
  }

  function submit() {
    const now = root.dataset.state;
    if (now === "playing" || now === "paused") {
      const mine = `here ${token++}`;
      askedHere.set(mine, performance.now());
      send("ask", { prompt: prompt.value, token: mine });
    } else send("play", { prompt: prompt.value, seed: seed.value });
  }

  ask.addEventListener("click", submit);
  prompt.addEventListener("keydown", (event) => {
    event.stopPropagation(); // the notebook has shortcuts of its own
    if (event.key === "Enter" && !ask.disabled) submit();
  });
  play.addEventListener("click", () => send("play", { prompt: prompt.value, seed: seed.value }));
  pause.addEventListener("click", () => send("pause"));
  stop.addEventListener("click", () => send("stop"));
  reset.addEventListener("click", () => send("reset", { seed: seed.value }));
  save.addEventListener("click", () => send("save"));
  fps.addEventListener("change", () => send("fps", { fps: fps.value }));
  for (const select of [preset, modelName])
    select.addEventListener("change", () => send("load", { preset: preset.value, model: modelName.value }));

  model.on("msg:custom", onMessage);
  model.on("change:status", onStatus);
  model.on("change:choices", onChoices);
  onChoices();
  onStatus();
  return () => {
    alive = false;
    model.off("msg:custom", onMessage);
    model.off("change:status", onStatus);
    model.off("change:choices", onChoices);
  };
}

export default { render };
