// One token's router, by hand: logits, temperature, K and noise -> probabilities, weights, load.

// logits [E] -> {probs [E], chosen [K], weights [E]} as minimoe.routers.TopKRouter gives them, the largest first.
export function route(logits, { temperature = 1, k = 2, norm = true } = {}) {
  const scaled = logits.map((logit) => logit / temperature);
  const highest = Math.max(...scaled);
  const exps = scaled.map((logit) => Math.exp(logit - highest));
  const total = sum(exps);
  const probs = exps.map((e) => e / total);
  const chosen = probs.map((_, e) => e).sort((a, b) => scaled[b] - scaled[a] || a - b).slice(0, k);
  const kept = norm ? sum(chosen.map((e) => probs[e])) : 1;
  const weights = probs.map((p, e) => (chosen.includes(e) ? p / kept : 0));
  return { probs, chosen, weights };
}

// Share of `draws` tokens that choose each expert when normal noise is added to each token's logits: [E], sums to K.
export function load(logits, { k = 2, noise = 0, draws = 2000, seed = 0 } = {}) {
  const normal = normals(seed);
  const counts = logits.map(() => 0);
  for (let t = 0; t < draws; t += 1) {
    const noisy = logits.map((logit) => logit + noise * normal());
    for (const e of route(noisy, { k }).chosen) counts[e] += 1;
  }
  return counts.map((count) => count / draws);
}

// The logit with which expert e gets probability p, the others as they are, within the sliders' reach.
export function logitFor(logits, e, p, temperature) {
  const others = logits.filter((_, i) => i !== e).map((logit) => logit / temperature);
  const highest = Math.max(...others);
  const rest = highest + Math.log(sum(others.map((logit) => Math.exp(logit - highest))));
  return Math.max(-REACH, Math.min(REACH, temperature * (rest + Math.log(p / (1 - p)))));
}

const REACH = 4; // of the logits
const PANELS = [
  ["probs", "probability", "var(--mm-sky)"],
  ["weights", "weight in the sum", "var(--mm-blue)"],
  ["shares", "share of noisy tokens", "var(--mm-vermillion)"],
];
const [HEIGHT, TOP, LEFT] = [74, 36, 34];

// Three rows of bars above one axis of experts.
function bars(state, width) {
  const count = state.logits.length;
  const step = (width - LEFT) / count;
  const parts = [];
  PANELS.forEach(([key, label, colour], panel) => {
    const base = (panel + 1) * (HEIGHT + TOP);
    parts.push(h("text", { x: 0, y: base - HEIGHT - 16, class: "mm-quiet" }, label));
    for (const tick of [0, 0.5, 1]) {
      const y = base - tick * HEIGHT;
      parts.push(h("line", { x1: LEFT - 4, x2: width, y1: y, y2: y, class: tick ? "mm-grid" : "mm-axis" }));
      parts.push(h("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end", class: "mm-quiet" }, String(tick)));
    }
    state[key].forEach((value, e) => {
      const x = LEFT + e * step;
      const size = Math.min(1, value) * HEIGHT;
      parts.push(h("rect", { x: x + step * 0.2, width: step * 0.6, y: base - size, height: size, fill: colour }));
      if (value >= 0.005) {
        parts.push(h("text", { x: x + step / 2, y: base - size - 4, "text-anchor": "middle" }, short(value)));
      }
      if (panel === 0) parts.push(h("rect", { x, width: step, y: base - HEIGHT, height: HEIGHT, class: "mm-drag" }));
    });
  });
  const bottom = 3 * (HEIGHT + TOP) + 16;
  for (let e = 0; e < count; e += 1) {
    parts.push(h("text", { x: LEFT + (e + 0.5) * step, y: bottom, "text-anchor": "middle" }, String(e + 1)));
  }
  parts.push(h("text", { x: LEFT + (width - LEFT) / 2, y: bottom + 16, "text-anchor": "middle", class: "mm-quiet" }, "expert"));
  return parts;
}

export default explorable(({ data, stage, width, reset }) => {
  const state = { logits: [...data.logits], probs: [], weights: [], shares: [] };
  const count = state.logits.length;
  const picture = drawing(width, 3 * (HEIGHT + TOP) + 40);
  const words = status();
  const numbers = table("The same in numbers", ["expert", "logit", "probability", "weight", "share of noisy tokens"]);

  const temperature = slider({ label: "temperature", min: 0.1, max: 4, step: 0.1, value: 1, show: (v) => v.toFixed(1), oninput: show });
  const k = slider({ label: "K, experts per token", min: 1, max: count, value: 2, oninput: show });
  const noise = slider({ label: "noise, σ", min: 0, max: 4, step: 0.1, value: 0.5, show: (v) => v.toFixed(1), oninput: show });
  const norm = checkbox({ label: "weights sum to 1 (norm_topk_prob)", value: true, oninput: show });
  const logits = state.logits.map((value, e) =>
    slider({
      label: `logit of expert ${e + 1}`, min: -REACH, max: REACH, step: 0.1, value, show: (v) => v.toFixed(1),
      oninput: (next) => {
        state.logits[e] = next;
        show();
      },
    }),
  );
  const settings = data.examples.map(([name, values]) =>
    button(name, () => {
      values.forEach((value, e) => logits[e].set(value));
      state.logits = [...values];
      show();
    }),
  );

  function show() {
    const options = { temperature: temperature.value, k: k.value, norm: norm.value };
    Object.assign(state, route(state.logits, options));
    state.shares = load(state.logits, { k: k.value, noise: noise.value });
    picture.draw(bars(state, width));
    const first = state.chosen.map((e) => `${e + 1} (${state.weights[e].toFixed(2)})`).join(", ");
    const used = state.shares.filter((share) => share >= 0.01).length;
    const text =
      `The token goes to ${k.value === 1 ? "expert" : "experts"} ${first}. With noise of σ = ${noise.value.toFixed(1)}, ` +
      `${used} of ${count} experts get at least 1 % of such tokens.`;
    words.say(text);
    picture.describe(`Bars for ${count} experts. ${text}`);
    numbers.set(
      state.logits.map((logit, e) => [
        String(e + 1), logit.toFixed(1), state.probs[e].toFixed(3), state.weights[e].toFixed(3), state.shares[e].toFixed(3),
      ]),
    );
  }

  // The bars of the first row can be dragged to a probability.
  let dragged = -1;
  function drag(event) {
    const box = picture.element.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top].map((at) => (at / box.width) * width);
    if (event.type === "pointerdown") {
      if (!event.target.classList.contains("mm-drag")) return;
      dragged = Math.min(count - 1, Math.floor(((x - LEFT) / (width - LEFT)) * count));
      picture.element.setPointerCapture(event.pointerId);
      event.preventDefault();
    }
    if (dragged < 0) return;
    const p = Math.max(0.001, Math.min(0.999, (HEIGHT + TOP - y) / HEIGHT));
    logits[dragged].set(logitFor(state.logits, dragged, p, temperature.value));
    state.logits[dragged] = logits[dragged].value;
    show();
  }
  for (const kind of ["pointerdown", "pointermove"]) picture.element.addEventListener(kind, drag);
  for (const kind of ["pointerup", "pointercancel"]) picture.element.addEventListener(kind, () => (dragged = -1));

  stage.append(
    h("p", { class: "mm-title" }, "Router playground"),
    h("p", {}, "One token, eight experts. At which temperature does the second expert stop mattering, and does temperature ever change who is chosen? How much noise does it take until every expert sees tokens? Drag a bar of the first row, or move the logits below."),
    h("div", { class: "mm-controls" }, temperature.element, k.element, noise.element, norm.element),
    picture.element,
    words.element,
    h("div", { class: "mm-buttons" }, settings, reset),
    h("div", { class: "mm-controls" }, logits.map((logit) => logit.element)),
    numbers.element,
  );
  show();
});
