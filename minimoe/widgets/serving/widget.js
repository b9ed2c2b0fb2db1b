// Requests in the places of a batch, as minimoe.widgets.serving has them in Python.

// [[place, first step, step after the last], ...] in order of the requests.
export function schedule(lengths, places, continuous) {
  let free = Array(places).fill(0);
  return lengths.map((length, request) => {
    if (!continuous && request % places === 0) free = Array(places).fill(Math.max(...free));
    const place = continuous ? free.indexOf(Math.min(...free)) : request % places;
    const start = free[place];
    free[place] += length;
    return [place, start, start + length];
  });
}

// {seconds, first}: until all is written, and until each request's first token; step[n - 1] is that of n sequences.
export function clock(runs, step, prefill) {
  const last = Math.max(...runs.map(([, , end]) => end));
  const ends = [];
  for (let s = 0; s < last; s += 1) {
    const active = runs.filter(([, start, end]) => start <= s && s < end).length;
    const joining = runs.filter(([, start]) => start === s).length;
    ends.push((ends.at(-1) ?? 0) + joining * prefill + (active ? step[active - 1] : 0));
  }
  return { seconds: ends.at(-1), first: runs.map(([, start]) => ends[start]) };
}

// Geometric lengths from uniform numbers.
export const lengths = (uniform, mean) => uniform.map((u) => (mean > 1 ? 1 + Math.trunc(Math.log(u) / Math.log(1 - 1 / mean)) : 1));

const COLOURS = ["blue", "vermillion"];

export default explorable(({ data, stage, width, reset }) => {
  const [HEIGHT, LEFT] = [230, 44];
  const words = status();
  const numbers = table("Both schedules in numbers", ["schedule", "steps", "places busy", "tokens a second", "first token, half", "first token, 95 %"]);
  const picture = drawing(width, HEIGHT);
  const names = Object.keys(data.models);
  const model = select({ label: "model", options: names, oninput: show });
  const device = select({ label: "on", options: data.devices.map((name, i) => [String(i), name]), oninput: show });
  const places = slider({ label: "places", values: [1, 2, 4, 8, 16, 32, 64], value: data.places, oninput: show });
  const mean = slider({ label: "mean length of an answer", values: [1, 4, 8, 16, 32, 64], value: data.mean, oninput: show });
  const prompt = slider({ label: "tokens of a prompt", values: data.prompts, value: data.prompts[0], oninput: show });
  const join = checkbox({ label: "take a place as soon as it is free", value: true, oninput: show });

  function show() {
    const all = lengths(data.uniform, mean.value);
    const cost = data.models[model.value][Number(device.value)];
    const tokens = sum(all);
    const found = [false, true].map((continuous) => {
      const runs = schedule(all, places.value, continuous);
      const { seconds, first } = clock(runs, cost.step, cost.prefill[data.prompts.indexOf(prompt.value)]);
      const steps = Math.max(...runs.map(([, , end]) => end));
      const sorted = [...first].sort((a, b) => a - b);
      const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
      return { runs, steps, busy: tokens / (places.value * steps), rate: tokens / seconds, half: at(0.5), most: at(0.95) };
    });
    const now = found[Number(join.value)];
    const longest = Math.max(...found.map((f) => f.steps));
    const [x, y] = [(step) => LEFT + (step / longest) * (width - LEFT - 4), (place) => 22 + (place / places.value) * (HEIGHT - 62)];
    const tall = Math.max(1, ((HEIGHT - 62) / places.value) * 0.85);
    picture.draw(
      h("text", { x: 0, y: 12, class: "mm-quiet" }, "places of the batch; a bar is an answer"),
      now.runs.map(([place, start, end], i) =>
        h("rect", { x: x(start), y: y(place), width: Math.max(0.5, x(end) - x(start) - 1), height: tall, style: `fill: var(--mm-${COLOURS[i % 2]})` })),
      [0, 0.5, 1].map((share) =>
        h("text", { x: x(share * longest), y: HEIGHT - 24, "text-anchor": share === 1 ? "end" : "middle", class: "mm-quiet" }, String(Math.round(share * longest)))),
      h("text", { x: width / 2, y: HEIGHT - 6, "text-anchor": "middle", class: "mm-quiet" }, "steps"),
    );
    const text =
      `${all.length} answers in ${now.steps} steps; ${percent(now.busy)} of the places are busy. ` +
      `At best ${Math.round(now.rate).toLocaleString("en-GB")} tokens a second; half of the first tokens come within ${si(now.half, "s")}, 95 % within ${si(now.most, "s")}.`;
    words.say(text);
    picture.describe(`Bars of answers in ${places.value} places over ${longest} steps. ${text}`);
    numbers.set(
      found.map((f, i) => [i ? "as places become free" : "batch by batch", String(f.steps), percent(f.busy), Math.round(f.rate).toLocaleString("en-GB"), si(f.half, "s"), si(f.most, "s")]),
    );
  }

  stage.append(
    h("p", { class: "mm-title" }, "Many requests, one batch"),
    h("p", {}, "All requests wait from the start. How much of the batch stays empty, and what does it do to the first token? Times are floors with 1,024 tokens in each cache, on one device, whether or not the model fits into its memory."),
    h("div", { class: "mm-controls" }, places.element, mean.element, prompt.element, model.element, device.element, join.element),
    picture.element,
    h("div", { class: "mm-buttons" }, reset),
    words.element,
    numbers.element,
  );
  show();
});
