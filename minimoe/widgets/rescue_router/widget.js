// Rescue a router: a tiny sparse model trains in the page, collapses, and is rescued by the reader.

// Share of each expert, share dropped and mean loss of frames, as one.
export function together(frames, E) {
  const total = frames.reduce((a, f) => a + f.steps, 0);
  const counts = Array.from({ length: E }, (_, e) => sum(frames.map((f) => f.counts[e])));
  const all = sum(counts);
  return { steps: total, counts, share: counts.map((c) => c / all), dropped: sum(frames.map((f) => f.dropped)) / all, loss: sum(frames.map((f) => f.loss)) / total };
}

// Frames two by two as one, so that a film has never too many.
export function halved(frames) {
  return frames.flatMap((a, i) => {
    const b = frames[i + 1];
    if (i % 2 || !b) return i % 2 ? [] : [a];
    return [{ steps: a.steps + b.steps, counts: a.counts.map((c, e) => c + b.counts[e]), dropped: a.dropped + b.dropped, loss: a.loss + b.loss }];
  });
}

// What is to be said of a load.
export function verdict(share) {
  const times = Math.max(...share) * share.length;
  if (times > 0.7 * share.length) return "The router has collapsed";
  return times < 1.6 && Math.min(...share) * share.length > 0.3 ? "The load is nearly even" : "The load is uneven";
}

const [GUTTER, ROW, TOP, CURVE] = [60, 26, 58, 104];
const [LOW, HIGH] = [1.5, 4.6]; // nats per character
const said = { alpha: (v) => (v ? String(v) : "0, off"), speed: (v) => `${v} ×`, factor: (v) => (v ? String(v) : "no limit") };
const marked = { alpha: (v) => `balance ${v}`, speed: (v) => `router ${v} ×`, factor: (v) => (v ? `capacity ${v}` : "no capacity") };

export default explorable(({ model, data, stage, width, reset }) => {
  const { E, B, frame, steps: end } = data.sizes;
  const fresh = () => ({ frames: [], marks: [], limit: 100 * frame, step: 0, running: false, looked: true, drawn: 0, spoke: 0 });
  let state = fresh();
  let engine;
  let loading;
  const side = width < 480 ? 78 : 150;
  const [x0, x1] = [GUTTER, width - side];
  const bottom = TOP + E * ROW; // of the experts' rows
  const drops = [bottom + 6, 14]; // the row of what is dropped: its top, its height
  const under = drops[0] + drops[1] + 34; // the top of the curve
  const x = (step) => x0 + (step / state.limit) * (x1 - x0);
  const y = (loss) => under + CURVE * (1 - (Math.min(loss, HIGH) - LOW) / (HIGH - LOW));
  const picture = drawing(width, under + CURVE + 40);
  const words = status();
  words.element.style.minHeight = width < 480 ? "7.4em" : "4.4em"; // so that the page stays still under its sentences
  const numbers = table("The same in numbers, tenth by tenth of this training", ["up to step", ...Array.from({ length: E }, (_, e) => `expert ${e + 1}`), "dropped", "loss"]);

  const chosen = (key, label, values) => slider({ label, values, value: data.first[key], show: said[key], oninput: () => changed(key) });
  const controls = {
    alpha: chosen("alpha", "balance strength α", data.alphas),
    speed: chosen("speed", "router's learning rate", data.speeds),
    factor: chosen("factor", "capacity factor", data.factors),
  };
  const seed = select({ label: "start", options: data.seeds.map((n, i) => [n, `random start ${i + 1}`]), oninput: anew });
  const play = button("Train", () => run(!state.running));
  const settings = () => ({ alpha: controls.alpha.value, speed: controls.speed.value, factor: controls.factor.value });

  // --- training ---------------------------------------------------------------------------------

  async function run(running) {
    state.running = running && state.step < end;
    play.textContent = state.running ? "Pause" : state.step >= end ? "Train again" : "Train";
    if (running && !state.running) return anew();
    try {
      if (state.running) {
        loading ??= file(model, "text.txt");
        const text = new TextDecoder().decode(await loading);
        if (!stage.isConnected) return;
        engine ??= start(text);
      }
      tell();
      if (!state.running && state.step) speak();
    } catch (error) {
      loading = undefined;
      state.running = false;
      play.textContent = "Train";
      words.say(`The training could not start: ${error.message}.`);
    }
  }

  function start(text) {
    const sizes = { ...data.sizes, seed: Number(seed.value) };
    const here = state; // what an earlier training still posts is not this one's
    const post = (one) => here === state && grown(one);
    const lost = () => {
      if (here !== state) return;
      state = { ...fresh(), running: true };
      const next = state;
      engine = onPage(text, sizes, (one) => next === state && grown(one));
      tell();
    };
    try {
      return inWorker(text, sizes, post, lost);
    } catch {
      return onPage(text, sizes, post); // no workers here, or none from a Blob
    }
  }

  // Out of sight, training waits.
  const tell = () => engine?.tell({ ...settings(), running: state.running && state.looked && !document.hidden });

  function anew() {
    const { running, looked, step } = state;
    engine?.stop();
    engine = undefined;
    state = { ...fresh(), looked };
    Object.keys(controls).forEach(noted);
    paint();
    words.say("Nothing is trained yet. Press Train.");
    run(running || step >= end);
  }

  // What is set is marked in the film, once for all that is set within one and a half seconds or so.
  function noted(key) {
    const { value } = controls[key];
    state.marks = state.marks.filter((mark) => mark.key !== key || state.step - mark.step >= 24);
    if (state.step || value !== data.first[key]) state.marks.push({ step: state.step, key, text: marked[key](value) });
  }

  function changed(key) {
    noted(key);
    paint();
    tell();
  }

  function grown(one) {
    state.frames.push(one);
    state.step += one.steps;
    if (state.step >= state.limit && state.step < end) {
      state.limit *= 2;
      state.frames = halved(state.frames);
    }
    const now = performance.now();
    if (state.step >= end) run(false);
    if (now - state.drawn < (lessMotion() ? 1000 : 60) && state.step < end) return;
    state.drawn = now;
    paint();
    if (now - state.spoke > 3000) speak();
  }

  // --- what is seen -----------------------------------------------------------------------------

  // The last twenty steps, as one.
  function recent() {
    const some = [];
    for (let i = state.frames.length - 1, steps = 0; i >= 0 && steps < 20; i -= 1) {
      steps += state.frames[i].steps;
      some.push(state.frames[i]);
    }
    return together(some, E);
  }

  function speak() {
    state.spoke = performance.now();
    const { share, dropped, loss } = recent();
    const most = share.indexOf(Math.max(...share));
    const idle = share.filter((s) => s < 0.05).length;
    const text =
      `Step ${state.step.toLocaleString("en")}. ${verdict(share)}: expert ${most + 1} is asked for by ${percent(share[most])} of the characters, ` +
      `${(share[most] * E).toFixed(1)} times the fair share${idle ? `; ${idle} of ${E} experts by less than 5 %` : ""}. ` +
      `${dropped ? `Its places full, ${percent(dropped)} of the characters pass without an expert. ` : ""}Loss ${loss.toFixed(2)} nats per character.`;
    words.say(text);
    picture.describe(`Load of ${E} experts over training, and the loss. ${text}`);
  }

  const text = (at, height, content, more = {}) => h("text", { x: at, y: height, class: "mm-quiet", ...more }, content);

  function axes() {
    const parts = [];
    let at = 42;
    parts.push(text(0, 11, "share"));
    for (const [share, label] of [[0, "none"], [1 / E, `${percent(1 / E)}, fair`], [0.5, "50 %"], [1, "all"]]) {
      parts.push(h("rect", { x: at + 0.5, y: 0.5, width: 12, height: 12, style: `fill:var(--mm-blue);fill-opacity:${share};stroke:var(--mm-line)` }));
      parts.push(text(at + 18, 11, label));
      at += 36 + 6.2 * label.length;
    }
    parts.push(text(0, TOP - 8, "expert"));
    if (!state.frames.length) parts.push(text((x0 + x1) / 2, TOP + (E * ROW) / 2 + 4, "press Train", { "text-anchor": "middle" }));
    for (let e = 0; e < E; e += 1) parts.push(text(x0 - 8, TOP + (e + 0.5) * ROW + 4, String(e + 1), { "text-anchor": "end", class: "" }));
    parts.push(h("rect", { x: x0, y: TOP, width: x1 - x0, height: E * ROW, style: "fill:none;stroke:var(--mm-line)" }));
    parts.push(text(x0 - 8, drops[0] + 11, "dropped", { "text-anchor": "end" }));
    parts.push(h("rect", { x: x0, y: drops[0], width: x1 - x0, height: drops[1], style: "fill:none;stroke:var(--mm-soft)" }));
    parts.push(text(0, under - 10, "loss, nats per character"));
    for (const tick of [2, 3, 4]) {
      parts.push(h("line", { x1: x0, x2: x1, y1: y(tick), y2: y(tick), class: "mm-grid" }));
      parts.push(text(x0 - 8, y(tick) + 4, String(tick), { "text-anchor": "end" }));
    }
    parts.push(h("line", { x1: x0, x2: x1, y1: y(LOW), y2: y(LOW), class: "mm-axis" }));
    for (const share of [0, 0.5, 1]) {
      parts.push(text(x(share * state.limit), under + CURVE + 17, (share * state.limit).toLocaleString("en"), { "text-anchor": share ? (share === 1 ? "end" : "middle") : "start" }));
    }
    parts.push(text((x0 + x1) / 2, under + CURVE + 34, "training step", { "text-anchor": "middle" }));
    return parts;
  }

  function film() {
    const parts = [];
    const points = [];
    let step = 0;
    for (const one of state.frames) {
      const all = one.steps * B;
      const [left, wide] = [x(step), x(step + one.steps) - x(step)];
      const cell = (top, height, colour, share) =>
        parts.push(h("rect", { x: left.toFixed(2), y: top, width: wide.toFixed(2), height, "shape-rendering": "crispEdges", style: `fill:var(--mm-${colour});fill-opacity:${share.toFixed(3)}` }));
      one.counts.forEach((count, e) => cell(TOP + e * ROW, ROW, "blue", count / all));
      if (one.dropped) cell(...drops, "vermillion", one.dropped / all);
      step += one.steps;
      points.push(`${x(step).toFixed(1)},${y(one.loss / one.steps).toFixed(1)}`);
    }
    parts.push(h("polyline", { points: points.join(" "), style: "fill:none;stroke:var(--mm-text);stroke-width:1.75" }));
    return parts;
  }

  // The latest have their words, others where there is room.
  function marks() {
    let free = x1;
    return [...state.marks].reverse().flatMap(({ step, text: content }) => {
      const [at, long] = [x(step), 6.4 * content.length];
      const line = h("line", { x1: at, x2: at, y1: TOP - 4, y2: under + CURVE, style: "stroke:var(--mm-text);stroke-dasharray:3 3" });
      const left = Math.min(at, free - long);
      if (left < at - long || left < x0 - 8) return [line];
      free = left - 8;
      return [line, h("text", { x: left, y: TOP - 8 }, content)];
    });
  }

  // The load now, as bars beside the film, and the loss now.
  function bars() {
    if (!state.frames.length) return [];
    const { share, dropped, loss } = recent();
    const [left, room] = [x1 + 10, side - 10 - 38];
    const fair = left + room / E;
    const parts = share.flatMap((s, e) => [
      h("rect", { x: left, y: TOP + e * ROW + 5, width: s * room, height: ROW - 10, style: "fill:var(--mm-blue)" }),
      h("text", { x: left + s * room + 5, y: TOP + (e + 0.5) * ROW + 4, style: "stroke:var(--mm-back);stroke-width:4;paint-order:stroke" }, percent(s)),
    ]);
    parts.push(h("line", { x1: fair, x2: fair, y1: TOP - 2, y2: bottom + 2, style: "stroke:var(--mm-text);stroke-dasharray:2 2" }));
    parts.push(h("text", { x: left, y: TOP - 8 }, `step ${state.step.toLocaleString("en")}`));
    if (dropped) parts.push(h("text", { x: left, y: drops[0] + 11 }, percent(dropped)));
    parts.push(text(left, under + 34, "loss now"), h("text", { x: left, y: under + 53, style: "font-size:16px;font-weight:600" }, loss.toFixed(2)));
    return parts;
  }

  function paint() {
    picture.draw(axes(), film(), marks(), bars());
    const size = Math.max(1, state.frames.length / 10);
    let step = 0;
    numbers.set(
      Array.from({ length: Math.min(10, state.frames.length) }, (_, i) => {
        const { steps, share, dropped, loss } = together(state.frames.slice(Math.round(i * size), Math.round((i + 1) * size)), E);
        step += steps;
        return [step.toLocaleString("en"), ...share.map((s) => percent(s)), percent(dropped), loss.toFixed(2)];
      }),
    );
  }

  const sight = new IntersectionObserver((entries) => {
    state.looked = entries.at(-1).isIntersecting;
    tell();
  });
  sight.observe(stage);
  document.addEventListener("visibilitychange", tell);

  stage.append(
    h("p", { class: "mm-title" }, "Rescue a router"),
    h("p", {}, `A language model with ${E} experts, one for each character, trains in this page. Nothing balances it. Press Train and watch the load; then rescue the router with the sliders, while it trains. Which of the three can do it, and which only change what a collapse costs?`),
    h("div", { class: "mm-buttons" }, play, reset),
    h("div", { class: "mm-controls" }, Object.values(controls).map((control) => control.element), seed.element),
    picture.element,
    words.element,
    numbers.element,
  );
  words.say("Nothing is trained yet. Press Train.");
  picture.describe(`Load of ${E} experts over training, and the loss. Nothing is trained yet.`);
  paint();
  return () => {
    engine?.stop();
    sight.disconnect();
    document.removeEventListener("visibilitychange", tell);
  };
});
