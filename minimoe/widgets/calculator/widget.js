// The costs of a published model, and of what sliders make of it; the arithmetic is in cost.js.

// --- sliders ----------------------------------------------------------------------------------------------------

// What each slider can say; every preset's own value is among them.
export const REACH = {
  E: [1, 2, 4, 8, 16, 32, 60, 64, 128, 256, 512],
  K: [1, 2, 3, 4, 6, 8, 12, 16, 32],
  F: [48, 160, 256, 512, 768, 1024, 1408, 2048, 2880, 4096, 8192, 11008, 14336, 16384, 28672],
  D: [32, 64, 128, 256, 384, 512, 1024, 2048, 2880, 4096, 5120, 6144, 7168, 8192, 12288, 16384],
  L: [1, 2, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 56, 61, 64, 80, 96, 128],
  heads: [2, 4, 6, 8, 16, 32, 48, 64, 96, 128],
  kv: [1, 2, 4, 6, 8, 16, 32, 48, 64, 96, 128],
  attention: ["own", "switchhead", "moa"],
  d: [16, 22, 28, 32, 48, 56, 64, 80, 96, 128, 192, 256],
  aE: [1, 2, 4, 5, 8, 12, 16, 24, 32, 48, 64, 96, 128],
  aK: [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128],
  S: [1, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 40960, 65536, 131072, 163840],
};

const isDense = (c) => sparseLayers(c) === 0;
const mixes = (c) => ["switchhead", "moa"].includes(c.attention_type);

// The sizes of a configuration, as the sliders say them.
export function sizes(c) {
  return {
    E: isDense(c) ? 1 : c.num_experts, K: isDense(c) ? 1 : c.num_experts_per_tok, F: expertSize(c),
    D: c.hidden_size, L: c.num_hidden_layers, heads: c.num_attention_heads, kv: c.num_key_value_heads, d: headSize(c),
    attention: mixes(c) ? c.attention_type : "own", aE: c.attention_num_experts, aK: c.attention_num_experts_per_tok,
  };
}

// A preset with other sizes, made possible: no more choices than experts, key/value heads that divide the heads (one
// for each under MLA). A dense model gets experts in all its layers where E is above 1. Attention with experts has no
// biases and sinks; in MoA a token has heads / kv experts of kv heads each, and no norm over all of them.
export function changed(preset, { E, K, F, D, L, heads, kv, d, attention, aE, aK }) {
  const layers = Array.from({ length: L }, (_, i) => i);
  const dense = isDense(preset);
  const fits = REACH.kv.filter((n) => n <= kv && heads % n === 0);
  const own = attention === "own";
  const type = own ? preset.attention_type : attention;
  const groups = type === "mla" ? heads : fits.at(-1);
  const used = type === "moa" ? heads / groups : aK;
  return {
    ...preset,
    num_experts: E,
    num_experts_per_tok: Math.min(K, E),
    [preset.moe_intermediate_size === null ? "intermediate_size" : "moe_intermediate_size"]: F,
    hidden_size: D,
    head_dim: d,
    num_hidden_layers: L,
    mlp_only_layers: dense ? (E > 1 ? [] : layers) : preset.mlp_only_layers.filter((layer) => layer < L),
    layer_types: preset.layer_types.length ? layers.map((i) => preset.layer_types[i % preset.layer_types.length]) : [],
    num_attention_heads: heads,
    num_key_value_heads: groups,
    attention_type: type,
    attention_num_experts: REACH.aE.find((n) => n >= Math.max(aE, used)),
    attention_num_experts_per_tok: used,
    attention_bias: own && preset.attention_bias,
    attention_output_bias: own && preset.attention_output_bias,
    attention_sinks: own && preset.attention_sinks,
    qk_norm: type === "moa" && preset.qk_norm === "full" ? "head" : preset.qk_norm,
  };
}

// --- drawing ----------------------------------------------------------------------------------------------------

const COLOURS = {
  experts: "var(--mm-blue)", shared_experts: "var(--mm-sky)", mlp: "var(--mm-muted)", attention: "var(--mm-vermillion)",
  attention_scores: "var(--mm-orange)", embedding: "var(--mm-green)", head: "var(--mm-purple)", router: "var(--mm-text)",
  norms: "var(--mm-line)",
};
const named = (component) => component.replace("_", " ");
const billions = (number) => si(number).replace("G", "B");
const whole = (number) => Math.round(number).toLocaleString("en-GB");
const powerOfTen = (number) => {
  const [digits, power] = number.toExponential(2).split("e+");
  return `${digits} · 10${[...power].map((digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]).join("")}`;
};
const [BAR, ROW] = [26, 52];

// What attention costs a token: projections, scores, matrices, cache.
function ofAttention(c, S) {
  const [forward, count] = [flops(c, S), matrices(c)];
  return (
    `${si(forward.attention, "FLOP")} projections, ${si(forward.attention_scores, "FLOP")} scores a token; ` +
    `${whole(count)} matrices, ${si(2 * count * S * S, "B")} if written out; ${si(cacheBytes(c, 1), "B")} of cache a token`
  );
}

// Three stacked bars, [title, {component: size}, size of the full width] each.
function stacked(rows, width) {
  return rows.flatMap(([title, parts, scale], row) => {
    let x = 0;
    const y = row * ROW + 18;
    const drawn = [h("text", { x: 0, y: y - 6 }, title)];
    for (const [component, colour] of Object.entries(COLOURS)) {
      const wide = ((parts[component] ?? 0) / scale) * width;
      if (wide < 0.2) continue;
      drawn.push(h("rect", { x, y, width: Math.max(0.5, wide - 1), height: BAR, fill: colour }));
      const text = named(component);
      if (wide > 7 * text.length + 6) {
        drawn.push(h("text", { x: x + wide / 2, y: y + BAR / 2 + 4, "text-anchor": "middle", class: "mm-inside" }, text));
      }
      x += wide;
    }
    return drawn;
  });
}

export default explorable(({ data, stage, width, reset }) => {
  const presets = Object.fromEntries(Object.entries(data.presets).map(([name, own]) => [name, { ...data.plain, ...own }]));
  const picture = drawing(width, 3 * ROW);
  const words = status();
  const parts = h("tbody");
  const facts = h("tbody");
  const answer = h("p");

  const choice = select({ label: "model", options: Object.keys(presets), value: data.first, oninput: restore });
  const own = sizes(presets[data.first]);
  const shaped = {};
  for (const [key, label] of [
    ["E", "E, experts"], ["K", "K of them per token"], ["F", "F, expert width"], ["D", "D, model width"],
    ["L", "L, layers"], ["heads", "heads"], ["kv", "key/value heads"],
    ["d", "d, head size"], ["aE", "experts in attention"], ["aK", "of these per token"],
  ]) {
    shaped[key] = slider({ label, values: REACH[key], value: own[key], show: (v) => (v === undefined ? "" : whole(v)), oninput: () => show(key) });
  }
  shaped.attention = select({
    label: "attention", options: [["own", "as published"], ["switchhead", "SwitchHead"], ["moa", "MoA"]], value: "own",
    oninput: () => show(),
  });
  const context = slider({ label: "S, context", values: REACH.S, value: data.context, show: whole, oninput: () => show() });
  const tokens = slider({
    label: "tokens to train on", values: [9, 10, 11, 12, 13].flatMap((power) => [1, 2, 5].map((n) => Number(`${n}e${power}`))),
    value: 1e12, show: billions, oninput: () => show(),
  });
  const chip = select({ label: "on this GPU", options: data.devices.map((device, i) => [String(i), device.name]), value: "0", oninput: () => show() });
  const gpus = slider({ label: "how many", values: Array.from({ length: 15 }, (_, i) => 2 ** i), value: 1024, show: whole, oninput: () => show() });
  const utilisation = slider({ label: "of peak reached", min: 0.05, max: 1, step: 0.05, value: 0.4, show: percent, oninput: () => show() });

  // The published sizes again.
  function restore() {
    const preset = presets[choice.value];
    for (const [key, value] of Object.entries(sizes(preset))) shaped[key].set(value);
    context.input.max = REACH.S.findLastIndex((s) => s <= preset.max_position_embeddings);
    context.set(Math.min(data.context, preset.max_position_embeddings));
    show();
  }

  function show(turned) {
    const preset = presets[choice.value];
    const said = Object.fromEntries(Object.entries(shaped).map(([key, control]) => [key, control.value]));
    // what cannot be (K above E, say) is undone on the other slider, not on the one in the reader's hand
    if (said.K > said.E && turned === "K") said.E = REACH.E.find((e) => e >= said.K);
    if (said.kv > said.heads && turned === "kv") said.heads = REACH.heads.find((n) => n % said.kv === 0);
    const c = changed(preset, said);
    for (const [key, value] of Object.entries(sizes(c))) if (shaped[key].value !== value) shaped[key].set(value);
    shaped.kv.input.disabled = shaped.d.input.disabled = c.attention_type === "mla";
    shaped.aE.input.disabled = !mixes(c);
    shaped.aK.input.disabled = c.attention_type !== "switchhead"; // in MoA it is heads / kv

    const S = context.value;
    const count = parameters(c);
    const forward = flops(c, S);
    const last = sum(Object.values(flops(c, S, { decode: true })));
    const all = sum(Object.values(forward));
    const of = (key) => Object.fromEntries(Object.entries(count.parts).map(([name, part]) => [name, part[key]]));
    const share = count.active / count.total;
    picture.draw(
      stacked(
        [
          [`${billions(count.total)} parameters held`, of("total"), count.total],
          [`${billions(count.active)} used per token, ${percent(share, 1)}`, of("active"), count.total],
          [`${si(all, "FLOP")} forward a token, S = ${whole(S)}`, forward, all],
        ],
        width,
      ),
    );
    parts.replaceChildren(
      ...Object.keys(COLOURS).filter((name) => count.parts[name] || forward[name]).map((name) =>
        h("tr", {},
          h("th", { scope: "row" }, h("span", { class: "mm-keep" }, h("span", { class: "mm-swatch", style: `background: ${COLOURS[name]}` }), name.split("_")[0]), name.split("_").slice(1).map((word) => ` ${word}`)),
          [count.parts[name] && billions(count.parts[name].total), count.parts[name] && billions(count.parts[name].active), forward[name] && si(forward[name])].map((cell) => h("td", {}, cell ?? "–")),
        ),
      ),
    );

    const cost = training(c, { tokens: tokens.value, peak: data.devices[Number(chip.value)].peak, utilisation: utilisation.value, gpus: gpus.value });
    facts.replaceChildren(
      ...[
        ["weights", [16, 8, 4].map((bits) => `${si((count.total * bits) / 8, "B")} in ${bits} bit`).join(", ")],
        ["key/value cache", `${si(cacheBytes(c, 1), "B")} a token, ${si(cacheBytes(c, S), "B")} for ${whole(S)}`],
        ["attention", ofAttention(c, S)],
        ...(mixes(c) ? [["the published one", ofAttention(preset, S)]] : []),
        ["compute per token", `${si(all, "FLOP")} forward, ${si(2 * all, "FLOP")} backward`],
        ["writing the last one", `${si(last, "FLOP")}, after ${whole(S - 1)} others`],
        ["training", `6 · used · tokens = ${powerOfTen(cost.flops)} FLOP`],
        ["on the GPUs below", `${whole(cost.hours)} GPU-hours, ${cost.days < 10 ? Number(cost.days.toPrecision(2)) : whole(cost.days)} days`],
      ].map(([head, value]) => h("tr", {}, h("th", { scope: "row" }, head), h("td", {}, value))),
    );

    const experts = count.parts.experts?.total ?? 0;
    const same = Object.entries(sizes(preset)).every(([key, size]) => shaped[key].value === size);
    const text =
      `${choice.value}${same ? "" : ", changed,"} holds ${billions(count.total)} parameters and uses ${billions(count.active)} for a token, ${percent(share)}. ` +
      (experts
        ? `Its experts are ${percent(experts / count.total)} of it; the other ${billions(count.total - experts)} are not copied.`
        : "It is dense: every parameter works for every token.");
    words.say(text);
    picture.describe(`Stacked bars of parameters held and used and of FLOPs, by component. ${text}`);
    // with one expert left, the question is still about those that it had
    const E = c.num_experts > 1 ? c.num_experts : sizes(preset).E;
    const [one, many] = [1, E].map((n) => parameters(changed(preset, { ...said, E: n })).total);
    answer.textContent = E > 1
      ? `With one expert this model has ${billions(one)} parameters, so ${E} of its kind would hold ${billions(E * one)}. With ${E} experts it holds ` +
        `${billions(many)}: only the experts are copied, and everything else is shared. That saves ${billions(E * one - many)}.`
      : "This model is dense: nothing is copied, and nothing is shared. Turn E up.";
  }

  stage.append(
    h("p", { class: "mm-title" }, "What does a model cost?"),
    h("p", {}, "Eight times seven is 56, but Mixtral 8x7B holds 46.7 billion parameters. Where did nine billion go? Turn E down to 1 and see what is left."),
    h("div", { class: "mm-controls" }, [choice, shaped.E, shaped.K, shaped.F].map((control) => control.element)),
    picture.element,
    words.element,
    h("div", { class: "mm-controls" }, [shaped.D, shaped.L, shaped.heads, shaped.kv, shaped.d, context].map((control) => control.element)),
    h("div", { class: "mm-controls" }, [shaped.attention, shaped.aE, shaped.aK].map((control) => control.element)),
    h("div", { class: "mm-buttons" }, button("Published sizes", restore), reset),
    h("details", { class: "mm-table" }, h("summary", {}, "Where did they go?"), answer),
    h("div", { class: "mm-scroll mm-table", tabindex: 0, role: "region", "aria-label": "By component" },
      h("table", {},
        h("thead", {}, h("tr", {}, ["component", "held", "used per token", "FLOP per token"].map((head) => h("th", { scope: "col" }, head)))), parts)),
    h("table", { class: "mm-facts" }, facts),
    h("div", { class: "mm-controls" }, tokens.element, chip.element, gpus.element, utilisation.element),
  );
  restore();
});
