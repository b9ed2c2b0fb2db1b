// Capacity: tokens arrive in order, ask for their experts, and are dropped where an expert has no place left.

// C = max(1, ⌈factor · T · K / E⌉) as minimoe.capacity.expert_capacity: the factor is the decimal number as written.
export function capacity(tokens, experts, k, factor) {
  const decimals = 10 ** (String(factor).split(".")[1] ?? "").length;
  return Math.max(1, Math.ceil((Math.round(factor * decimals) * tokens * k) / (decimals * experts)));
}

// Each token's K experts, its first choice first: [T][K]. Popularity falls as 1/rank^skew. The chance numbers belong to
// token and expert, so that more tokens, a larger K or another skew change no more than they must.
export function choose({ tokens, experts, k, skew, seed = 1 }) {
  const uniform = uniforms(seed);
  const chosen = [];
  for (let t = 0; t < tokens; t += 1) {
    const scores = Array.from({ length: 16 }, (_, e) => -Math.log(-Math.log(Math.max(1e-9, uniform()))) - skew * Math.log(e + 1));
    const ranked = scores.slice(0, experts).map((_, e) => e).sort((a, b) => scores[b] - scores[a] || a - b);
    chosen.push(ranked.slice(0, k));
  }
  return chosen;
}

// Place of each assignment in its expert's queue, from 0, in order of arrival; kept where it is below `places`.
// All choices of a token come before the next token's, as in minimoe.capacity.limit_capacity.
export function fall(chosen, experts, places) {
  const queue = Array(experts).fill(0);
  const place = chosen.map((row) => row.map((e) => (queue[e] += 1) - 1));
  return { place, kept: place.map((row) => row.map((p) => p < places)) };
}

// What capacity cost the first `arrived` tokens, as minimoe.capacity.DropStats, and the places that are empty.
export function drops(chosen, experts, places, arrived = chosen.length) {
  const { kept } = fall(chosen, experts, places);
  const [asked, dropped] = [Array(experts).fill(0), Array(experts).fill(0)];
  const lost = [];
  for (let t = 0; t < arrived; t += 1) {
    chosen[t].forEach((e, i) => {
      asked[e] += 1;
      dropped[e] += kept[t][i] ? 0 : 1;
    });
    if (!kept[t].some(Boolean)) lost.push(t);
  }
  const [assignments, all] = [sum(asked), sum(dropped)];
  const empty = experts * places - (assignments - all);
  return { asked, byExpert: dropped, assignments, dropped: all, share: assignments ? all / assignments : 0, lost, empty };
}

const [GUTTER, QUEUES, STRIP, GAP] = [52, 260, 22, 8];

// A cell of a token: kept ones filled, dropped ones hatched with the pattern of that name.
function cell(pattern, x, y, width, height, kept) {
  const style = kept ? "fill:var(--mm-blue)" : `fill:url(#${pattern});stroke:var(--mm-vermillion)`;
  const inset = kept ? 0 : 0.5;
  return h("rect", { x: x + inset, y: y + inset, width: width - 2 * inset, height: height - 2 * inset, style });
}

function hatch(pattern) {
  return h(
    "defs", {},
    h(
      "pattern", { id: pattern, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      h("rect", { width: 5, height: 5, style: "fill:var(--mm-back)" }),
      h("rect", { width: 1.8, height: 5, style: "fill:var(--mm-vermillion)" }),
    ),
  );
}

// What the three kinds of cell mean.
function key(pattern, width) {
  const places = [0, 62, 146];
  return ["kept", "dropped", "empty place"].flatMap((text, i) => {
    const x = Math.max(0, width - 252) + places[i];
    return [
      i < 2 ? cell(pattern, x, 0, 12, 12, i === 0) : h("rect", { x: x + 0.5, y: 0.5, width: 11, height: 11, style: "fill:none;stroke:var(--mm-line)" }),
      h("text", { x: x + 17, y: 11 }, text),
    ];
  });
}

// The tokens in order of arrival: outlined while they wait; then filled by the share of their experts that took them.
function strip(state, width, top) {
  const size = Math.min(STRIP, width / state.chosen.length);
  const pad = size > 8 ? 1 : 0.5;
  const parts = [h("text", { x: 0, y: top - 6, class: "mm-quiet" }, "tokens in order of arrival")];
  state.chosen.forEach((row, t) => {
    const [x, inner] = [t * size + pad, size - 2 * pad];
    if (t < state.arrived) {
      const kept = state.kept[t].filter(Boolean).length / row.length;
      if (kept < 1) parts.push(cell(state.pattern, x, top, inner, STRIP * (1 - kept), false));
      if (kept > 0) parts.push(cell(state.pattern, x, top + STRIP * (1 - kept), inner, STRIP * kept, true));
      if (kept === 0) parts.push(h("path", { d: `M${x} ${top}l${inner} ${STRIP}m${-inner} 0l${inner} ${-STRIP}`, style: "stroke:var(--mm-text);stroke-width:1.5" }));
    } else parts.push(h("rect", { x: x + 0.5, y: top + 0.5, width: inner - 1, height: STRIP - 1, style: "fill:none;stroke:var(--mm-line)" }));
  });
  return { parts, at: (t) => (t + 0.5) * size };
}

// The queues: places from the floor up to the rim, and above the rim those who found none.
function queues(state, width, top, from) {
  const { experts, places, seen } = state;
  const rows = Math.max(places, ...state.final.asked);
  const step = (width - GUTTER) / experts;
  const [high, wide] = [Math.min(22, (QUEUES - GAP) / rows), step * 0.84];
  const floor = top + QUEUES;
  const rim = floor - places * high;
  const gap = high > 5 ? 1 : 0.4;
  const corner = (e, place) => [GUTTER + (e + 0.08) * step, floor - (place + 1) * high - (place < places ? 0 : GAP)];
  const parts = [];
  for (let e = 0; e < experts; e += 1) {
    for (let place = seen.asked[e] - seen.byExpert[e]; place < places; place += 1) {
      const [x, y] = corner(e, place);
      parts.push(h("rect", { x: x + 0.5, y: y + gap, width: wide - 1, height: Math.max(0.5, high - 2 * gap), style: "fill:none;stroke:var(--mm-line);stroke-width:0.8" }));
    }
    const middle = GUTTER + (e + 0.5) * step;
    parts.push(h("text", { x: middle, y: floor + 16, "text-anchor": "middle" }, String(e + 1)));
    parts.push(h("text", { x: middle, y: floor + 33, "text-anchor": "middle", class: "mm-quiet" }, String(seen.asked[e])));
    parts.push(h("text", { x: middle, y: floor + 50, "text-anchor": "middle", class: "mm-quiet" }, String(seen.byExpert[e])));
  }
  const falling = [];
  for (let t = 0; t < state.arrived; t += 1) {
    state.chosen[t].forEach((e, i) => {
      const kept = state.kept[t][i];
      const [x, y] = corner(e, state.place[t][i]);
      const group = h("g", {}, cell(state.pattern, x, y + gap / 2, wide, high - gap, kept));
      if (high >= 12 && wide >= 15) {
        const style = kept ? "fill:var(--mm-back)" : "fill:var(--mm-text);stroke:var(--mm-back);stroke-width:3;paint-order:stroke";
        group.append(h("text", { x: x + wide / 2, y: y + high / 2 + 4, "text-anchor": "middle", "font-size": 11, style }, String(t + 1)));
      }
      parts.push(group);
      if (t === state.arrived - 1) falling.push([group, from.at(t) - x - wide / 2, from.top - y]);
    });
  }
  parts.push(h("line", { x1: GUTTER, x2: width, y1: rim - GAP / 2, y2: rim - GAP / 2, style: "stroke:var(--mm-text);stroke-width:2" }));
  parts.push(h("text", { x: 0, y: Math.max(top + 12, rim + 8) }, `C = ${places}`));
  [["expert", 16], ["asked", 33], ["dropped", 50]].forEach(([text, y]) =>
    parts.push(h("text", { x: 0, y: floor + y, class: "mm-quiet" }, text)));
  return { parts, falling };
}

export default explorable(({ data, stage, width, reset }) => {
  const state = { seed: 1, arrived: data.tokens, pattern: `mm-hatch-${(ids += 1)}` };
  const stripTop = width < 480 ? 46 : 22;
  const queueTop = stripTop + STRIP + 12;
  const picture = drawing(width, queueTop + QUEUES + 56);
  const words = status();
  const numbers = table("The same in numbers", ["expert", "asked for", "kept", "dropped", "places empty"]);

  const factor = slider({ label: "capacity factor c", min: 0.25, max: 4, step: 0.05, value: data.factor, show: (v) => v.toFixed(2), oninput: change });
  const skew = slider({ label: "skew of the router", min: 0, max: 1.5, step: 0.1, value: data.skew, show: (v) => v.toFixed(1), oninput: change });
  const tokens = slider({ label: "tokens, T", min: 4, max: 64, step: 4, value: data.tokens, oninput: change });
  const k = slider({ label: "K, experts per token", min: 1, max: 4, value: data.k, oninput: change });
  const experts = slider({ label: "experts, E", values: [4, 8, 16], value: data.experts, oninput: change });
  const arrived = slider({ label: "token by token", min: 0, max: data.tokens, value: data.tokens, show: (v) => `${v} of ${tokens.value}`, oninput: show });
  const play = player(arrived, { milliseconds: 260, text: "Let them fall" });
  const examples = data.examples.map(([name, ...values]) =>
    button(name, () => {
      [skew, factor].forEach((control, i) => control.set(values[i]));
      change();
    }),
  );
  const redraw = button("Draw other tokens", () => {
    state.seed += 1;
    change();
  });

  function change() {
    const all = Number(arrived.input.value) >= Number(arrived.input.max);
    const settings = { tokens: tokens.value, experts: experts.value, k: k.value, skew: skew.value, seed: state.seed };
    state.experts = experts.value;
    state.chosen = choose(settings);
    state.places = capacity(tokens.value, experts.value, k.value, factor.value);
    Object.assign(state, fall(state.chosen, state.experts, state.places));
    state.final = drops(state.chosen, state.experts, state.places);
    arrived.input.max = tokens.value;
    arrived.set(all ? tokens.value : Math.min(arrived.value, tokens.value));
    show();
  }

  function show() {
    const before = state.arrived;
    state.arrived = arrived.value;
    state.seen = drops(state.chosen, state.experts, state.places, state.arrived);
    const line = strip(state, width, stripTop);
    const { parts, falling } = queues(state, width, queueTop, { at: line.at, top: stripTop });
    picture.draw(hatch(state.pattern), key(state.pattern, width), line.parts, parts);
    if (play.playing && state.arrived === before + 1 && !lessMotion()) {
      for (const [group, x, y] of falling) {
        group.animate([{ transform: `translate(${x}px, ${y}px)` }, { transform: "none" }], { duration: 220, easing: "ease-in" });
      }
    }
    tell();
  }

  function tell() {
    const { seen, places, experts: count } = state;
    const room = count * places;
    const first = state.kept.findIndex((row, t) => t < state.arrived && !row.every(Boolean));
    const many = (n, one, more) => `${n} ${n === 1 ? one : more}`;
    const text =
      `${many(state.arrived, "token has", "tokens have")} arrived; each expert has ${many(places, "place", "places")}. ` +
      `${seen.dropped} of ${seen.assignments} assignments (${percent(seen.share)}) are dropped` +
      `${first < 0 ? "" : `, the first of them token ${first + 1}'s`}. ` +
      `${seen.lost.length === 0 ? "No token has" : many(seen.lost.length, "token has", "tokens have")} lost every expert. ` +
      `${seen.empty} of ${room} places (${percent(seen.empty / room)}) are empty.`;
    words.say(text);
    picture.describe(`Queues of ${count} experts. ${text}`);
    numbers.set(
      seen.asked.map((asked, e) => [e + 1, asked, asked - seen.byExpert[e], seen.byExpert[e], places - asked + seen.byExpert[e]].map(String)),
    );
  }

  stage.append(
    h("p", { class: "mm-title" }, "Capacity and drops"),
    h("p", {}, "Every expert has C places, and tokens take them in order of arrival. Who is dropped, the early or the late? And how much room must a skewed router be given until nobody is dropped: how much of it then stays empty?"),
    h("div", { class: "mm-buttons" }, examples),
    h("div", { class: "mm-controls" }, factor.element, skew.element, k.element, tokens.element, experts.element),
    picture.element,
    h("div", { class: "mm-controls" }, arrived.element),
    h("div", { class: "mm-buttons" }, play.element, redraw, reset),
    words.element,
    numbers.element,
  );
  change();
});
