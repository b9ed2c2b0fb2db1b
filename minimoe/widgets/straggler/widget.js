// Straggler: devices hold experts, and each step lasts until the busiest device is done.

// Where copies lie, as minimoe.cost.replicas.plan_replicas of more than 16 copies: the experts that each device holds.
export function plan(load, copies, devices) {
  const replicas = load.map(() => 1);
  for (let more = copies - load.length; more > 0; more -= 1) {
    let hot = -1;
    load.forEach((rows, e) => {
      if (replicas[e] >= devices) return;
      const gain = hot < 0 ? 1 : rows / replicas[e] - load[hot] / replicas[hot] || replicas[hot] - replicas[e];
      if (gain > 0) hot = e;
    });
    replicas[hot] += 1;
  }
  const each = load.map((rows, e) => rows / replicas[e]);
  const held = Array.from({ length: devices }, () => []);
  const total = Array(devices).fill(0);
  const order = load.map((_, e) => e).sort((a, b) => replicas[b] - replicas[a] || each[b] - each[a] || a - b);
  for (const e of order) {
    const emptiest = held.map((_, d) => d).sort((a, b) => held[a].length - held[b].length || total[a] - total[b] || a - b);
    for (const d of emptiest.slice(0, replicas[e])) {
      held[d].push(e);
      total[d] += each[e];
    }
  }
  for (;;) {
    const a = total.indexOf(Math.max(...total));
    let best = null; // [load, device, mine, its], the smallest
    held[a].forEach((mine, i) => {
      held.forEach((other, d) => {
        if (other.includes(mine)) return;
        other.forEach((its, j) => {
          if (held[a].includes(its)) return;
          const one = [Math.max(total[a] - each[mine] + each[its], total[d] + each[mine] - each[its]), d, i, j];
          const ahead = best === null ? -1 : one.map((x, n) => x - best[n]).find((x) => x !== 0);
          if (ahead < 0) best = one;
        });
      });
    });
    if (best === null || best[0] >= total[a] * (1 - 1e-12)) return held;
    const [, d, i, j] = best;
    const gain = each[held[a][i]] - each[held[d][j]];
    [held[a][i], held[d][j]] = [held[d][j], held[a][i]];
    total[a] -= gain;
    total[d] += gain;
  }
}

export function byNumber(experts, devices) {
  const each = experts / devices;
  return Array.from({ length: devices }, (_, d) => Array.from({ length: each }, (_, i) => d * each + i));
}

// Rows [steps][device] that are computed, how long each step lasts, and what is idle and dropped. A device takes at most
// `capacity` times the mean of a step; 0: all.
export function waits(steps, held, capacity = 0) {
  const copies = Array(steps[0].length).fill(0);
  held.flat().forEach((e) => (copies[e] += 1));
  let asked = 0;
  const rows = steps.map((load) => {
    const want = held.map((experts) => sum(experts.map((e) => load[e] / copies[e])));
    asked += sum(want);
    const room = capacity ? (capacity * sum(want)) / want.length : Infinity;
    return want.map((n) => Math.min(n, room));
  });
  const lasts = rows.map((row) => Math.max(...row));
  const done = sum(rows.flat());
  return { rows, lasts, idle: 1 - done / (held.length * sum(lasts)), dropped: 1 - done / asked };
}

// Steps of a router that is drawn: K different experts for each token, popularity falls as 1/rank^skew, in an order of
// the experts that has nothing to do with their numbers.
export function drawn({ skew, seed = 1, steps = 20, tokens = 256, experts = 64, k = 6 }) {
  const uniform = uniforms(seed);
  const place = Array.from({ length: experts }, (_, e) => [uniform(), e]).sort((a, b) => a[0] - b[0]).map(([, e]) => e);
  return Array.from({ length: steps }, () => {
    const load = Array(experts).fill(0);
    for (let t = 0; t < tokens; t += 1) {
      const score = place.map((rank) => -Math.log(-Math.log(Math.max(1e-9, uniform()))) - skew * Math.log(rank + 1));
      place.map((_, e) => e).sort((a, b) => score[b] - score[a]).slice(0, k).forEach((e) => (load[e] += 1));
    }
    return load;
  });
}

const DRAWN = "a drawn router";
const [BY_NUMBER, ON_ALL, ON_THESE] = ["number", "all", "these"];
const LEFT = 26;

export default explorable(({ data, stage, width, reset }) => {
  const [high, top] = [208, 24];
  const picture = drawing(width, top + high + 40);
  const words = status();
  const numbers = table("The same in numbers", ["device", "experts held", "rows in 20 steps", "idle", "steps in which all wait for it"]);
  const names = Object.keys(data.steps);
  const text = select({ label: "text that is read", options: [...names, DRAWN], value: "law", oninput: change });
  const skew = slider({ label: "skew of the drawn router", min: 0, max: 1.5, step: 0.1, value: 0, show: (v) => v.toFixed(1), oninput: change });
  const devices = slider({ label: "devices, R", values: [4, 8, 16, 32], value: data.devices, oninput: change });
  const placement = select({
    label: "experts are placed",
    options: [[BY_NUMBER, "by number"], [ON_ALL, "by a plan for all four domains"], [ON_THESE, "by a plan for these very steps"]],
    value: BY_NUMBER,
    oninput: change,
  });
  const copies = slider({ label: "copies in the plan", values: [64, 96, 128], value: data.copies, oninput: change });
  const capacity = slider({ label: "most rows of a device, over the mean", values: [1, 1.25, 1.5, 2, 0], value: 0, show: (v) => (v ? `${v}` : "no limit"), oninput: change });
  const summed = (steps) => steps[0].map((_, e) => sum(steps.map((load) => load[e])));

  function change() {
    skew.input.disabled = text.value !== DRAWN;
    copies.input.disabled = placement.value === BY_NUMBER;
    const steps = text.value === DRAWN ? drawn({ skew: skew.value, tokens: data.tokens, experts: data.experts, k: data.k }) : data.steps[text.value];
    const plain = byNumber(data.experts, devices.value);
    const load = placement.value === ON_ALL ? data.steps[names[0]] : steps;
    const held = placement.value === BY_NUMBER ? plain : plan(summed(load), copies.value, devices.value);
    show(steps, held, waits(steps, held, capacity.value), waits(steps, plain));
  }

  function show(steps, held, now, before) {
    const even = sum(steps[0]) / held.length; // rows of a device in an even step
    const scale = (width - LEFT) / Math.max(sum(before.lasts), sum(now.lasts));
    const row = high / held.length;
    const parts = [];
    let at = 0;
    now.rows.forEach((rows, s) => {
      const [x, wide] = [LEFT + at * scale, now.lasts[s] * scale];
      parts.push(h("rect", { x, y: top, width: Math.max(0.5, wide - 1), height: high, style: "fill:var(--mm-line);opacity:0.25" }));
      rows.forEach((n, d) => {
        const slow = n >= now.lasts[s];
        const style = `fill:var(--mm-${slow ? "vermillion" : "blue"})`;
        parts.push(h("rect", { x, y: top + (d + 0.08) * row, width: Math.max(0, n * scale - 1), height: row * 0.84, style }));
      });
      at += now.lasts[s];
    });
    const end = LEFT + at * scale;
    for (let d = 0; d < held.length; d += held.length > 8 ? held.length / 8 : 1) {
      parts.push(h("text", { x: 0, y: top + (d + 0.5) * row + 4 }, String(d + 1)));
    }
    parts.push(h("line", { x1: end, x2: end, y1: top, y2: top + high, style: "stroke:var(--mm-text);stroke-width:2" }));
    for (let n = 0; n * even * scale <= width - LEFT - 8; n += 10) {
      const x = LEFT + n * even * scale;
      parts.push(h("line", { x1: x, x2: x, y1: top + high, y2: top + high + 5, style: "stroke:var(--mm-line)" }));
      parts.push(h("text", { x, y: top + high + 18, "text-anchor": "middle" }, String(n)));
    }
    parts.push(h("text", { x: LEFT, y: top + high + 35, class: "mm-quiet" }, "time, in steps of an even load"));
    parts.push(h("text", { x: 0, y: 14, class: "mm-quiet" }, "device; orange: the one that all wait for"));
    picture.draw(parts);
    const waited = held.map((_, d) => now.rows.filter((rows, s) => rows[d] >= now.lasts[s]).length);
    const worst = waited.indexOf(Math.max(...waited));
    const said =
      `20 steps last as long as ${(at / even).toFixed(1)} even ones, and ${percent(now.idle)} of the devices' time is idle. ` +
      `By number and without a limit they last ${(sum(before.lasts) / even).toFixed(1)}. ` +
      `Device ${worst + 1} is the last one in ${waited[worst]} of 20 steps. ` +
      (now.dropped > 0 ? `${percent(now.dropped)} of the rows are dropped.` : "No row is dropped.");
    words.say(said);
    picture.describe(`Busy and idle time of ${held.length} devices. ${said}`);
    const of = held.map((_, d) => sum(now.rows.map((rows) => rows[d])));
    numbers.set(held.map((experts, d) => [d + 1, experts.length, of[d].toFixed(0), percent(1 - of[d] / at), waited[d]].map(String)));
  }

  stage.append(
    h("p", { class: "mm-title" }, "Straggler"),
    h("p", {}, "A step is done when its last device is. Is it always the same one? Make a plan for all four domains and read law: how much of the gain is left? And what does a limit cost that keeps anyone from waiting long?"),
    h("div", { class: "mm-controls" }, text.element, devices.element, placement.element, copies.element, capacity.element, skew.element),
    picture.element,
    h("div", { class: "mm-buttons" }, reset),
    words.element,
    numbers.element,
  );
  change();
});
