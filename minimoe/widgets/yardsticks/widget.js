// One comparison on five yardsticks, as minimoe.widgets.yardsticks has it in Python.

// Where the points of an arm's curve lie on an axis; one place only on an axis of sizes.
export function places(arm, axis, sizes) {
  if (sizes.includes(axis)) return [arm[axis]];
  const each = { characters: arm.batch, flops: arm.batch * arm.flops, seconds: arm.step_seconds }[axis];
  return arm.steps.map((step) => step * each);
}

// On straight lines between points; flat beyond the last.
function between(at, x, y) {
  const i = x.findIndex((value) => value >= at);
  if (i < 0) return y.at(-1);
  return i === 0 ? y[0] : y[i - 1] + ((y[i] - y[i - 1]) * (at - x[i - 1])) / (x[i] - x[i - 1]);
}

// {at, found}: a place on an axis, and [name, loss] of each arm that can be compared there, lowest first.
export function standing({ arms, sizes, near }, axis, share) {
  const all = Object.entries(arms);
  let at = arms.moe[axis];
  let found;
  if (sizes.includes(axis)) found = all.filter(([, arm]) => Math.abs(arm[axis] / at - 1) <= near).map(([name, arm]) => [name, arm.loss.at(-1)]);
  else {
    at = share * Math.min(...all.map(([, arm]) => places(arm, axis, sizes).at(-1)));
    const known = all.filter(([, arm]) => places(arm, axis, sizes)[0] <= at);
    found = known.map(([name, arm]) => [name, between(at, places(arm, axis, sizes), arm.loss)]);
  }
  return { at, found: found.sort((a, b) => a[1] - b[1]) };
}

const COLOURS = ["blue", "vermillion", "green", "purple", "orange"];
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "4 2"];

// At most six round numbers between two ends of a logarithmic axis.
export function rounds(low, high) {
  for (const steps of [[1, 2, 5], [1, 3], [1]]) {
    const first = Math.floor(Math.log10(low));
    const powers = Array.from({ length: Math.ceil(Math.log10(high)) - first + 1 }, (_, i) => 10 ** (first + i));
    const found = powers.flatMap((power) => steps.map((step) => step * power)).filter((value) => value >= low && value <= high);
    if (found.length <= 6 || steps.length === 1) return found;
  }
}

export default explorable(({ data, stage, width, reset }) => {
  const [HEIGHT, LEFT, BOTTOM] = [314, 42, 54];
  const names = Object.keys(data.arms);
  const words = status();
  const numbers = table("The same in numbers", ["model", "loss, all held-out text", "parameters held", "used", "processor seconds"]);
  const picture = drawing(width, HEIGHT);
  const axis = select({ label: "yardstick", options: Object.entries(data.axes), oninput: show });
  const budget = slider({ label: "budget", min: 10, max: 100, step: 5, value: 100, show: (v) => `${v} %`, oninput: show });
  const losses = names.flatMap((name) => data.arms[name].loss);
  const low = Math.min(...losses) - 0.03;
  const high = Math.min(Math.max(...losses), low + 0.9);
  const unit = (value) => (axis.value === "seconds" ? si(value, "s") : axis.value === "flops" ? si(value, "FLOP") : si(value));

  function show() {
    const { at, found } = standing(data, axis.value, budget.value / 100);
    const all = names.map((name) => places(data.arms[name], axis.value, data.sizes));
    const size = data.sizes.includes(axis.value);
    const ends = [Math.min(...all.flat()) / (size ? 1.3 : 1), Math.max(...all.flat()) * (size ? 1.3 : 1)].map(Math.log);
    const x = (value) => LEFT + 8 + ((Math.log(value) - ends[0]) / (ends[1] - ends[0])) * (width - LEFT - 20);
    const y = (loss) => 10 + ((high - Math.min(loss, high)) / (high - low)) * (HEIGHT - 20 - BOTTOM);
    const lines = names.map((name, i) => {
      const style = `stroke: var(--mm-${COLOURS[i]}); fill: none; stroke-width: 2; stroke-dasharray: ${DASHES[i]}`;
      const curve = data.arms[name].loss;
      const [last, height] = [x(all[i].at(-1)), y(curve.at(-1))];
      return [
        size ? null : h("polyline", { points: all[i].map((value, j) => `${x(value)},${y(curve[j])}`).join(" "), style }),
        h("circle", { cx: last, cy: height, r: 6, style: `fill: var(--mm-${COLOURS[i]})` }),
        h("text", { x: last, y: height + 3.5, "text-anchor": "middle", "font-size": 10, style: "fill: var(--mm-back)" }, String(i + 1)),
      ];
    });
    const ticks = [1.4, 1.6, 1.8, 2, 2.2, 2.4, 2.6, 2.8].filter((loss) => loss > low && loss < high);
    picture.draw(
      ticks.map((loss) => [
        h("line", { x1: LEFT, x2: width, y1: y(loss), y2: y(loss), style: "stroke: var(--mm-soft)" }),
        h("text", { x: LEFT - 6, y: y(loss) + 4, "text-anchor": "end", class: "mm-quiet" }, loss.toFixed(1)),
      ]).flat(),
      rounds(...ends.map(Math.exp)).map((value) => [
        h("line", { x1: x(value), x2: x(value), y1: HEIGHT - BOTTOM - 4, y2: HEIGHT - BOTTOM, style: "stroke: var(--mm-text)" }),
        h("text", { x: Math.min(x(value), width - 18), y: HEIGHT - BOTTOM + 13, "text-anchor": "middle", class: "mm-quiet" }, unit(value)),
      ]).flat(),
      h("line", { x1: x(at), x2: x(at), y1: 6, y2: HEIGHT - BOTTOM, style: "stroke: var(--mm-text); stroke-dasharray: 3 3" }),
      h("text", { x: Math.min(Math.max(x(at), LEFT + 40), width - 50), y: HEIGHT - 22, "text-anchor": "middle" }, unit(at)),
      h("text", { x: (LEFT + width) / 2, y: HEIGHT - 5, "text-anchor": "middle", class: "mm-quiet" }, `${data.axes[axis.value]}, logarithmic`),
      lines.flat(),
    );
    const told = found.map(([name, loss]) => `${data.arms[name].label} ${loss.toFixed(3)}`);
    const text =
      `At ${unit(at)} (${data.axes[axis.value]}) the lowest is ${told[0]} nats per character` +
      `${told.length > 1 ? `; then ${told.slice(1).join("; ")}` : ""}.` +
      `${size ? " Only models of about this size are compared; the budget plays no part." : ""}`;
    words.say(text);
    picture.describe(`Held-out loss of ${names.length} models. ${text}`);
  }

  numbers.set(
    names.map((name, i) => {
      const arm = data.arms[name];
      return [`${i + 1} ${arm.label}`, arm.mean.toFixed(3), arm.held.toLocaleString("en-GB"), arm.used.toLocaleString("en-GB"), (arm.steps.at(-1) * arm.step_seconds).toFixed(1)];
    }),
  );
  stage.append(
    h("p", { class: "mm-title" }, "One comparison, five yardsticks"),
    h("p", {}, names.map((name, i) => `${i + 1} ${data.arms[name].label}`).join("; ") + ". Each curve is the mean of eight seeds on 8,000 held-out characters; its learning rate reaches 0 at its last point, so earlier points are of unfinished runs."),
    h("div", { class: "mm-controls" }, axis.element, budget.element),
    picture.element,
    h("div", { class: "mm-buttons" }, reset),
    words.element,
    numbers.element,
  );
  show();
});
