// What a training budget pays for, as minimoe.widgets.budget and minimoe.cost.training have it in Python.

export const flopsOf = ({ peak, utilisation, gpus, days }) => peak * utilisation * gpus * days * 86400;
export const tokens = (parameters, flops) => flops / (6 * parameters);
export const loss = (law, parameters, read) => law.E + law.A / parameters ** law.alpha + law.B / read ** law.beta;

// The size of the least loss for so many FLOPs: N* = G·(C/6)^(β/(α+β)), G = (αA/(βB))^(1/(α+β)).
export function best({ A, B, alpha, beta }, flops) {
  return ((alpha * A) / (beta * B)) ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta));
}

export default explorable(({ data, stage, width, reset }) => {
  const [HEIGHT, LEFT, BOTTOM] = [300, 46, 44];
  const [X, Y] = [[8, 12], [9, 15]]; // powers of ten that are shown
  const words = status();
  const numbers = table("The same in numbers", ["model", "held", "used", "tokens", "tokens for each used one", "for each held one", "loss by the law"]);
  const picture = drawing(width, HEIGHT);
  const model = select({ label: "model", options: Object.keys(data.models), oninput: show });
  const device = select({ label: "device", options: data.devices.map(([name], i) => [String(i), name]), oninput: show });
  const gpus = slider({ label: "devices", values: [8, 64, 256, 512, 1024, 2048, 4096, 16384], value: data.gpus, oninput: show });
  const days = slider({ label: "days", values: [1, 7, 14, 30, 60, 90, 134, 180, 365], value: data.days, oninput: show });
  const ratio = slider({ label: "utilisation, sparse", min: 0.05, max: 0.6, step: 0.01, value: data.utilisation, show: (v) => percent(v), oninput: show });
  const other = slider({ label: "utilisation, dense", min: 0.05, max: 0.6, step: 0.01, value: data.utilisation, show: (v) => percent(v), oninput: show });

  const x = (n) => LEFT + ((Math.log10(n) - X[0]) / (X[1] - X[0])) * (width - LEFT - 8);
  const y = (d) => 8 + ((Y[1] - Math.log10(d)) / (Y[1] - Y[0])) * (HEIGHT - BOTTOM - 8);
  // a line of slope ±1 in the frame: d as a function of n, cut where it leaves
  const line = (d, style) => {
    const points = Array.from({ length: 81 }, (_, i) => 10 ** (X[0] + (i / 80) * (X[1] - X[0])))
      .map((n) => [n, d(n)]).filter(([, t]) => t >= 10 ** Y[0] && t <= 10 ** Y[1]);
    return h("polyline", { points: points.map(([n, t]) => `${x(n)},${y(t)}`).join(" "), style: `fill: none; ${style}` });
  };
  const round = (v) => Number(v.toPrecision(2)).toLocaleString("en-GB");
  const inFrame = (t) => Math.min(10 ** Y[1], Math.max(10 ** Y[0], t));

  function show() {
    const { used, held } = data.models[model.value];
    const [, peak] = data.devices[Number(device.value)];
    const budgetOf = (utilisation) => flopsOf({ peak, utilisation, gpus: gpus.value, days: days.value });
    const [mine, theirs] = [budgetOf(ratio.value), budgetOf(other.value)];
    const sparse = used < held;
    const rows = [[model.value, held, used, tokens(used, mine), sparse ? Math.sqrt(used * held) : used]];
    if (sparse) rows.push(["dense, equal size", held, held, tokens(held, theirs), held], ["dense, equal work", used, used, tokens(used, theirs), used]);
    const powers = ([low, high]) => Array.from({ length: high - low + 1 }, (_, i) => 10 ** (low + i));
    picture.draw(
      powers(X).map((n) => h("text", { x: x(n), y: HEIGHT - 24, "text-anchor": n === 10 ** X[1] ? "end" : "middle", class: "mm-quiet" }, si(n))),
      powers(Y).map((t) => h("text", { x: LEFT - 6, y: y(t) + 4, "text-anchor": "end", class: "mm-quiet" }, si(t))),
      h("text", { x: width / 2, y: HEIGHT - 6, "text-anchor": "middle", class: "mm-quiet" }, "parameters that a token uses"),
      h("text", { x: width - 8, y: 20, "text-anchor": "end", class: "mm-quiet" }, "tokens"),
      line((n) => tokens(n, mine), "stroke: var(--mm-blue); stroke-width: 2"),
      mine === theirs ? null : line((n) => tokens(n, theirs), "stroke: var(--mm-vermillion); stroke-width: 2"),
      line((n) => 20 * n, "stroke: var(--mm-line); stroke-dasharray: 5 4"),
      rows.slice(0, 2).map(([name, , n, t], i) => [
        h(i ? "rect" : "circle", i ? { x: x(n) - 5, y: y(inFrame(t)) - 5, width: 10, height: 10, style: "fill: var(--mm-vermillion)" } : { cx: x(n), cy: y(inFrame(t)), r: 6, style: "fill: var(--mm-blue)" }),
        h("text", { x: x(n) + (i ? 9 : -9), y: y(inFrame(t)) + (i ? -7 : 18), "text-anchor": i ? "start" : "end" }, i ? "equal size" : name),
      ]).flat(),
    );
    const said = rows.map(([, , , t, worth]) => loss(data.law, worth, t));
    const outside = rows.some(([, , , , worth]) => worth < data.fitted[0] || worth > data.fitted[1]);
    const text =
      `${gpus.value.toLocaleString("en-GB")} devices for ${days.value} ${days.value === 1 ? "day" : "days"} read ${si(rows[0][3])} tokens with ${model.value}` +
      (sparse ? `, and ${si(rows[1][3])} with a dense model of equal size: ${Number((rows[0][3] / rows[1][3]).toPrecision(2))} times as many. ` : ". ") +
      `That is ${round(rows[0][3] / used)} tokens for each parameter that is used and ${round(rows[0][3] / held)} for each that is held. ` +
      `By the law of dense models the least loss comes with ${si(best(data.law, theirs), "", 2)} parameters. ` +
      (outside ? "Careful: a size here lies outside the models that the law was fitted to." : "");
    words.say(text);
    picture.describe(`A falling line of tokens against parameters, with models on it. ${text}`);
    numbers.set(rows.map(([name, all, n, t], i) => [name, si(all), si(n), si(t), (t / n).toFixed(0), (t / all).toFixed(0), said[i].toFixed(3)]));
  }

  stage.append(
    h("p", { class: "mm-title" }, "What a budget pays for"),
    h("p", {}, "The line is a budget: twice the parameters, half the tokens. Dashed: 20 tokens for each parameter. How badly may the sparse model use its devices before it reads no more than the dense model of equal size? Loss: a sparse model is taken to be worth √(held · used) parameters, which is a rule of thumb."),
    h("div", { class: "mm-controls" }, model.element, device.element, gpus.element, days.element, ratio.element, other.element),
    picture.element,
    h("div", { class: "mm-buttons" }, reset),
    words.element,
    numbers.element,
  );
  show();
});
