// The least time of one sparse layer: T tokens, experts of D × F of which each token takes K of E, on a device with
// `peak` FLOP/s and `bandwidth` bytes/s. Numbers of 16 bits, uniform routing; the router is left out.

// --- minimoe.cost -----------------------------------------------------------------------------------------

// Experts that T tokens are expected to meet.
export const touched = (T, { E, K }) => E * (1 - (1 - K / E) ** T);

// In words: a share of the experts is never rounded to more than there are.
export function met(T, layer) {
  const count = touched(T, layer).toFixed(1);
  if (layer.E === 1) return "the only expert";
  return Number(count) >= layer.E ? `all ${layer.E} experts` : `${Number(count)} of ${layer.E} experts`;
}

// {flops, bytes, compute, memory, seconds, limit} of a forward pass, or of both passes.
export function floor(T, layer, device, backward = false) {
  const { D, F, E, K } = layer;
  const read = touched(T, layer);
  const flops = (backward ? 18 : 6) * T * K * D * F;
  let bytes = 6 * read * D * F + 4 * T * D;
  if (backward) bytes += 6 * (read + E) * D * F + 6 * T * D + 4 * T * K * F;
  const [compute, memory] = [flops / device.peak, bytes / device.bandwidth];
  return { flops, bytes, compute, memory, seconds: Math.max(compute, memory), limit: compute >= memory ? "compute" : "memory" };
}

// Tokens from which on arithmetic limits the forward pass, by the rule T* = (E/K)·(peak/bandwidth) for 16 bits.
export const crossover = ({ E, K }, device) => (E / K) * (device.peak / device.bandwidth);

// Where the two lines cross, all bytes counted: bytes per token only ever fall with T. null: not up to `most` tokens.
export function crossing(layer, device, backward, most) {
  const waits = (T) => floor(T, layer, device, backward).limit === "memory";
  if (!waits(1)) return 1;
  if (waits(most)) return null;
  let [low, high] = [1, most];
  for (let i = 0; i < 60; i += 1) {
    const middle = Math.sqrt(low * high);
    if (waits(middle)) low = middle;
    else high = middle;
  }
  return high;
}

// What the sliders of E and K can say; every preset's own value is among them.
export const REACH = {
  E: [1, 2, 4, 8, 16, 32, 60, 64, 128, 256, 512, 1024],
  K: [1, 2, 3, 4, 6, 8, 12, 16, 32],
};

// --- drawing ----------------------------------------------------------------------------------------------------

const whole = (number) => Math.round(number).toLocaleString("en-GB");
const time = (seconds) => si(seconds, "s");
const rounded = (number) => (number < 1e6 ? whole(Number(number.toPrecision(3))) : `${Number((number / 1e6).toPrecision(3))} million`);
const [HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [250, 46, 10, 26, 40];
const MEMORY = "var(--mm-blue)";
const COMPUTE = "var(--mm-vermillion)";

// Log-log axes with a grid at powers of ten, and the frame's x and y: {x, y, parts}.
function axes(width, [x0, x1], [y0, y1], { title, xlabel, unit, xshow = si }) {
  const x = (value) => LEFT + (Math.log(value / x0) / Math.log(x1 / x0)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - (Math.log(value / y0) / Math.log(y1 / y0)) * (HEIGHT - TOP - BOTTOM);
  const parts = [h("text", { x: 0, y: 12, class: "mm-quiet" }, title)];
  const powers = (low, high) => {
    const all = [];
    for (let p = Math.ceil(Math.log10(low) - 1e-9); 10 ** p <= high * 1.0001; p += 1) all.push(Number(`1e${p}`));
    return all;
  };
  for (const value of powers(y0, y1)) {
    parts.push(h("line", { x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: "mm-grid" }));
    parts.push(h("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end", class: "mm-quiet" }, si(value, unit)));
  }
  for (const value of powers(x0, x1)) {
    parts.push(h("line", { x1: x(value), x2: x(value), y1: TOP, y2: HEIGHT - BOTTOM, class: "mm-grid" }));
    parts.push(h("text", { x: x(value), y: HEIGHT - BOTTOM + 15, "text-anchor": "middle", class: "mm-quiet" }, xshow(value)));
  }
  parts.push(h("line", { x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, class: "mm-axis" }));
  parts.push(h("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 6, "text-anchor": "middle", class: "mm-quiet" }, xlabel));
  return { x, y, parts };
}

const line = (points, { x, y }, stroke, more = {}) =>
  h("polyline", { points: points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" "), fill: "none", stroke, "stroke-width": 2, ...more });

const dot = ([a, b], { x, y }) => h("circle", { cx: x(a), cy: y(b), r: 5.5, fill: "var(--mm-text)", stroke: "var(--mm-back)", "stroke-width": 1.5 });

// A word beside a point of a line, kept inside the frame.
function label(text, [a, b], { x, y }, width, { up = 8, anchor = "middle", fill } = {}) {
  const half = 3.2 * text.length;
  const [least, greatest] = { middle: [half, half], end: [2 * half, 0], start: [0, 2 * half] }[anchor];
  const at = Math.min(width - RIGHT - greatest, Math.max(LEFT + 4 + least, x(a)));
  return h("text", { x: at, y: Math.max(TOP + 10, Math.min(HEIGHT - BOTTOM - 4, y(b) - up)), "text-anchor": anchor, style: fill && `fill: ${fill}` }, text);
}

// Seconds against tokens: reading, computing, and the longer of the two.
function times(tokens, all, T, now, cross, width) {
  const everything = all.flatMap((f) => [f.compute, f.memory]);
  const frame = axes(width, [1, tokens.at(-1)], [Math.min(...everything) / 1.5, Math.max(...everything) * 2],
    { title: "least time (grey: the longer of the two)", xlabel: "tokens T", unit: "s", xshow: whole });
  const points = (key) => all.map((f, i) => [tokens[i], f[key]]);
  const near = (share) => Math.round(share * (tokens.length - 1));
  const parts = [...frame.parts];
  parts.push(line(points("seconds"), frame, "var(--mm-soft)", { "stroke-width": 9, "stroke-linejoin": "round" }));
  parts.push(line(points("memory"), frame, MEMORY));
  parts.push(line(points("compute"), frame, COMPUTE, { "stroke-dasharray": "6 3" }));
  parts.push(label("memory", points("memory")[near(0.08)], frame, width, { fill: MEMORY, anchor: "start", up: -22 }));
  parts.push(label("arithmetic", points("compute")[near(0.34)], frame, width, { fill: COMPUTE, anchor: "start", up: -20 }));
  if (cross) {
    parts.push(h("line", { x1: frame.x(cross), x2: frame.x(cross), y1: TOP, y2: HEIGHT - BOTTOM, class: "mm-axis", "stroke-dasharray": "2 3" }));
    const side = frame.x(cross) > width - 80 ? -1 : 1;
    parts.push(h("text", { x: frame.x(cross) + 5 * side, y: HEIGHT - BOTTOM - 6, "text-anchor": side < 0 ? "end" : "start" }, `T = ${whole(cross)}`));
  }
  parts.push(dot([T, now.seconds], frame));
  return parts;
}

// FLOP/s against FLOPs per byte: what the device permits, and where the layer is for 1 to `most` tokens.
function roof(tokens, all, now, device, width) {
  const intensity = (f) => f.flops / f.bytes;
  const ridge = device.peak / device.bandwidth;
  const span = [...all.map(intensity), ridge];
  const [x0, x1] = [Math.min(...span) / 1.5, Math.max(...span) * 3];
  const frame = axes(width, [x0, x1], [x0 * device.bandwidth, device.peak * 3], { title: "best rate, FLOP/s (circles: T = 1, 8, 64, …)", xlabel: "FLOPs per byte", unit: "", xshow: si });
  const parts = [...frame.parts];
  parts.push(line([[x0, x0 * device.bandwidth], [ridge, device.peak]], frame, MEMORY));
  parts.push(line([[ridge, device.peak], [x1, device.peak]], frame, COMPUTE, { "stroke-dasharray": "6 3" }));
  parts.push(label(`${si(device.peak, "FLOP/s")}`, [x1, device.peak], frame, width, { anchor: "end", fill: COMPUTE }));
  const half = Math.sqrt(x0 * ridge);
  parts.push(label(`${si(device.bandwidth, "B/s")}`, [half, half * device.bandwidth], frame, width, { anchor: "end", fill: MEMORY, up: 10 }));
  tokens.forEach((T, i) => {
    if (Math.log2(T) % 3 === 0) {
      const [a, b] = [intensity(all[i]), all[i].flops / all[i].seconds];
      parts.push(h("circle", { cx: frame.x(a), cy: frame.y(b), r: 2.5, fill: "var(--mm-back)", stroke: "var(--mm-text)" }));
    }
  });
  parts.push(dot([intensity(now), now.flops / now.seconds], frame));
  return parts;
}

export default explorable(({ data, stage, width, reset }) => {
  const half = width >= 600 ? (width - 24) / 2 : width;
  const [first, second] = [drawing(half, HEIGHT), drawing(half, HEIGHT)];
  const words = status();
  const numbers = table("The same in numbers", ["T", "experts touched", "arithmetic", "memory", "floor", "limit", "tokens/s"]);
  const tokens = Array.from({ length: 4 * Math.log2(data.most) + 1 }, (_, i) => 2 ** (i / 4));

  const T = slider({
    label: "T, tokens", min: 0, max: tokens.length - 1, value: 24, show: (i) => whole(tokens[i]), oninput: show,
  });
  const model = select({ label: "a layer of", options: Object.keys(data.layers), value: data.first, oninput: restore });
  const device = select({ label: "on", options: data.devices.map((d, i) => [String(i), d.name]), oninput: show });
  const E = slider({ label: "E, experts", values: REACH.E, value: data.layers[data.first].E, show: (v) => (v === undefined ? "" : String(v)), oninput: () => show("E") });
  const K = slider({ label: "K of them per token", values: REACH.K, value: data.layers[data.first].K, show: (v) => (v === undefined ? "" : String(v)), oninput: () => show("K") });
  const both = checkbox({ label: "with the backward pass", oninput: show });

  function restore() {
    E.set(data.layers[model.value].E);
    K.set(data.layers[model.value].K);
    show();
  }

  function show(turned) {
    if (K.value > E.value) (turned === "K" ? E : K).set(turned === "K" ? REACH.E.find((e) => e >= K.value) : REACH.K.findLast((k) => k <= E.value));
    const layer = { ...data.layers[model.value], E: E.value, K: K.value };
    const chip = data.devices[Number(device.value)];
    const count = Math.round(tokens[T.value]);
    const all = tokens.map((t) => floor(t, layer, chip, both.value));
    const now = floor(count, layer, chip, both.value);
    const cross = crossing(layer, chip, both.value, data.most);
    first.draw(times(tokens, all, count, now, cross, half));
    second.draw(roof(tokens, all, now, chip, half));

    const [name, rate] = [count === 1 ? "One token" : `${whole(count)} tokens`, rounded(count / now.seconds)];
    const why =
      now.limit === "memory"
        ? `Memory limits: moving ${si(now.bytes, "B")} takes ${time(now.memory)}, the arithmetic only ${time(now.compute)}.`
        : `Arithmetic limits: ${si(now.flops, "FLOP")} take ${time(now.compute)}, moving ${si(now.bytes, "B")} only ${time(now.memory)}.`;
    const where =
      cross === null
        ? `Up to ${whole(data.most)} tokens arithmetic never takes over.`
        : cross <= 1
          ? "Arithmetic limits from the first token on."
          : `From ${whole(Math.ceil(cross))} tokens on it is arithmetic${both.value ? "" : `; the rule T* = E/K · ${whole(chip.peak / chip.bandwidth)} says ${whole(crossover(layer, chip))}`}.`;
    const text = `${name} ${count === 1 ? "touches" : "touch"} ${met(count, layer)}. ${why} So no program is faster than about ${time(now.seconds)}, ${rate} tokens a second through this one layer. ${where}`;
    words.say(text);
    first.describe(`Least time against tokens, both logarithmic: a rising dashed line for arithmetic, and one for memory that flattens where all experts are touched. ${text}`);
    second.describe(`Roofline: at ${si(now.flops / now.bytes)} FLOPs per byte ${chip.name} can do at most ${si(now.flops / now.seconds, "FLOP/s")}, of ${si(chip.peak, "FLOP/s")}.`);
    numbers.set(
      [count, ...tokens.filter((_, i) => i % 12 === 0)].map((t) => {
        const f = floor(t, layer, chip, both.value);
        return [whole(t), touched(t, layer).toFixed(1), time(f.compute), time(f.memory), time(f.seconds), f.limit === "memory" ? "memory" : "arithmetic", si(t / f.seconds)];
      }),
    );
  }

  stage.append(
    h("p", { class: "mm-title" }, "Who waits for whom?"),
    h("p", {}, "A layer reads its experts once for all tokens of a batch, and computes for each. How many tokens must share a batch before the processor has enough to do? And what do more experts do to that number?"),
    h("div", { class: "mm-controls" }, T.element, model.element, device.element, E.element, K.element, both.element),
    h("div", { class: "mm-pair" }, first.element, second.element),
    words.element,
    h("div", { class: "mm-buttons" }, reset),
    numbers.element,
  );
  show();
});
