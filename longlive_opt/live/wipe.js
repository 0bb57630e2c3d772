// Two clips on one canvas: one left of the slider and one right of it, or side by side.

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function initialize({ model, sides }) {
  model.on("msg:custom", (content, buffers) => {
    if (content.kind === "clear") sides[0].length = sides[1].length = 0;
    if (content.kind === "picture")
      sides[content.side][content.number] = new Blob([buffers[0]], { type: "image/jpeg" });
  });
}

function render({ model, el, sides }) {
  const root = make("div", { class: "ll-player ll-comparison" });
  const run = make("button", { type: "button", class: "ll-run" }, "Compare");
  const stop = make("button", { type: "button", class: "ll-stop" }, "Stop");
  const both = make("input", { type: "checkbox", class: "ll-both" });
  const state = make("span", { class: "ll-state", role: "status" });
  const canvas = make("canvas", { class: "ll-screen", width: 16, height: 9, role: "img", "aria-label": "both videos" });
  const slider = make("input", { type: "range", min: 0, max: 100, value: 50, class: "ll-wipe",
                                 "aria-label": "where one preset ends and the other begins" });
  const words = make("div", {});
  root.append(
    make("div", { class: "ll-row" }, run, stop, make("label", {}, both, "side by side"), state),
    make("div", { class: "ll-stage" }, canvas), slider, words,
  );
  el.append(root);

  let frame = 0, alive = true, timer = 0;

  async function tick() {
    const counts = sides.map((side) => side.length), some = counts.filter((count) => count);
    if (some.length) {
      frame = (frame + 1) % Math.min(...some);
      const pictures = await Promise.all(
        sides.map((side) => (side[frame] ? createImageBitmap(side[frame]) : null)));
      if (alive) draw(pictures);
    }
    if (alive) timer = setTimeout(tick, 1000 / (model.get("status").fps || 16));
  }

  function draw([left, right]) {
    const { width, height } = left || right;
    // Small pictures are drawn larger, so that the line between them stays thin.
    const gap = 4, wide = both.checked ? 2 * width + gap : width, scale = Math.max(1, Math.round(384 / width));
    if (canvas.width !== wide * scale || canvas.height !== height * scale)
      [canvas.width, canvas.height] = [wide * scale, height * scale];
    canvas.style.width = `${wide * scale}px`;
    slider.style.width = `${canvas.clientWidth}px`;
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.clearRect(0, 0, wide, height);
    if (both.checked) {
      if (left) pen.drawImage(left, 0, 0);
      if (right) pen.drawImage(right, width + gap, 0);
    } else {
      const x = Math.round((width * slider.value) / 100);
      if (right) pen.drawImage(right, 0, 0);
      if (left && x) pen.drawImage(left, 0, 0, x, height, 0, 0, x, height);
      pen.fillStyle = "#fff";
      pen.fillRect(x - 1 / scale, 0, 2 / scale, height);
    }
    canvas.dataset.frame = frame;
    for (const picture of [left, right]) if (picture) picture.close();
  }

  function onStatus() {
    const status = model.get("status"), working = status.state === "working";
    root.dataset.state = status.state;
    run.disabled = working;
    stop.disabled = !working;
    state.textContent = status.message ? `${status.state}: ${status.message}` : status.state;
    const speeds = status.ms_per_frame.map((ms) => (ms === null ? "" : `, ${ms.toFixed(1)} ms per frame`));
    words.textContent = `left: ${status.titles[0]}${speeds[0]}; right: ${status.titles[1]}${speeds[1]}; `
      + `prompt: ${status.prompt}`;
  }

  both.addEventListener("change", () => { slider.disabled = both.checked; });
  run.addEventListener("click", () => model.send({ kind: "run" }));
  stop.addEventListener("click", () => model.send({ kind: "stop" }));
  model.on("change:status", onStatus);
  onStatus();
  tick();
  return () => {
    alive = false;
    clearTimeout(timer);
    model.off("change:status", onStatus);
  };
}

// Once per model: a second view finds the pictures of both sides here.
export default () => {
  const sides = [[], []];
  return {
    initialize: (given) => initialize({ ...given, sides }),
    render: (given) => render({ ...given, sides }),
  };
};
