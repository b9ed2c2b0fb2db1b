// The live router: the shipped model reads any text, and shows which experts read its tokens. Until the reader acts it
// shows a recorded run; then the model is loaded.

// Share of all choices that each expert gets at each layer: [L][E] from probabilities [S, L, E] and the experts chosen.
export function loads(choices, layers, experts) {
  return Array.from({ length: layers }, (_, l) => {
    const counts = new Array(experts).fill(0);
    choices.forEach((token) => token[l].experts.forEach((e, i) => (counts[e] += token[l].weights[i] ? 1 : 0))); // of weight 0 where the others are off
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

// Logits [V] -> their probabilities at a temperature [V].
export function distribution(logits, temperature) {
  const probs = Float64Array.from(logits, (logit) => logit / temperature);
  softmax(probs);
  return probs;
}

// The experts that may be chosen, {layer: [experts]}, where one of them is "off" or "forced" at these layers.
export function allowed({ how, expert }, layers, experts) {
  const every = Array.from({ length: experts }, (_, e) => e);
  return Object.fromEntries(layers.map((l) => [l, how === "forced" ? [expert] : every.filter((e) => e !== expert)]));
}

// The same, {layer: [experts]}, where the switches [layer, expert] in `off` are off besides; the last expert of a layer stays.
export function switched(off, experts, rules = {}) {
  const found = { ...rules };
  for (const [l, expert] of off) {
    const rest = (found[l] ?? Array.from({ length: experts }, (_, e) => e)).filter((e) => e !== expert);
    if (rest.length) found[l] = rest;
  }
  return found;
}

const mean = (numbers) => sum(numbers) / numbers.length;
const text = (bytes) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));

export default explorable(({ model, data, stage, width }) => {
  const { layers, experts, k, domains, agreement, recorded } = data;
  const first = data.examples[0];
  const middle = Math.ceil(layers / 2);
  const state = { without: false, step: -1, tried: new Map() };
  let found;
  let live; // promise of the engine, from when the reader first acts
  let weights;

  const words = status();
  const cut = h("p", { class: "lr-cut", role: "status" });
  const gone = h("p", { class: "lr-gone", role: "alert" });
  const one = detail(layers, experts);
  const list = tokenList((t) => (state.token = t ?? 0, one.show(t === undefined ? "" : `${t + 1}, “${found.tokens[t].text}”`, found.choices[t], found.costs[t])));
  const roomy = width > 620;
  const picture = drawing(roomy ? width - 300 : width, 190);
  const numbers = table("The load in numbers", ["expert", "this text", "the domain", "difference"]);
  const costs = h("p", { class: "lr-costs", role: "status" });
  const next = nextTokens((more) => {
    input.value += more;
    ask();
  });
  const input = h("textarea", { id: `lr-${(ids += 1)}`, rows: 4, dir: "auto", spellcheck: "false", oninput: after(200, ask) });
  const layer = slider({ label: "layer", min: 1, max: layers, value: middle, oninput: turned });
  const domain = select({ label: "compare with", options: domains.map(({ name, title }) => [name, title]), oninput: paint });
  const temperature = slider({ label: "temperature", min: 0.1, max: 2, step: 0.1, value: 1, show: (v) => v.toFixed(1), oninput: () => (live ? paint() : ask()) });
  const each = Array.from({ length: experts }, (_, e) => e);
  const what = select({
    label: "what if",
    options: [["", "nothing is changed"], ...["off", "forced"].flatMap((how) => each.map((e) => [`${how} ${e}`, `expert ${e + 1} is ${how === "off" ? "switched off" : how}`]))],
    oninput: ask,
  });
  const where = select({ label: "where", options: [["one", "at the layer shown"], ["all", "at every layer"]], oninput: ask });
  const board = switches(layers, experts, ask);
  const tried = table("What you tried with this text", ["changed", "nats per token", "more than as trained"]);
  const starter = button("Start", ask);
  const running = h("span", { role: "status" }, `A recorded run; the model itself is loaded when you start it (${si(data.bytes, "B", 2)}). `);
  const buttons = data.examples.map((example) => button(example.name, () => take(example)));
  const again = button("Start again", () => {
    live = undefined;
    ask();
  });

  // --- the model --------------------------------------------------------------------------------

  // The engine, started once; null where it cannot be had.
  function start() {
    live ??= begin().catch((error) => {
      live = undefined;
      running.textContent = `The model could not start: ${error.message}. What you see is the run before. `;
      starter.disabled = false;
      return null;
    });
    return live;
  }

  async function begin() {
    running.textContent = "Loading the model … ";
    starter.disabled = true;
    gone.replaceChildren();
    weights ??= await file(model, "router.safetensors");
    const read = await engine(weights, answered, lost).catch(() => {
      weights = undefined;
      throw new Error("its weights are damaged");
    });
    stage.classList.remove("lr-compact");
    running.textContent = `Live: ${si(data.parameters)} parameters run in your browser. Type a text of your own.`;
    starter.remove();
    return read;
  }

  function lost() {
    gone.replaceChildren("The model no longer answers: the browser has ended the worker that ran it. ", again);
  }

  function only() {
    const [how, expert] = what.value.split(" ");
    const at = where.value === "one" ? [layer.value - 1] : Array.from({ length: layers }, (_, l) => l);
    const rules = switched(board.off(), experts, what.value ? allowed({ how, expert: Number(expert) }, at, experts) : {});
    return Object.keys(rules).length ? rules : null;
  }

  // What is asked, in words: they come back with the answer, because the controls may have moved on by then.
  function change() {
    const off = board.off();
    const one = `${what.input.selectedOptions[0].textContent.replace(" is", "")} at ${where.value === "one" ? `layer ${layer.value}` : "every layer"}`;
    const several = off.length <= 3 ? `${off.map(([l, e]) => `expert ${e + 1} at layer ${l + 1}`).join(", ")} off` : `${off.length} switches off`;
    return [what.value && one, off.length && several].filter(Boolean).join(" and ");
  }

  // Have the text read, as trained first where it is to be compared.
  async function ask() {
    const read = await start();
    if (!read) return;
    const plain = found.plainText === input.value;
    read.ask({ text: input.value, only: plain ? only() : null, change: change() });
  }

  function answered(answer) {
    const plain = answer.only === null;
    if (plain && found.plainText !== answer.text) state.tried = new Map();
    if (plain) [found.plain, found.plainText] = [answer.costs, answer.text];
    else if (answer.text === found.plainText && answer.costs.length) state.tried.set(JSON.stringify(answer.only), [answer.change, mean(answer.costs)]);
    show({ ...answer, plain: answer.text === found.plainText ? found.plain : null });
    if (plain && answer.text === input.value && (only() || state.without)) {
      if (state.without) {
        const own = found.load[layer.value - 1];
        what.set(`off ${own.indexOf(Math.max(...own))}`);
        state.without = false;
      }
      ask();
    }
  }

  // --- what the reader does -----------------------------------------------------------------------

  function turned() {
    if (what.value && where.value === "one") ask();
    paint();
  }

  function take({ text: own, domain: name }) {
    input.value = own;
    if (name) domain.set(name);
    ask();
  }

  function reset() {
    what.set("");
    board.reset();
    where.set("one");
    temperature.set(1);
    layer.set(middle);
    domain.set(first.domain);
    state.without = false;
    leave();
    list.activate(0);
    input.value = first.text;
    if (live) ask();
    else show(recorded);
  }

  // --- the tour -----------------------------------------------------------------------------------

  const tourHead = h("strong");
  const tourText = h("p", { role: "status" });
  const [back, on, end] = [button("Back", () => go(state.step - 1)), button("Next", () => go(state.step + 1)), button("End the tour", leave)];
  const tour = h("div", { class: "lr-tour", hidden: true, role: "region", "aria-label": "guided tour" }, tourHead, tourText, h("div", { class: "mm-buttons" }, back, on, end));

  function go(step) {
    state.step = step;
    const [title, said] = TOUR[step];
    tour.hidden = false;
    tourHead.textContent = `${step + 1} of ${TOUR.length}: ${title}`;
    back.disabled = step === 0;
    on.disabled = step === TOUR.length - 1;
    what.set("");
    board.reset();
    where.set("one");
    temperature.set(said.temperature ?? 1);
    layer.set(said.layer);
    state.without = Boolean(said.without);
    state.wanted = said.token;
    const example = data.examples[said.example];
    domain.set((example ?? first).domain);
    input.value = example ? example.text : said.text;
    ask();
    paint();
  }

  function leave() {
    state.step = -1;
    tour.hidden = true;
  }

  // --- what is seen -------------------------------------------------------------------------------

  function show(answer) {
    const { bytes, cut: isCut, probs, text: whole } = answer;
    const tokens = bytes.map((spelling) => ({ text: written(spelling) }));
    const choices = tokens.map((_, t) =>
      Array.from({ length: layers }, (_, l) => {
        const own = probs.slice((t * layers + l) * experts, (t * layers + l + 1) * experts);
        return { probs: own, ...choose(own, k) };
      }));
    found = { plain: found?.plain, plainText: found?.plainText, ...answer, tokens, choices, domains, load: loads(choices, layers, experts) };
    list.show(tokens, getComputedStyle(input).direction);
    if (state.wanted !== undefined && whole === input.value) {
      list.activate(state.wanted);
      state.wanted = undefined;
    }
    const seen = beginning(bytes);
    const counts = [tokens.length, seen.length, whole.length].map((n) => n.toLocaleString("en"));
    const tail = h("bdi", {}, [...seen].slice(-24).join(""));
    const notice = `The model reads ${counts[0]} tokens at most, so the text is cut after ${counts[1]} of its ${counts[2]} characters: “…`;
    cut.replaceChildren(...(isCut ? [notice, tail, "”."] : []));
    paint();
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
    const said = tokens.length
      ? `${tokens.length} tokens. At layer ${l + 1} expert ${most + 1} is chosen most: ${percent(own[most])} of the choices; in “${other.title}” it is ${percent(other.load[l][most])}. ` +
        `${percent(apart(own, other.load[l]))} of the choices would have to change to give that domain's load. Over all layers the nearest of the ${domains.length} domains is “${nearest(load, domains).title}”.`
      : "There is no text to read. The lines show the domain alone.";
    words.say(live || !data.compact ? said : `Each token goes to ${k} of ${experts} experts, whose numbers stand below it; it has the colour of the first. This is layer ${l + 1} of ${layers}: move it, and see who reads what.`);
    picture.describe(`Share of choices that each of ${experts} experts gets at layer ${l + 1}, of this text and of “${other.title}”. ${said}`);
    numbers.set(own.map((share, e) => [String(e + 1), percent(share, 1), percent(other.load[l][e], 1), difference(share - other.load[l][e], 1)]));
    costs.textContent = paid();
    const trained = found.plain ? mean(found.plain) : 0;
    const more = (nats) => `${nats < 0 ? "−" : "+"}${Math.abs(nats).toFixed(3)}`;
    tried.set([...state.tried.values()].map(([changed, now]) => [changed, now.toFixed(3), more(now - trained)]).reverse());
    const probs = found.logits ? distribution(found.logits, temperature.value) : null;
    next.show(found.next.map(({ bytes }) => ({ text: text(bytes), written: written(bytes) })), found.next.map(({ token, p }) => (probs ? probs[token] : p)));
    if (state.step >= 0) tourText.textContent = found.logits && found.text === input.value ? TOUR[state.step][2](found) : "The model reads …";
  }

  // What the text costs, and what it would cost otherwise.
  function paid() {
    const { tokens, costs: own, plain, only: under, change: changed } = found;
    if (!tokens.length) return "";
    const dearest = own.indexOf(Math.max(...own));
    const now = mean(own);
    if (!under) return `To predict it costs the model ${now.toFixed(2)} nats per token; of ${(Math.exp(now)).toFixed(0)} equally likely tokens each would cost as much. The most surprising is “${tokens[dearest].text}”, ${own[dearest].toFixed(1)} nats.`;
    if (!plain) return `So changed, the text costs ${now.toFixed(2)} nats per token.`;
    const more = now - mean(plain);
    return `With ${changed}, the text costs ${now.toFixed(2)} nats per token: ${Math.abs(more).toFixed(2)} ${more < 0 ? "less" : "more"} than the ${mean(plain).toFixed(2)} as trained.`;
  }

  stage.classList.add("lr");
  stage.classList.toggle("lr-compact", Boolean(data.compact));
  const more = (element) => (element.classList.add("lr-more"), element);
  stage.append(
    h("style", {}, LOOK),
    more(h("p", { class: "mm-title" }, "The live router")),
    more(h("p", {}, `This is ${data.name ? `the model “${data.name}”` : "the course's own model"}, ${si(data.parameters)} parameters, at work in your browser. Which experts read your text, and do the same ones read it in another language, or as code?`)),
    more(h("div", { class: "mm-buttons" }, button("Guided tour", () => go(0)), button("As at first", reset))),
    tour,
    h("div", { class: "lr-live" }, running, data.compact ? [] : starter),
    more(h("div", {}, h("label", { class: "lr-label", for: input.id }, "text"), input, h("div", { class: "mm-buttons" }, buttons))),
    h("div", { class: "mm-controls" }, layer.element, more(domain.element), more(what.element), more(where.element)),
    more(h("p", {}, "Each token has the number and colour of its first expert; the second one stands beside it. Point at a token, or walk with the arrow keys, for its weights at every layer.")),
    list.element,
    gone,
    cut,
    words.element,
    more(board.element),
    more(costs),
    more(tried.element),
    more(h("div", { class: "lr-both" },
      one.element,
      h("div", {}, h("p", {}, "Load: bars, this text; lines, the domain's average."), picture.element))),
    more(h("div", {}, h("p", {}, "What may come next? Press a token to write it."), h("div", { class: "mm-controls" }, temperature.element), next.element)),
    more(numbers.element),
    more(h("p", {}, `Experts are held in int8 here. On ${agreement.tokens.toLocaleString("en")} tokens of held-out text, ${percent(agreement.same_set, 1)} of the choices fall on the same ${k} experts as with the full weights, and ${percent(agreement.same_first, 1)} have the same first one.`)),
    more(h("details", { class: "mm-table" },
      h("summary", {}, "What runs here"),
      h("p", {}, `The whole model, ${si(data.bytes, "B")}: experts in int8 with one scale a channel, everything else as stored. Results are float32, sums float64. Before the text the model reads an end-of-text mark, as in training. An expert that is switched off has its logit put to −∞ before the softmax; where one is forced, all others have. The agreement was measured on ${agreement.date} with ${agreement.command}; layer 1 always agrees, as no expert comes before its router.`))),
  );
  input.value = first.text;
  domain.set(first.domain);
  show(recorded);
  // on the first page the button stands beside others, and is a link without this script
  const outside = data.compact ? document.querySelector("[data-starts=live_router]") : null;
  outside?.addEventListener("click", (event) => {
    event.preventDefault();
    ask();
  });
  return async () => (await live)?.stop();
});
