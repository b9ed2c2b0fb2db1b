// The live router: the shipped model reads any text, and shows which experts read its tokens.

// Share of all choices that each expert gets at each layer: [L][E] from probabilities [S, L, E] and the experts chosen.
export function loads(choices, layers, experts) {
  return Array.from({ length: layers }, (_, l) => {
    const counts = new Array(experts).fill(0);
    choices.forEach((token) => token[l].experts.forEach((e) => (counts[e] += 1)));
    const total = sum(counts) || 1;
    return counts.map((count) => count / total);
  });
}

// Part of the choices that would have to be made otherwise to turn one load into the other (total variation).
export const apart = (a, b) => sum(a.map((share, e) => Math.abs(share - b[e]))) / 2;

// The domain whose loads [L][E] are nearest to these, on average over layers.
export function nearest(load, domains) {
  const distance = ({ load: other }) => sum(load.map((shares, l) => apart(shares, other[l])));
  return domains.reduce((best, domain) => (distance(domain) < distance(best) ? domain : best));
}

// Where a text was cut: what was read of it, without the part of a character at its end.
export function beginning(bytes) {
  return new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes.flat()), { stream: true });
}

export default explorable(async ({ model, data, stage, width }) => {
  const { layers, experts, k, domains, agreement } = data;
  const weights = await file(model, "router.safetensors");
  let shown;
  let found = { tokens: [], choices: [], load: loads([], layers, experts) };

  const words = status();
  const cut = h("p", { class: "lr-cut", role: "status" });
  const one = detail(layers, experts);
  const list = tokenList((t) => one.show(t === undefined ? "" : `${t + 1}, “${found.tokens[t].text}”`, found.choices[t]));
  const roomy = width > 620;
  const picture = drawing(roomy ? width - 300 : width, 190);
  const numbers = table("The load in numbers", ["expert", "this text", "the domain", "difference"]);
  const input = h("textarea", { id: `lr-${(ids += 1)}`, rows: 4, dir: "auto", spellcheck: "false", oninput: after(200, () => read.ask(input.value)) });
  const layer = slider({ label: "layer", min: 1, max: layers, value: Math.ceil(layers / 2), oninput: paint });
  const domain = select({ label: "compare with", options: domains.map(({ name, title }) => [name, title]), oninput: paint });
  const buttons = data.examples.map(({ name, domain: own, text }) =>
    button(name, () => {
      input.value = text;
      if (own) domain.set(own);
      read.ask(text);
    }),
  );
  const gone = h("p", { class: "lr-gone", role: "alert" });
  let read;
  const begin = async () => {
    read = await engine(weights, show, lost);
    gone.replaceChildren();
    read.ask(input.value);
  };
  const again = button("Start again", begin);

  function lost() {
    gone.replaceChildren("The model no longer answers: the browser has ended the worker that ran it. ", again);
  }

  function show({ text, bytes, cut: isCut, probs }) {
    const tokens = bytes.map((spelling) => ({ text: written(spelling) }));
    const choices = tokens.map((_, t) =>
      Array.from({ length: layers }, (_, l) => {
        const own = probs.subarray((t * layers + l) * experts, (t * layers + l + 1) * experts);
        return { probs: own, ...choose(own, k) };
      }));
    found = { tokens, choices, load: loads(choices, layers, experts) };
    list.show(tokens, getComputedStyle(input).direction);
    const seen = beginning(bytes);
    const counts = [tokens.length, seen.length, text.length].map((n) => n.toLocaleString("en"));
    const tail = h("bdi", {}, [...seen].slice(-24).join(""));
    const notice = `The model reads ${counts[0]} tokens at most, so the text is cut after ${counts[1]} of its ${counts[2]} characters: “…`;
    cut.replaceChildren(...(isCut ? [notice, tail, "”."] : []));
    paint();
    shown?.();
  }

  function paint() {
    const l = layer.value - 1;
    const { tokens, choices, load } = found;
    list.paint((t) => choices[t][l], tokens);
    one.mark(l);
    const own = load[l];
    const other = domains.find(({ name }) => name === domain.value);
    picture.draw(loadBars(roomy ? width - 300 : width, own, other.load[l]));
    const most = own.indexOf(Math.max(...own));
    const text = tokens.length
      ? `${tokens.length} tokens. At layer ${l + 1} expert ${most + 1} is chosen most: ${percent(own[most])} of the choices; in “${other.title}” it is ${percent(other.load[l][most])}. ` +
        `${percent(apart(own, other.load[l]))} of the choices would have to change to give that domain's load. Over all layers the nearest of the ${domains.length} domains is “${nearest(load, domains).title}”.`
      : "There is no text to read. The lines show the domain alone.";
    words.say(text);
    picture.describe(`Share of choices that each of ${experts} experts gets at layer ${l + 1}, of this text and of “${other.title}”. ${text}`);
    numbers.set(own.map((share, e) => [String(e + 1), percent(share, 1), percent(other.load[l][e], 1), difference(share - other.load[l][e], 1)]));
  }

  stage.classList.add("lr");
  stage.append(
    h("style", {}, LOOK),
    h("p", { class: "mm-title" }, "The live router"),
    h("p", {}, `This is the course's own model, ${si(data.parameters)} parameters, at work in your browser. Which experts read your text, and do the same ones read it in another language, or as code?`),
    h("label", { class: "lr-label", for: input.id }, "text"),
    input,
    h("div", { class: "mm-buttons" }, buttons),
    h("div", { class: "mm-controls" }, layer.element, domain.element),
    h("p", {}, "Each token has the number and colour of its first expert; the second one stands beside it. Point at a token, or walk with the arrow keys, for its weights at every layer."),
    list.element,
    gone,
    cut,
    words.element,
    h("div", { class: "lr-both" },
      one.element,
      h("div", {}, h("p", {}, "Load: bars, this text; lines, the domain's average."), picture.element)),
    numbers.element,
    h("p", {}, `Experts are held in int8 here. On ${agreement.tokens.toLocaleString("en")} tokens of held-out text, ${percent(agreement.same_set, 1)} of the choices fall on the same ${k} experts as with the full weights, and ${percent(agreement.same_first, 1)} have the same first one.`),
    h("details", { class: "mm-table" },
      h("summary", {}, "What runs here"),
      h("p", {}, `All ${layers} layers up to the last router, ${si(weights.byteLength, "B")} of weights: experts in int8 with one scale a channel, everything else as stored. Results are float32, sums float64. Before the text the model reads an end-of-text mark, as in training. The agreement was measured on ${agreement.date} with ${agreement.command}; layer 1 always agrees, as no expert comes before its router.`)),
  );
  input.value = data.examples[0].text;
  domain.set(data.examples[0].domain);
  const first = new Promise((done) => (shown = done)); // what comes in place of the figure is whole
  await begin().catch(() => {
    throw new Error("its weights are damaged");
  });
  await first;
  return () => read.stop();
});
