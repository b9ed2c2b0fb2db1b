// Tiles: the rows of every expert filled up to whole tiles, and when the work on them is done.

// Rows of each expert [E]: every token takes K different experts, of popularity 1/rank^skew, one draw after the other.
export function draw({ tokens, experts, k, skew, seed = 1 }) {
  const uniform = uniforms(seed);
  const ends = [];
  for (let e = 0; e < experts; e += 1) ends.push((ends[e - 1] ?? 0) + (e + 1) ** -skew);
  const counts = Array(experts).fill(0);
  for (let t = 0; t < tokens; t += 1) {
    const taken = new Set();
    while (taken.size < k) {
      const at = uniform() * ends.at(-1);
      let [low, high] = [0, experts - 1];
      while (low < high) {
        const middle = (low + high) >> 1;
        if (ends[middle] > at) high = middle;
        else low = middle + 1;
      }
      taken.add(low);
    }
    for (const e of taken) counts[e] += 1;
  }
  return counts;
}

// {tiles, bound, filling, finish, pool} as minimoe.widgets.tile_layout.Tiling; and the shares of time spent waiting.
export function tiling(counts, rows, columns, multiprocessors) {
  const [n, experts] = [sum(counts), counts.length];
  const tiles = counts.map((count) => Math.ceil(count / rows));
  const used = sum(tiles);
  const finish = tiles.map((t) => (t * columns * experts) / multiprocessors);
  const most = Math.max(...finish);
  const pool = Math.ceil((used * columns) / multiprocessors);
  return {
    tiles, finish, pool,
    bound: Math.min(n, Math.floor((n + experts * (rows - 1)) / rows)),
    filling: used ? 1 - n / (used * rows) : 0,
    idleApart: most ? 1 - sum(finish) / (experts * most) : 0,
    idlePool: pool ? 1 - (used * columns) / (pool * multiprocessors) : 0,
  };
}

const whole = (number) => Math.round(number).toLocaleString("en-GB");
const time = (lengths) => (lengths < 10 ? lengths.toFixed(1) : whole(lengths));
const [GUTTER, BARS, TIMES] = [46, 150, 190];

// Above, the rows of each expert: of tokens filled, filling outlined. Below, each expert's time, and that of the pool.
function picture(state, width) {
  const { counts, found, rows } = state;
  const step = (width - GUTTER) / counts.length;
  const thin = step > 4 ? 0.8 : 0.4;
  const tallest = Math.max(...found.tiles) * rows;
  const floor = 22 + BARS;
  const parts = [h("text", { x: 0, y: 12, class: "mm-quiet" }, "rows by expert: of tokens (filled), and filling (outlined)")];
  counts.forEach((count, e) => {
    const [all, real] = [found.tiles[e] * rows, count].map((n) => (BARS * n) / tallest);
    const x = GUTTER + e * step;
    parts.push(h("rect", { x, y: floor - all, width: Math.max(0.5, step - thin), height: all, style: "fill:var(--mm-soft);stroke:var(--mm-line);stroke-width:0.5" }));
    parts.push(h("rect", { x, y: floor - real, width: Math.max(0.5, step - thin), height: real, style: "fill:var(--mm-blue)" }));
  });
  parts.push(h("line", { x1: GUTTER, x2: width, y1: floor, y2: floor, class: "mm-axis" }));
  parts.push(h("text", { x: GUTTER - 6, y: 32, "text-anchor": "end", class: "mm-quiet" }, whole(tallest)));
  parts.push(h("text", { x: GUTTER - 6, y: floor, "text-anchor": "end", class: "mm-quiet" }, "0"));
  parts.push(h("text", { x: GUTTER, y: floor + 15, class: "mm-quiet" }, "expert 1"));
  parts.push(h("text", { x: width, y: floor + 15, "text-anchor": "end", class: "mm-quiet" }, `expert ${counts.length}`));

  const top = floor + 52;
  const end = Math.max(...found.finish, found.pool);
  const x = (lengths) => GUTTER + (lengths / end) * (width - GUTTER);
  const high = TIMES / counts.length;
  parts.push(h("text", { x: 0, y: top - 12, class: "mm-quiet" }, "time by expert, each on its own share; line: one pool"));
  found.finish.forEach((finish, e) => {
    const bar = { x: GUTTER, y: top + e * high, height: Math.max(0.5, high - Math.min(2, 0.2 * high)) };
    parts.push(h("rect", { ...bar, width: x(Math.max(...found.finish)) - GUTTER, style: "fill:var(--mm-soft)" }));
    parts.push(h("rect", { ...bar, width: x(finish) - GUTTER, style: "fill:var(--mm-blue)" }));
  });
  parts.push(h("line", { x1: x(found.pool), x2: x(found.pool), y1: top - 4, y2: top + TIMES, style: "stroke:var(--mm-vermillion);stroke-width:2" }));
  parts.push(h("text", { x: GUTTER, y: top + TIMES + 15, class: "mm-quiet" }, "0"));
  parts.push(h("text", { x: width, y: top + TIMES + 15, "text-anchor": "end", class: "mm-quiet" }, `${time(end)} lengths of a program`));
  [1, counts.length].forEach((e, i) => {
    parts.push(h("text", { x: GUTTER - 6, y: top + (i ? TIMES - 2 : 10), "text-anchor": "end", class: "mm-quiet" }, String(e)));
  });
  return parts;
}

export default explorable(({ data, stage, width, reset }) => {
  const state = { seed: 1 };
  const scene = drawing(width, 22 + BARS + 52 + TIMES + 20);
  const words = status();
  const numbers = table("The same in numbers", ["expert", "rows", "tiles", "filling", "done after"]);
  const [, ...first] = data.examples[0];
  const powers = (low, high) => Array.from({ length: Math.log2(high / low) + 1 }, (_, i) => low * 2 ** i);

  const tokens = slider({ label: "T, tokens", values: powers(1, 8192), value: first[0], show: whole, oninput: choose });
  const experts = slider({ label: "E, experts", values: powers(8, 128), value: first[1], oninput: choose });
  const k = slider({ label: "K of them per token", values: [1, 2, 4, 8], value: first[2], oninput: choose });
  const skew = slider({ label: "skew of the router", min: 0, max: 1, step: 0.1, value: first[3], show: (v) => v.toFixed(1), oninput: choose });
  const rows = slider({ label: "rows of a tile", values: [16, 32, 64, 128], value: first[4], oninput: show });
  const columns = slider({ label: "blocks of columns", values: [1, 2, 4, 6, 8, 16, 32, 64, 112], value: first[5], oninput: show });
  const controls = [tokens, experts, k, skew, rows, columns];
  const examples = data.examples.map(([name, ...values]) =>
    button(name, () => {
      controls.forEach((control, i) => control.set(values[i]));
      choose();
    }),
  );
  const redraw = button("Draw other tokens", () => {
    state.seed += 1;
    choose();
  });

  function choose() {
    state.counts = draw({ tokens: tokens.value, experts: experts.value, k: k.value, skew: skew.value, seed: state.seed });
    show();
  }

  function show() {
    Object.assign(state, { rows: rows.value, found: tiling(state.counts, rows.value, columns.value, data.multiprocessors) });
    scene.draw(picture(state, width));
    const { counts, found } = state;
    const [used, most] = [sum(found.tiles), Math.max(...found.finish)];
    const without = counts.filter((n) => n === 0).length;
    const text =
      `${whole(sum(counts))} rows in ${whole(used)} tiles of ${rows.value}: ${percent(found.filling)} of what is computed is filling` +
      `${without ? `, and ${without} ${without === 1 ? "expert has" : "experts have"} no row` : ""}. ` +
      `Memory is set aside for ${whole(found.bound)} tiles. With ${whole(data.multiprocessors)} multiprocessors shared out evenly, experts are done after ` +
      `${time(Math.min(...found.finish))} to ${time(most)} lengths of a program, and the multiprocessors wait ${percent(found.idleApart)} of the time. ` +
      `In one pool the ${whole(used * columns.value)} programs take ${whole(found.pool)}, with ${percent(found.idlePool)} of waiting.`;
    words.say(text);
    scene.describe(`Bars of rows and times of ${counts.length} experts. ${text}`);
    numbers.set(
      counts.map((n, e) => [String(e + 1), whole(n), String(found.tiles[e]), whole(found.tiles[e] * rows.value - n), time(found.finish[e])]),
    );
  }

  stage.append(
    h("p", { class: "mm-title" }, "Tiles, filling and the busiest expert"),
    h("p", {}, "Every expert's rows are filled up to whole tiles. How much of the work is filling, and which tile suits few tokens? And how long does the busiest expert keep the others waiting, if each has its own part of the machine?"),
    h("div", { class: "mm-buttons" }, examples),
    h("div", { class: "mm-controls" }, controls.map((control) => control.element)),
    scene.element,
    h("div", { class: "mm-buttons" }, redraw, reset),
    words.element,
    numbers.element,
  );
  choose();
});
