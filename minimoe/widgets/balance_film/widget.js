// Balance over training: stored loads, frame by frame.

// Counts [E] of one frame of a run: of one group of tokens, or of all where group is -1.
export function frame(run, layer, group, index) {
  const groups = run.counts[layer][index];
  return group >= 0 ? groups[group] : groups[0].map((_, e) => sum(groups.map((counts) => counts[e])));
}

// share [E], maxVio and busiest of counts [E], as minimoe.balance.Load.
export function load(counts) {
  const total = sum(counts);
  const share = counts.map((count) => count / total);
  const most = Math.max(...share);
  return { share, maxVio: most * counts.length - 1, busiest: share.indexOf(most) };
}

// Load of every frame whose step is at most `limit`.
export function film(run, layer, group, limit = Infinity) {
  const steps = run.steps.filter((step) => step <= limit);
  return steps.map((step, i) => ({ step, from: i ? steps[i - 1] : 0, loss: run.loss[i], ...load(frame(run, layer, group, i)) }));
}

// What one expert has in a frame: its share, and how many times the fair share that is.
export const part = ({ share }, expert) => ({ share: share[expert], times: share[expert] * share.length });

const [GUTTER, ROW, TOP, CURVE] = [26, 20, 44, 84];
const sized = (width) => ({ side: width < 480 ? 84 : 190, heat: TOP, curve: (experts) => TOP + experts * ROW + 34 });

// What does not change with the step: heat map, colours, curve of MaxVio.
function still(state, width) {
  const { frames, experts, limit, log, full } = state;
  const { side, curve } = sized(width);
  const right = width - side;
  const x = (step) => GUTTER + (step / limit) * (right - GUTTER - 8);
  const parts = [h("text", { x: 0, y: 34, class: "mm-quiet" }, "expert")];
  const scale = [[0, "none"], [1, "fair share"], [2, "2 ×"], [full, side < 100 ? `≥ ${full} ×` : `${full} × and more`]];
  let at = 0;
  for (const [times, text] of scale) {
    parts.push(h("rect", { x: at + 0.5, y: 0.5, width: 12, height: 12, style: `fill:var(--mm-blue);fill-opacity:${times / full};stroke:var(--mm-line)` }));
    parts.push(h("text", { x: at + 18, y: 11 }, text));
    at += 32 + 5.8 * text.length;
  }
  for (const { step, from, share } of frames) {
    share.forEach((s, e) => {
      const opacity = Math.min(1, (s * experts) / full).toFixed(3);
      parts.push(h("rect", { x: x(from), y: TOP + e * ROW, width: x(step) - x(from), height: ROW, "shape-rendering": "crispEdges", style: `fill:var(--mm-blue);fill-opacity:${opacity}` }));
    });
  }
  for (let e = 0; e < experts; e += 1) parts.push(h("text", { x: GUTTER - 8, y: TOP + (e + 0.5) * ROW + 4, "text-anchor": "end" }, String(e + 1)));
  parts.push(h("rect", { x: x(0), y: TOP, width: x(limit) - x(0), height: experts * ROW, style: "fill:none;stroke:var(--mm-line)" }));

  const top = curve(experts);
  const high = Math.max(1, Math.ceil(Math.max(...frames.map((f) => f.maxVio), ...log.map(([, v]) => v))));
  const y = (value) => top + CURVE * (1 - value / high);
  parts.push(h("text", { x: 0, y: top - 8, class: "mm-quiet" }, "MaxVio"));
  for (const tick of [0, high]) {
    parts.push(h("line", { x1: x(0), x2: x(limit), y1: y(tick), y2: y(tick), class: tick ? "mm-grid" : "mm-axis" }));
    parts.push(h("text", { x: GUTTER - 8, y: y(tick) + 4, "text-anchor": "end", class: "mm-quiet" }, String(tick)));
  }
  const line = (points) => points.map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
  if (log.length) {
    parts.push(h("polyline", { points: line(log), style: "fill:none;stroke:var(--mm-line);stroke-width:1" }));
    if (right - GUTTER > 300) parts.push(h("text", { x: x(limit), y: top - 8, "text-anchor": "end", class: "mm-quiet" }, "thin: the batches of training, all their tokens"));
  }
  parts.push(h("polyline", { points: line(frames.map((f) => [f.step, f.maxVio])), style: "fill:none;stroke:var(--mm-blue);stroke-width:2" }));
  for (const share of [0, 0.5, 1]) {
    const anchor = share === 0 ? "start" : share === 1 ? "end" : "middle";
    parts.push(h("text", { x: x(share * limit), y: top + CURVE + 17, "text-anchor": anchor, class: "mm-quiet" }, Math.round(share * limit).toLocaleString("en")));
  }
  parts.push(h("text", { x: (x(0) + x(limit)) / 2, y: top + CURVE + 33, "text-anchor": "middle", class: "mm-quiet" }, "training step"));
  return { parts, x, y };
}

// The frame that is looked at: its place in the film, its bars, its numbers.
function now(state, drawn, width) {
  const { experts, full } = state;
  const one = state.frames[state.index];
  const { side, curve } = sized(width);
  const left = width - side + 8;
  const room = side - 8 - 38;
  const long = (share) => Math.min(1, (share * experts) / full) * room;
  const bottom = TOP + experts * ROW;
  const [x0, x1] = [drawn.x(one.from), drawn.x(one.step)];
  const parts = [
    h("rect", { x: x0 - 1, y: TOP - 3, width: x1 - x0 + 2, height: experts * ROW + 6, style: "fill:none;stroke:var(--mm-vermillion);stroke-width:2.5" }),
    h("line", { x1, x2: x1, y1: bottom + 3, y2: drawn.y(0), style: "stroke:var(--mm-vermillion);stroke-dasharray:3 3" }),
    h("circle", { cx: x1, cy: drawn.y(one.maxVio), r: 4, style: "fill:var(--mm-vermillion);stroke:var(--mm-back)" }),
    h("text", { x: left, y: 34 }, `step ${one.step.toLocaleString("en")}`),
  ];
  const fair = left + long(1 / experts);
  parts.push(h("line", { x1: fair, x2: fair, y1: TOP - 2, y2: bottom + 6, style: "stroke:var(--mm-text);stroke-dasharray:2 2" }));
  if (state.expert >= 0) {
    const y = TOP + state.expert * ROW;
    parts.push(h("rect", { x: x0 - 1, y, width: x1 - x0 + 2, height: ROW, style: "fill:none;stroke:var(--mm-text);stroke-width:2.5" }));
    parts.push(h("rect", { x: left - 3, y: y + 1, width: side - 5, height: ROW - 2, style: "fill:none;stroke:var(--mm-text)" }));
  }
  one.share.forEach((share, e) => {
    const y = TOP + e * ROW;
    parts.push(h("rect", { x: left, y: y + 3, width: long(share), height: ROW - 6, style: "fill:var(--mm-blue)" }));
    parts.push(h("text", { x: left + long(share) + 5, y: y + ROW / 2 + 4, style: "stroke:var(--mm-back);stroke-width:4;paint-order:stroke" }, percent(share)));
  });
  parts.push(h("text", { x: fair, y: bottom + 19, "text-anchor": side < 100 ? "start" : "middle", "dx": side < 100 ? -18 : 0 }, "fair share"));
  const under = curve(experts);
  [["MaxVio", one.maxVio.toFixed(2)], ["training loss", one.loss.toFixed(2)]].forEach(([text, value], i) => {
    parts.push(h("text", { x: left, y: under + 24 + 36 * i, class: "mm-quiet" }, text));
    parts.push(h("text", { x: left, y: under + 41 + 36 * i, style: "font-size:16px;font-weight:600" }, value));
  });
  return parts;
}

export default explorable(({ data, stage, width, reset }) => {
  const state = { full: data.full, index: 0 };
  const picture = drawing(width, sized(width).curve(8) + CURVE + 40);
  const words = status();
  const numbers = table("The same in numbers, tenth by tenth of training", ["up to step", "MaxVio", "busiest expert", "its share", "loss", "MaxVio of training batches, mean"]);
  const about = h("p", {});
  let drawn;

  const run = select({ label: "run", options: data.runs.map((r, i) => [i, r.title]), value: 0, oninput: change });
  const layer = select({ label: "layer", options: [], oninput: change });
  const group = select({ label: "tokens", options: [], oninput: change });
  const stretch = select({ label: "show", options: [[1, "the whole training"], [0.1, "its first tenth"]], oninput: change });
  const expert = select({ label: "expert", options: [], oninput: show });
  const step = slider({ label: "training step", min: 0, max: 1, value: 0, show: (i) => (state.frames ? state.frames[i].step.toLocaleString("en") : ""), oninput: show });
  const play = player(step, { milliseconds: 120 });

  // Choices of this run only; what was chosen stays chosen where the next run has it.
  function offer(control, options) {
    const before = control.value;
    control.input.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
    control.set(options.some(([value]) => String(value) === before) ? before : options[0][0]);
    control.element.style.display = options.length > 1 ? "" : "none";
  }

  function change() {
    const chosen = data.runs[run.value];
    offer(layer, chosen.counts.map((_, l) => [l, String(l + 1)]));
    offer(group, [[-1, chosen.groups.length ? `all ${chosen.groups.length} domains` : "all"], ...chosen.groups.map((name, g) => [g, name])]);
    offer(expert, [[-1, "the busiest"], ...chosen.counts[0][0][0].map((_, e) => [e, String(e + 1)])]);
    state.limit = chosen.steps.at(-1) * Number(stretch.value);
    state.frames = film(chosen, Number(layer.value), Number(group.value), state.limit);
    state.experts = state.frames[0].share.length;
    const logged = chosen.log ? chosen.log.steps.map((s, i) => [s, chosen.log.max_vio[layer.value][i]]) : [];
    state.log = logged.filter(([s]) => s <= state.limit);
    drawn = still(state, width);
    const share = step.value / Number(step.input.max); // of the training that is shown
    step.input.max = state.frames.length - 1;
    step.set(Math.round(share * (state.frames.length - 1)));
    about.textContent = chosen.about;
    numbers.set(
      Array.from({ length: 10 }, (_, i) => {
        const [low, high] = [(state.limit * i) / 10, (state.limit * (i + 1)) / 10];
        const last = state.frames.filter((f) => f.step > low && f.step <= high).at(-1);
        const batches = state.log.filter(([s]) => s > low && s <= high).map(([, v]) => v);
        const mean = batches.length ? (sum(batches) / batches.length).toFixed(2) : "–";
        const cells = last ? [last.maxVio.toFixed(2), String(last.busiest + 1), percent(last.share[last.busiest]), last.loss.toFixed(2)] : ["–", "–", "–", "–"];
        return [Math.round(high).toLocaleString("en"), ...cells, mean];
      }),
    );
    show();
  }

  function show() {
    state.index = step.value;
    state.expert = Number(expert.value);
    const chosen = data.runs[run.value];
    picture.draw(drawn.parts, now(state, drawn, width));
    const one = state.frames[state.index];
    const which = state.expert < 0 ? one.busiest : state.expert;
    const own = part(one, which);
    const idle = one.share.filter((share) => share < 0.01).length;
    const text =
      `Step ${one.step.toLocaleString("en")} of ${chosen.steps.at(-1).toLocaleString("en")}: MaxVio ${one.maxVio.toFixed(2)}. ` +
      `Expert ${which + 1} has ${percent(own.share)} of the assignments, ${own.times.toFixed(1)} times the fair share of ${percent(1 / state.experts, 1)}` +
      `${idle ? `; ${idle} of ${state.experts} experts have less than 1 %` : ""}. Training loss ${one.loss.toFixed(2)} ${chosen.unit}.`;
    words.say(text);
    picture.describe(`Share of each expert over training, and MaxVio. ${text}`);
  }

  // The film can be dragged through as well, and a cell of it asked for its expert.
  let dragging = false;
  function seek(event) {
    const box = picture.element.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const inside = x >= drawn.x(0) && x <= drawn.x(state.limit);
    if (!inside && !dragging) return false;
    const at = ((x - drawn.x(0)) / (drawn.x(state.limit) - drawn.x(0))) * state.limit;
    const found = state.frames.findIndex((f) => at <= f.step);
    play.stop();
    const row = Math.floor((((event.clientY - box.top) / box.width) * width - TOP) / ROW);
    if (event.type === "pointerdown" && row >= 0 && row < state.experts) expert.set(row);
    step.set(found < 0 ? state.frames.length - 1 : found);
    show();
    return true;
  }
  picture.element.style.touchAction = "pan-y";
  picture.element.addEventListener("pointerdown", (event) => {
    dragging = seek(event);
    if (dragging) picture.element.setPointerCapture(event.pointerId);
  });
  picture.element.addEventListener("pointermove", (event) => dragging && seek(event));
  for (const end of ["pointerup", "pointercancel"]) picture.element.addEventListener(end, () => (dragging = false));

  stage.append(
    h("p", { class: "mm-title" }, "Watching balance train"),
    h("p", {}, "Stored runs, step by step. In which tenth of training is the balance made, and what undoes it? And once the load over all tokens is even, is it even over the tokens of one domain? Press a cell of the map to see its numbers."),
    h("div", { class: "mm-controls" }, run.element, layer.element, group.element, stretch.element, expert.element),
    picture.element,
    h("div", { class: "mm-controls" }, step.element),
    h("div", { class: "mm-buttons" }, play.element, reset),
    words.element,
    about,
    numbers.element,
  );
  change();
});
